"""Another framework's checkpoint as a reader returns it, and the options for reading it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from ckpt import CheckpointError
from ckpt.format import itemsize
from ckpt.read import WEIGHT_STATES

PARAMETER, BUFFER = WEIGHT_STATES
"""States that hold a weight's own value."""

Array = npt.NDArray[Any]
FLOATS = ("float16", "bfloat16", "float32", "float64")
Read = Callable[[], Array]
"""Reads the verified values, in a type that converts to the stored one exactly. Thread-safe."""
ReadPart = Callable[[tuple[slice, ...]], Array]
"""Reads a part, given a slice for each dim, without the rest."""


class FilePlace(NamedTuple):
    """A tensor in a file from which parts of it can be read without the rest."""

    file: Path
    name: str
    """Name in the file."""


@dataclass(frozen=True, kw_only=True)
class ForeignArray:
    """One tensor in its unsplit shape, read on demand."""

    name: str
    """Name of the parameter or buffer in the unsplit model."""
    state: str
    """`fp32` for a parameter's own value, `value` for a buffer's, else the optimizer's name of the state."""
    dtype: str
    """Type in which it will be stored: `float32` for parameters."""
    shape: tuple[int, ...]
    read: Read
    origin: str
    """Place in the source, shown to the user."""
    own_dtype: str | None = None
    """Type in the source; None if it isn't known."""
    read_part: ReadPart | None = None
    """None if the tensor is read whole."""
    place: FilePlace | None = None
    """Place from which `tensor_parts.read_parts` reads; None in sources that it doesn't read."""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.state

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """An optimizer's state except its arrays, in the manifest's form (`docs/format.md`)."""

    type: str | None
    """Name of its class in torch; None if the source doesn't record it."""
    groups: list[dict[str, Any]]
    """Hyperparameters of each group, with the names of its parameters under `params`."""
    scalars: dict[str, dict[str, Any]]
    """Parameter -> state -> number."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Another framework's checkpoint."""

    kind: str
    """Kind of checkpoint, as in `--from`."""
    where: str
    arrays: list[ForeignArray]
    frozen: frozenset[str] = frozenset()
    """Parameters that don't require a gradient."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of tied weights -> their name in `arrays`."""
    optimizer: OptimizerState | None = None
    scheduler: dict[str, Any] | None = None
    """State of the LR schedule, for `load_state_dict` of the scheduler that resumes from it."""
    step: int = 0
    samples: int = 0
    skipped: int = 0
    """Steps skipped because of an overflow."""
    batch: int | None = None
    """Samples in a global batch."""
    loss_scale: dict[str, Any] | None = None
    """Loss scale of fp16, in the manifest's form."""
    writer: dict[str, Any] = field(default_factory=dict)
    """Versions and topology of the writer, for information."""
    declared: dict[str, Any] = field(default_factory=dict)
    """The model's description, in the manifest's form."""
    client_state: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """Everything in the source that isn't imported, each with the reason."""
    files: frozenset[Path] = frozenset()
    """Files that were read; others in their folder are listed in `left_out` by `detect.read`."""

    def __post_init__(self) -> None:
        """Raise CheckpointError if two arrays have the same name and state."""
        seen: dict[tuple[str, str], ForeignArray] = {}
        for array in self.arrays:
            other = seen.setdefault(array.key, array)
            if other is not array:
                raise CheckpointError(
                    f"{self.where} has {array.name}/{array.state} twice: {other.origin} and {array.origin}"
                )

    def renamed(self, new: Mapping[str, str]) -> Source:
        """Return the source with the names `new`, by the old ones. Tensors without a new name are left out.

        If the first name of a tied weight is left out, its next alias takes the first one's place.
        """
        names = {*(array.name for array in self.arrays), *self.aliases}
        dropped, new = sorted(names - new.keys()), dict(new)
        for alias, target in self.aliases.items():
            if target not in new and alias in new:
                new[target] = new.pop(alias)
        gone = names - new.keys()

        def each(old: Iterable[str]) -> list[str]:
            return [new.get(name, name) for name in old if name not in gone]

        optimizer = self.optimizer
        if optimizer is not None:
            optimizer = replace(
                optimizer,
                groups=[{**group, "params": each(group["params"])} for group in optimizer.groups],
                scalars={new.get(n, n): held for n, held in optimizer.scalars.items() if n not in gone},
            )
        return replace(
            self,
            arrays=[replace(array, name=new[array.name]) for array in self.arrays if array.name in new],
            frozen=frozenset(each(self.frozen)),
            aliases={new[alias]: new[to] for alias, to in self.aliases.items() if {alias, to} <= new.keys()},
            optimizer=optimizer,
            left_out=[*self.left_out, *(f"{name}: left out by the name map" for name in dropped)],
        )

    def weights_alone(self) -> Source:
        """Return the source without optimizer state, LR schedule and loss scale."""
        return replace(
            self,
            arrays=[array for array in self.arrays if array.state in (PARAMETER, BUFFER)],
            optimizer=None,
            scheduler=None,
            loss_scale=None,
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options for reading a source, as given on the command line."""

    tag: str | None = None
    """Tag to read from a run's folder; the newest by default."""
    buffers: tuple[str, ...] = ()
    """Name patterns of buffers, for sources that don't record them."""
    split: tuple[tuple[str, str], ...] = ()
    """Name patterns of tensor-parallel parameters, with their rules in `deepspeed.tensor_parallel.RULES`."""
    in_model_order: bool = False
    """True if numbered optimizer states belong to the parameters in the model's order."""
    optimizer_order: tuple[tuple[str, ...], ...] | None = None
    """Names of the parameters of a given optimizer, by group, in the order by which torch numbers them."""
    frozen: tuple[str, ...] = ()
    """Name patterns of the parameters that weren't trained, for `in_model_order`."""
    untie: bool = False
    """True if tensors that share memory, or look tied, are stored separately."""
    stand_ins: tuple[str, ...] = ()
    """Further classes that may be pickled in the source; they are ignored."""
    weights_only: bool = False
    """True if the optimizer state isn't read; its format then doesn't matter."""
    verify: bool = True
    """True if the source's checksums are verified."""
    trust: bool = False
    """True if pickles aren't tried in another process first."""
