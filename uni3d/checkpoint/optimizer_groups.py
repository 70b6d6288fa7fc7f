"""A model and an optimizer beside their arrays: described for the manifest, and restored from it.

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
from uni3d.manifest import ModelRecord, OptimizerRecord
from uni3d.resume_rules import HOW_NOT_WHAT, GivenOptimizer


def describe(
    model: ParallelModel, optimizer: torch.optim.Optimizer | None, declared: dict[str, Any], *, frozen: bool
) -> tuple[ModelRecord, OptimizerRecord | None]:
    """Return the manifest's account of this rank's part of the model and the optimizer.

    `declared` is the model's own description. Without `frozen`, parameters that don't require a gradient
    are left out.
    """
    here = {model.first_name(n): p.requires_grad for n, p in named_parameters(model.module)}
    requires_grad = {name: trains for name, trains in here.items() if frozen or trains}
    about_model = ModelRecord(
        requires_grad=requires_grad,
        buffers=[name for name, _ in persistent_buffers(model.module)],
        left_out=None if frozen else [name for name in here if name not in requires_grad],
        declared=declared,
    )
    if optimizer is None:
        return about_model, None
    names = _names(model)
    return about_model, OptimizerRecord(
        type=type(optimizer).__name__,
        groups=[_group(group, names) for group in optimizer.param_groups],
        scalars={names[id(p)]: _scalars(names[id(p)], s) for p, s in optimizer.state.items()},
    )


def given_optimizer(
    model: ParallelModel, optimizer: torch.optim.Optimizer, saved: OptimizerRecord | None
) -> GivenOptimizer:
    """Describe this rank's part of an optimizer, to be compared with the saved one."""
    names = _names(model)
    groups = [_group(group, names) for group in optimizer.param_groups]
    for group, given, values in zip(
        optimizer.param_groups, groups, [] if saved is None else saved.groups, strict=False
    ):
        for key, value in group.items():
            # A tensor rounds: it is the saved value if that one would be rounded to it.
            if isinstance(value, Tensor) and key in values and value == _like(value, values[key]):
                given[key] = values[key]
    return GivenOptimizer(type=type(optimizer).__name__, groups=groups)


def restore_optimizer(model: ParallelModel, optimizer: torch.optim.Optimizer, saved: OptimizerRecord) -> None:
    """Set the groups' hyperparameters and the states' scalars to the saved ones.

    Raises:
        CheckpointError: a parameter has other scalars than the saved ones.
    """
    for group, values in zip(optimizer.param_groups, saved.groups, strict=True):
        for key in values.keys() & group.keys() - HOW_NOT_WHAT:
            group[key] = _like(group[key], values[key])
    for name, parameter in named_parameters(model.module):
        state = optimizer.state.get(parameter, {})
        scalars = saved.scalars.get(model.first_name(name), {})
        here = {key for key, value in state.items() if not (isinstance(value, Tensor) and value.ndim)}
        if here != scalars.keys():
            raise CheckpointError(
                f"the optimizer's numbers for {name} are {sorted(here)}, "
                f"but {sorted(scalars)} in the checkpoint"
            )
        for key, number in scalars.items():
            state[key] = _like(state[key], number)


def _names(model: ParallelModel) -> dict[int, str]:
    """Return the name of each parameter in the unsplit model, by its id."""
    return {id(p): model.first_name(n) for n, p in named_parameters(model.module)}


def _group(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    # Two stages on one rank may each have a copy of a tied parameter: one name.
    values: dict[str, Any] = {"params": list(dict.fromkeys(names[id(p)] for p in group["params"]))}
    for key, value in group.items():
        if key in HOW_NOT_WHAT:
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
