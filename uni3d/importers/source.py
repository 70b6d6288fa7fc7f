"""What a reader finds in another framework's checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from ckpt import CheckpointError
from ckpt.read import WEIGHT_STATES

PARAMETER, BUFFER = WEIGHT_STATES
"""The states of an atom's own value."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class ForeignArray:
    """One tensor, of the whole model's shape, read when it is asked for."""

    name: str
    """The parameter's, or the buffer's, in the unsplit model."""
    state: str
    """`fp32` for a parameter's own value, `value` for a buffer's, or as the optimizer names it."""
    dtype: str
    """As it will be stored: `float32` for parameters."""
    shape: tuple[int, ...]
    read: Callable[[], Array]
    """Its values, verified, in any type of which `dtype` has every number; may be called from any thread."""
    origin: str
    """Where it comes from, for the list of what becomes of what."""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.state


@dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """An optimizer's parts that aren't arrays, as the manifest has them (`docs/format.md`)."""

    type: str | None
    """Name of its class in torch; None if the source doesn't say."""
    groups: list[dict[str, Any]]
    """Hyperparameters of each group, with the names of its parameters under `params`."""
    scalars: dict[str, dict[str, Any]]
    """Parameter -> state -> number."""
    equal_groups: bool = False
    """Whether groups were put together from equal hyperparameters, as the source doesn't say which it had."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Another framework's checkpoint."""

    kind: str
    """As `--from` names it."""
    where: str
    arrays: list[ForeignArray]
    frozen: frozenset[str] = frozenset()
    """Parameters that didn't require a gradient."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Other names of tied weights -> the name in `arrays`."""
    optimizer: OptimizerState | None = None
    scheduler: dict[str, Any] | None = None
    """The state of the learning rate schedule, in the form of the class of torch's that goes on from it."""
    step: int = 0
    samples: int = 0
    skipped: int = 0
    """Steps that were skipped for an overflow."""
    batch: int | None = None
    """Samples in a global batch."""
    loss_scale: dict[str, Any] | None = None
    """As the manifest has it."""
    writer: dict[str, Any] = field(default_factory=dict)
    """What wrote it, for information: versions, topology."""
    client_state: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    """What was found and isn't taken over, each with the reason."""

    def __post_init__(self) -> None:
        """Raises CheckpointError where two arrays would have one name."""
        seen: dict[tuple[str, str], ForeignArray] = {}
        for array in self.arrays:
            other = seen.setdefault(array.key, array)
            if other is not array:
                raise CheckpointError(
                    f"{self.where} has {array.name}/{array.state} twice: {other.origin} and {array.origin}"
                )

    def renamed(self, rename: Callable[[str], str | None]) -> Source:
        """The same with other names; what is renamed to None is left out.

        Of a tied weight whose first name is left out, another that is kept takes the place.

        Raises:
            CheckpointError: two names become one.
        """
        new = {name: rename(name) for name in dict.fromkeys([*(a.name for a in self.arrays), *self.aliases])}
        _check_apart(new)
        dropped = _dropped(new)
        for alias, target in self.aliases.items():
            if new[target] is None:
                new[target], new[alias] = new[alias], None

        def each(old: Iterable[str]) -> list[str]:
            return [name for name in (new.get(n, n) for n in old) if name is not None]

        optimizer = self.optimizer
        if optimizer is not None:
            optimizer = replace(
                optimizer,
                groups=[{**group, "params": each(group["params"])} for group in optimizer.groups],
                scalars={
                    name: numbers for old, numbers in optimizer.scalars.items() if (name := new.get(old, old))
                },
            )
        return replace(
            self,
            arrays=[replace(a, name=called) for a in self.arrays if (called := new[a.name]) is not None],
            frozen=frozenset(each(self.frozen)),
            aliases=_both(self.aliases, new),
            optimizer=optimizer,
            left_out=[*self.left_out, *(f"{name}: the name map leaves it out" for name in dropped)],
        )

    def weights_alone(self) -> Source:
        """The same without what trains them."""
        return replace(
            self,
            arrays=[array for array in self.arrays if array.state in (PARAMETER, BUFFER)],
            optimizer=None,
            scheduler=None,
            loss_scale=None,
        )


def _both(aliases: Mapping[str, str], new: Mapping[str, str | None]) -> dict[str, str]:
    """The aliases of which both names are kept."""
    pairs = ((new[alias], new[first]) for alias, first in aliases.items())
    return {alias: first for alias, first in pairs if alias is not None and first is not None}


def _check_apart(new: Mapping[str, str | None]) -> None:
    seen: dict[str, str] = {}
    for old, name in new.items():
        if name is not None and seen.setdefault(name, old) != old:
            raise CheckpointError(f"the name map makes {name} twice, of {seen[name]} and of {old}")


def _dropped(new: Mapping[str, str | None]) -> list[str]:
    return sorted(name for name, renamed in new.items() if renamed is None)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a source is to be read."""

    tag: str | None = None
    """Of a run's folder; its newest by default."""
    buffers: tuple[str, ...] = ()
    """Patterns of names that are buffers, where the source doesn't say which are."""
    split: tuple[tuple[str, str], ...] = ()
    """Patterns of names of tensor-parallel parameters, each with how its parts go together: see
    `deepspeed_tensor.RULES`."""
    in_model_order: bool = False
    """Whether an optimizer's states that are only numbered are those of the parameters in their order."""
    frozen: tuple[str, ...] = ()
    """Patterns of names of parameters that weren't trained, where states are only numbered."""
    untie: bool = False
    """Whether tensors that share their memory, or look tied, are each taken for one of its own."""
    stand_ins: tuple[str, ...] = ()
    """More classes that may be pickled in it, and are left out."""
    weights_only: bool = False
    """Whether the optimizer's state is left where it is, which may be in a form that can't be read."""
    verify: bool = True
    """Whether the checksums are checked that the source has."""
