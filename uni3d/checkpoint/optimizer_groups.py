"""What the manifest says of a model and an optimizer beside their arrays, and back.

Scalars of the optimizer (its step counts) and the hyperparameters of its groups travel by parameter name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ckpt import CheckpointError
from parallel import ParallelModel
from parallel.tensors import named_parameters, persistent_buffers

_HOW_NOT_WHAT = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that say how a step is computed, not what it computes."""


def describe(
    model: ParallelModel, optimizer: torch.optim.Optimizer | None, *, frozen: bool = True
) -> dict[str, Any]:
    """What the manifest says of this rank's part of the model and the optimizer (see `docs/format.md`).

    Without `frozen`, it doesn't speak of parameters that don't require a gradient.
    """
    names = {id(p): model.first_name(n) for n, p in named_parameters(model.module)}
    parameters = {
        model.first_name(n): {"requires_grad": p.requires_grad}
        for n, p in named_parameters(model.module)
        if frozen or p.requires_grad
    }
    buffers = [name for name, _ in persistent_buffers(model.module)]
    description: dict[str, Any] = {"model": {"parameters": parameters, "buffers": buffers}, "optimizer": None}
    if not frozen:
        here = (model.first_name(name) for name, _ in named_parameters(model.module))
        description["model"]["left_out"] = [name for name in here if name not in parameters]
    if optimizer is not None:
        description["optimizer"] = {
            "type": type(optimizer).__name__,
            "groups": [_group(group, names) for group in optimizer.param_groups],
            "scalars": {names[id(p)]: _scalars(names[id(p)], s) for p, s in optimizer.state.items()},
        }
    return description


def merge(descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    """One description of the whole from those of its stages.

    Raises:
        CheckpointError: a parameter group has different hyperparameters on two stages.
    """
    whole = descriptions[0]
    for other in descriptions[1:]:
        whole["model"]["parameters"] |= other["model"]["parameters"]
        whole["model"]["buffers"] += other["model"]["buffers"]
        if left_out := other["model"].get("left_out"):
            whole["model"]["left_out"] += [n for n in left_out if n not in whole["model"]["left_out"]]
        if whole["optimizer"] is None:
            continue
        whole["optimizer"]["scalars"] |= other["optimizer"]["scalars"]
        for i, (mine, theirs) in enumerate(
            zip(whole["optimizer"]["groups"], other["optimizer"]["groups"], strict=True)
        ):
            if mine | {"params": []} != theirs | {"params": []}:
                raise CheckpointError(
                    f"parameter group {i} has different hyperparameters on two pipeline stages"
                )
            mine["params"] += [n for n in theirs["params"] if n not in mine["params"]]
    return whole


def check_optimizer(
    model: ParallelModel, optimizer: torch.optim.Optimizer, saved: dict[str, Any] | None
) -> None:
    """Check that the saved optimizer's parameter groups are those of `optimizer`.

    Raises:
        CheckpointError: there is none, it is of another type, or a parameter is in another group.
    """
    if saved is None:
        raise CheckpointError("the checkpoint has no optimizer; load it with load_optimizer_states=False")
    mine = type(optimizer).__name__
    if saved["type"] != mine:
        raise CheckpointError(f"the checkpoint's optimizer is {saved['type']}, but this run's is {mine}")
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(saved['groups'])} parameter groups, "
            f"but this run's has {len(optimizer.param_groups)}"
        )
    home = {name: i for i, group in enumerate(saved["groups"]) for name in group["params"]}
    names = {id(p): model.first_name(n) for n, p in named_parameters(model.module)}
    for i, group in enumerate(optimizer.param_groups):
        for name in (names[id(p)] for p in group["params"]):
            if home.get(name) != i:
                raise CheckpointError(
                    f"{name} is in parameter group {i}, but in {home.get(name, 'none')} of the checkpoint"
                )


def restore_optimizer(
    model: ParallelModel, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> list[str]:
    """Set the groups' hyperparameters and the states' scalars to the saved ones.

    Returns a line for each hyperparameter that this run was given another value of.
    """
    changed = []
    for i, (group, values) in enumerate(zip(optimizer.param_groups, saved["groups"], strict=True)):
        for key in sorted(values.keys() & group.keys() - _HOW_NOT_WHAT):
            value = _like(group[key], values[key])
            moves = f"initial_{key}" in group  # a schedule's doing, not a given value
            if value != group[key] and not moves:
                changed.append(f"group {i}'s {key} is the checkpoint's {value}, not this run's {group[key]}")
            group[key] = value
        for key in sorted(values.keys() - group.keys() - _HOW_NOT_WHAT):
            changed.append(f"group {i}'s {key} ({values[key]}) in the checkpoint has no place here")
    for name, parameter in named_parameters(model.module):
        state = optimizer.state.get(parameter, {})
        scalars = saved["scalars"].get(model.first_name(name), {})
        here = {key for key, value in state.items() if not (isinstance(value, Tensor) and value.ndim)}
        if here != scalars.keys():
            raise CheckpointError(
                f"the optimizer's numbers for {name} are {sorted(here)}, "
                f"but {sorted(scalars)} in the checkpoint"
            )
        for key, number in scalars.items():
            state[key] = _like(state[key], number)
    return changed


def _group(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    # Two stages on one rank may each have a copy of a tied parameter: one name.
    values: dict[str, Any] = {"params": list(dict.fromkeys(names[id(p)] for p in group["params"]))}
    for key, value in group.items():
        if key in _HOW_NOT_WHAT:
            continue
        if isinstance(value, Tensor):
            value = value.item()
        # Copied, as training may change what is in it before it is written.
        values[key] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
    return values


def _like(current: Any, saved: Any) -> Any:
    """A saved value in the form in which the optimizer keeps it."""
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(current, tuple) else saved


def _scalars(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """The states of a parameter that are single values.

    Raises:
        CheckpointError: one is neither a tensor nor a JSON value, so it can't be stored.
    """
    scalars: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.ndim == 0:
                scalars[key] = _item(value, f"the optimizer's {key!r} of {name}")
        elif value is None or isinstance(value, bool | int | float | str):
            scalars[key] = value
        else:
            raise CheckpointError(
                f"the optimizer's {key!r} of {name} is a {type(value).__name__}; a state is a tensor, a "
                "number, a string, a boolean or None"
            )
    return scalars


def _item(value: Tensor, what: str) -> Any:
    """The value of a tensor of one element, without asking other ranks."""
    if isinstance(value, DTensor):
        if not all(placement.is_replicate() for placement in value.placements):
            raise CheckpointError(f"{what} is one number of which each rank has a part; reduce it first")
        value = value.to_local()
    return value.item()
