"""Several optimizers or schedulers of one run, handled as one: Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]
"""One, or several by place or by name."""

Schedulers = LRScheduler | Sequence[LRScheduler] | Mapping[str, LRScheduler]


class OptimizerSet(Optimizer):
    """Optimizers with parameters of their own, as one: with the groups and the states of all.

    It isn't initialized as an Optimizer, whose registers it doesn't have: the members have theirs.
    """

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        self.members = dict(members)
        self._states = _States(self.members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for member in self.members.values() for group in member.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        return self._states


class _States(MutableMapping[Tensor, Any]):
    """States of several optimizers by parameter; those under strings are the members' own."""

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        self._members = members

    def __getitem__(self, key: Tensor) -> Any:
        for member in self._members.values():
            if key in member.state:
                return member.state[key]
        raise KeyError(key)

    def __setitem__(self, key: Tensor, value: Any) -> None:
        for member in self._members.values():
            if any(key is parameter for group in member.param_groups for parameter in group["params"]):
                member.state[key] = value
                return
        raise KeyError(key)

    def __delitem__(self, key: Tensor) -> None:
        for member in self._members.values():
            if key in member.state:
                del member.state[key]
                return
        raise KeyError(key)

    def __iter__(self) -> Iterator[Tensor]:
        for member in self._members.values():
            yield from (key for key in member.state if isinstance(key, Tensor))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SchedulerSet:
    """Schedulers of several optimizers, as one with a `state_dict` that has theirs by name."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        self.members = dict(members)

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state[name])


def optimizers_by_name(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Return the members of a set by name; a single optimizer under ""."""
    return optimizer.members if isinstance(optimizer, OptimizerSet) else {"": optimizer}


def schedulers_by_name(scheduler: Any) -> dict[str, Any]:
    """Return the members of a set by name; a single scheduler under ""."""
    return scheduler.members if isinstance(scheduler, SchedulerSet) else {"": scheduler}


def type_of(optimizer: Any) -> str:
    """Return the name of an optimizer's or a scheduler's class, of a set those of its members."""
    if isinstance(optimizer, OptimizerSet | SchedulerSet):
        return " + ".join(type(member).__name__ for member in optimizer.members.values())
    return type(optimizer).__name__


def joined_optimizer(given: Any) -> Optimizer | None:
    """Return what was given as one optimizer.

    Raises:
        TypeError: it isn't made of optimizers.
        ValueError: two of them have one parameter.
    """
    if given is None or isinstance(given, Optimizer):
        return given
    members = _named(given, "optimizer", "torch.optim.Optimizer")
    for name, member in members.items():
        if not isinstance(member, Optimizer):
            kind = type(member).__name__
            raise TypeError(f"optimizer[{name}] must be a torch.optim.Optimizer; got {kind}")
    owner: dict[int, str] = {}
    for name, member in members.items():
        for parameter in (p for group in member.param_groups for p in group["params"]):
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"optimizers {owner[id(parameter)]} and {name} both have a parameter of shape "
                    f"{list(parameter.shape)}; give each parameter to one"
                )
    return next(iter(members.values())) if len(members) == 1 else OptimizerSet(members)


def joined_scheduler(given: Any) -> LRScheduler | None:
    """Return what was given as one scheduler; raises TypeError if it isn't made of schedulers."""
    if given is None or not isinstance(given, Sequence | Mapping):
        return cast("LRScheduler | None", given)
    members = _named(given, "lr_scheduler", "scheduler")
    for name, member in members.items():
        if not all(callable(getattr(member, method, None)) for method in ("state_dict", "load_state_dict")):
            kind = type(member).__name__
            raise TypeError(f"lr_scheduler[{name}] is a {kind}, which has no state_dict and load_state_dict")
    one = next(iter(members.values())) if len(members) == 1 else SchedulerSet(members)
    return cast(LRScheduler, one)


def _named(given: Any, argument: str, kind: str) -> dict[str, Any]:
    """Return several objects by their names, or by their places."""
    if isinstance(given, Mapping):
        members = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        members = {str(i): member for i, member in enumerate(given)}
    else:
        members = {}
    if not members or not all(isinstance(name, str) and name for name in members):
        got = f"{type(given).__name__} {given!r}"
        raise TypeError(f"{argument} must be a {kind}, a list of them, or a dict of them by name; got {got}")
    return members
