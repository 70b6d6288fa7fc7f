"""Values of a resume of which torch's classes and ours say what they are; a script's own may be anything."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from uni3d.checkpoint.several import SchedulerSet, optimizers_by_name

_OF_CALLABLES = {"lr_lambdas", "_scale_fn_custom"}
"""Entries of a scheduler's state that are those of the script's functions."""


def known_values(optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the hyperparameters of each group that only another value of the same kind can replace.

    Keys that a script adds to a group aren't among them, nor those that may be None.
    """
    keys = [_keys(member) for member in optimizers_by_name(optimizer).values() for _ in member.param_groups]
    return [
        {key: value for key, value in group.items() if key in known}
        for group, known in zip(groups, keys, strict=True)
    ]


def known_state(scheduler: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a scheduler's state that only values of the same kinds can replace."""
    if isinstance(scheduler, SchedulerSet):
        return {name: known_state(member, state[name]) for name, member in scheduler.members.items()}
    if not all(_is_known(one) for one in (scheduler, *getattr(scheduler, "_schedulers", ()))):
        return {}
    known: dict[str, Any] = _without_callables(state)
    return known


def like_state(saved: Any, here: Any) -> Any:
    """Return a scheduler's state with the numbers as tensors, or the reverse, as they are here.

    A learning rate may have become a tensor, or a number again.
    """
    if isinstance(here, Mapping) and isinstance(saved, dict):
        return {key: like_state(value, here.get(key)) for key, value in saved.items()}
    if isinstance(here, list) and isinstance(saved, list) and len(here) == len(saved):
        return [like_state(value, mine) for value, mine in zip(saved, here, strict=True)]
    if isinstance(here, float) and isinstance(saved, Tensor) and saved.ndim == 0:
        return saved.item()
    if isinstance(here, Tensor) and here.ndim == 0 and isinstance(saved, float):
        return torch.full_like(here, saved)
    return saved


def _keys(optimizer: Optimizer) -> set[str]:
    if not _is_known(optimizer):
        return set()
    given = inspect.signature(type(optimizer)).parameters
    return {key for key in optimizer.defaults if key in given and not _may_be_none(given[key].default)}


def _may_be_none(default: Any) -> bool:
    return default is None or (isinstance(default, tuple) and None in default)


def _is_known(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] in ("torch", "uni3d")


def _without_callables(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _without_callables(value) for key, value in state.items() if key not in _OF_CALLABLES}
    return [_without_callables(item) for item in state] if isinstance(state, list) else state
