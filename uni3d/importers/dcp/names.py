"""Names of a state_dict in DCP's flat form, sorted by purpose.

The rules are the same whether the state_dict lies in a folder of DCP (`layout.Layout`) or is being saved by
`uni3d.dcp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ckpt import CheckpointError
from uni3d.importers.source import Array

Steps = tuple[str | int, ...]
"""Path to a value in nested dicts and lists: keys and indices."""

MODELS = frozenset({"model", "model_state_dict", "module", "state_dict"})
OPTIMIZERS = frozenset(
    {"optim", "optimizer", "optimizers"}
    | {f"{name}_state{end}" for name in ("optim", "optimizer") for end in ("", "_dict")}
)


class TensorKind(Protocol):
    """Type and shape of a whole tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Content(Protocol):
    """A state_dict in DCP's flat form: names joined by dots, without nesting."""

    @property
    def where(self) -> str:
        """Its place, for messages."""

    @property
    def without(self) -> str:
        """Advice, for messages, on how to do without the optimizer's states; may be empty."""

    @property
    def tensors(self) -> Mapping[str, TensorKind]: ...

    @property
    def steps(self) -> Mapping[str, Steps]:
        """Path in the nested dict, by name, in the dict's order."""

    def read(self, name: str) -> Array:
        """Return a whole tensor."""

    def read_part(self, name: str, part: tuple[slice, ...]) -> Array:
        """Return a part of a tensor, given a slice for each dim."""

    def number(self, name: str) -> Any:
        """Return the number in a tensor of one element."""

    def object(self, name: str) -> Any:
        """Return a value that isn't a tensor."""

    def tied(self, name: str, owner: str) -> bool:
        """Return whether two weights of one type and shape are one."""

    def leave_out(self, name: str, reason: str) -> None:
        """Leave out an entry; raises CheckpointError if nothing may be left out."""

    def note(self, line: str) -> None:
        """Take a line for the user about something that isn't obvious."""


@dataclass(frozen=True, kw_only=True)
class SortedNames:
    """The flat names, sorted by purpose."""

    model: Steps
    """Path of the model; empty if its weights have no key of their own."""
    optimizer: Steps | None
    weights: dict[str, str]
    """Name of each tensor in the model -> its flat name."""
    states: dict[str, Steps]
    """Flat name -> path below the optimizer's own key."""
    beside: list[str]
    """Flat names of everything else."""


def sort_names(content: Content) -> SortedNames:
    """Sort the names into those of the model, of its optimizer, and the rest.

    Raises:
        CheckpointError: there are several models or optimizers, or no weights.
    """
    optimizer = _prefix(content, OPTIMIZERS, "optimizers")
    of_optimizer = _below(content.steps, optimizer) if optimizer else {}
    rest = {key: steps for key, steps in content.steps.items() if key not in of_optimizer}
    model = _prefix(content, MODELS, "models")
    found: dict[str, Steps]
    if model is None:
        model = optimizer[:-1] if optimizer else ()
        found = {key: steps for key, steps in _below(rest, model).items() if len(steps) == 1}
        if not found.keys() & content.tensors.keys():
            heads: set[str | int] = {steps[0] for key, steps in rest.items() if key in content.tensors}
            if len(heads) != 1:
                raise CheckpointError(_no_weights(content, heads))
            model = tuple(heads)
            found = _below(rest, model)
    else:
        found = _below(rest, model)
    named = {".".join(map(str, steps)): key for key, steps in found.items()}
    if len(named) < len(found):
        twice = sorted(key for key, steps in found.items() if named[".".join(map(str, steps))] != key)
        raise CheckpointError(
            f"{content.where} has two tensors at the path of {twice[0]} in its planner_data"
        )
    weights = {name: key for name, key in named.items() if key in content.tensors}
    if not weights:
        raise CheckpointError(_no_weights(content, set()))
    if flat := next((name for name in weights if name.rpartition(".")[2].startswith("_flat_param")), None):
        raise CheckpointError(
            f"{content.where} has {flat}, a flat parameter of FSDP, saved from a local state_dict, which "
            "doesn't name the original parameters; save a sharded or a full state_dict"
        )
    in_model = set(found) if model else set(weights.values())
    for name in sorted(in_model - set(weights.values())):
        content.leave_out(name, "in the model, but not a tensor")
    return SortedNames(
        model=model,
        optimizer=optimizer,
        weights=weights,
        states=of_optimizer,
        beside=[key for key in rest if key not in in_model],
    )


def _prefix(content: Content, known: frozenset[str], what: str) -> Steps | None:
    """Return the path of one or two keys whose last key is in `known`; None if there is none."""
    found = {
        steps[:depth]: None
        for steps in content.steps.values()
        for depth in (1, 2)
        if len(steps) > depth and steps[depth - 1] in known and not known & set(steps[: depth - 1])
    }
    if len(found) > 1:
        names = ", ".join(".".join(map(str, steps)) for steps in found)
        raise CheckpointError(f"{content.where} has several {what}: {names}; keep only one of them")
    return next(iter(found), None)


def _below(steps: Mapping[str, Steps], prefix: Steps) -> dict[str, Steps]:
    """Return the names whose paths begin with `prefix`, each with the rest of its path."""
    n = len(prefix)
    return {key: each[n:] for key, each in steps.items() if len(each) > n and each[:n] == prefix}


def _no_weights(content: Content, heads: set[Any]) -> str:
    keys = sorted({str(steps[0]) for steps in content.steps.values()})
    found = f"its keys are {', '.join(keys[:12])}"
    if heads:
        found = f"there are tensors under {', '.join(sorted(map(str, heads)))}"
    return f"{content.where} has no weights at the top level or under {', '.join(sorted(MODELS))}; {found}"
