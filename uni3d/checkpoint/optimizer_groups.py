"""The model's and the optimizer's part of the manifest, written and restored.

The hyperparameters of groups and the optimizer's scalars (step counts) are stored by parameter name.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ckpt import Checkpoint, CheckpointError
from ckpt.read import WEIGHT_STATES
from parallel.tensors import named_parameters, persistent_buffers
from uni3d.checkpoint.extra_state import ExtraStates
from uni3d.checkpoint.known_kinds import known_values
from uni3d.checkpoint.several import OptimizerSet, type_of
from uni3d.json_section import other_kinds
from uni3d.manifest import ModelRecord, OptimizerRecord
from uni3d.resume_rules import IMPLEMENTATION_KEYS, GivenOptimizer
from uni3d.stored_model import StoredModel


def describe(
    model: StoredModel,
    optimizer: torch.optim.Optimizer | None,
    declared: dict[str, Any],
    extra: ExtraStates,
    *,
    frozen: bool,
    flat: Mapping[int, Mapping[str, Any]],
) -> tuple[ModelRecord, OptimizerRecord | None]:
    """Return the manifest's records of this rank's part of the model and the optimizer.

    `declared` is the model's own description. With `frozen=False`, parameters that don't require a gradient
    are left out. `flat` has the states of flat parameters, by their ids.
    """
    here = {model.first_name(n): p.requires_grad for n, p in named_parameters(model.module)}
    requires_grad = {name: trains for name, trains in here.items() if frozen or trains}
    model_record = ModelRecord(
        requires_grad=requires_grad,
        buffers=[model.first_name(name) for name, _ in persistent_buffers(model.module)],
        left_out=None if frozen else [name for name in here if name not in requires_grad],
        declared=declared,
        extra_state={name: state.record() for name, state in (extra.modules | extra.objects).items()},
    )
    if optimizer is None:
        return model_record, None
    names = names_by_id(model)
    states = {id(p): state for p, state in optimizer.state.items()} | {**flat}
    return model_record, OptimizerRecord(
        type=type_of(optimizer),
        members=_members(optimizer),
        groups=[_group(group, names) for group in optimizer.param_groups],
        scalars=scalars_of({names[i]: state for i, state in states.items() if i in names}),
        extra_state=None if extra.optimizer is None else extra.optimizer.record(),
    )


def given_optimizer(
    model: StoredModel, optimizer: torch.optim.Optimizer, saved: OptimizerRecord | None
) -> GivenOptimizer:
    """Return the description of this rank's optimizer, to compare with the saved one."""
    names = names_by_id(model)
    groups = [_group(group, names) for group in optimizer.param_groups]
    there = [] if saved is None else saved.groups
    for group, given, values in zip(optimizer.param_groups, groups, there, strict=False):
        for key, value in group.items():
            # A tensor hyperparameter has rounded the value; it is equal if the saved one rounds to the same.
            if isinstance(value, Tensor) and key in values and value == _like(value, values[key]):
                given[key] = values[key]
    return GivenOptimizer(
        type=type_of(optimizer),
        members=_members(optimizer),
        groups=groups,
        known=known_values(optimizer, groups),
    )


def restore_optimizer(model: StoredModel, optimizer: torch.optim.Optimizer, saved: OptimizerRecord) -> None:
    """Restore the groups' hyperparameters and the states' scalars.

    Raises:
        CheckpointError: a parameter's scalars have other names than the saved ones.
    """
    for group, values in zip(optimizer.param_groups, saved.groups, strict=True):
        for key in values.keys() & group.keys() - IMPLEMENTATION_KEYS:
            group[key] = _like(group[key], values[key])
    for name, parameter in named_parameters(model.module):
        state = optimizer.state.get(parameter, {})
        scalars = saved.scalars.get(model.first_name(name), {})
        here = {key for key, value in state.items() if not (isinstance(value, Tensor) and value.ndim)}
        if here != scalars.keys():
            raise CheckpointError(
                f"the optimizer has the scalars {sorted(here)} for {name}, but the checkpoint has "
                f"{sorted(scalars)}"
            )
        for key, scalar in scalars.items():
            if isinstance(state[key], Tensor):
                where = f"optimizer: scalars[{name!r}]: {key}"
                for problem in other_kinds(scalar, state[key].item(), where):
                    raise CheckpointError(problem)
            state[key] = _like(state[key], scalar)


def _members(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]] | None:
    """Return the manifest's record of each of several optimizers."""
    if not isinstance(optimizer, OptimizerSet):
        return None
    return [
        {"name": name, "type": type_of(member), "groups": len(member.param_groups)}
        for name, member in optimizer.members.items()
    ]


def check_states(
    model: StoredModel, optimizer: torch.optim.Optimizer, saved: OptimizerRecord, checkpoint: Checkpoint
) -> None:
    """Check that an optimizer of unknown class had the states of this one, which has all of its own.

    Raises:
        CheckpointError: a parameter has states of other names.
    """
    stored = {name: {*scalars} for name, scalars in saved.scalars.items()}
    for atom, state in checkpoint.arrays:
        if state not in WEIGHT_STATES:
            stored.setdefault(atom, set()).add(state)
    for name, parameter in named_parameters(model.module):
        there = stored.get(model.first_name(name))
        here = {*optimizer.state.get(parameter, {})}
        if there and here and there != here:
            raise CheckpointError(
                f"{checkpoint.url} doesn't record the class of its optimizer, whose states of {name} are "
                f"{', '.join(sorted(there))}; those of {type_of(optimizer)} are "
                f"{', '.join(sorted(here))}: give an optimizer of the class that was trained with"
            )


def names_by_id(model: StoredModel) -> dict[int, str]:
    """Return each parameter's name in the whole model, by its id."""
    return {id(p): model.first_name(n) for n, p in named_parameters(model.module)}


def _group(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    # Two stages on one rank may each have a copy of a tied parameter, under one name.
    for parameter in group["params"]:
        if id(parameter) not in names:
            raise CheckpointError(
                f"the optimizer has a parameter of shape {list(parameter.shape)} that isn't the model's: "
                "make the optimizer from the model's parameters, once it is wrapped and sharded"
            )
    values: dict[str, Any] = {"params": list(dict.fromkeys(names[id(p)] for p in group["params"]))}
    for key, value in group.items():
        if key in IMPLEMENTATION_KEYS:
            continue
        if isinstance(value, Tensor):
            value = value.item()
        # Copied: training may change a list or dict before it is written.
        values[key] = list(value) if isinstance(value, tuple) else copy.deepcopy(value)
    return values


def _like(current: Any, saved: Any) -> Any:
    """Convert a saved value to the optimizer's own type."""
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(current, tuple) else saved


def scalars_of(states: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the parameters' states that are single values; those on a device come in one transfer per type.

    Raises:
        CheckpointError: a state is neither a tensor nor a JSON value.
    """
    scalars: dict[str, dict[str, Any]] = {}
    tensors: dict[tuple[torch.dtype, torch.device], list[tuple[str, str, Tensor]]] = defaultdict(list)
    for name, state in states.items():
        mine = scalars[name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                if value.ndim == 0:
                    mine[key] = None  # keeps its place
                    here = _local(value, f"the optimizer's {key!r} of {name}")
                    tensors[here.dtype, here.device].append((name, key, here))
            elif value is None or isinstance(value, bool | int | float | str):
                mine[key] = value
            else:
                raise CheckpointError(
                    f"the optimizer's {key!r} of {name} is a {type(value).__name__}; a state is a tensor, a "
                    "number, a string, a boolean or None"
                )
    for found in tensors.values():
        together = torch.stack([tensor for _, _, tensor in found]).tolist()
        for (name, key, _), value in zip(found, together, strict=True):
            scalars[name][key] = value
    return scalars


def _local(value: Tensor, what: str) -> Tensor:
    """Return a tensor of one element as it is on this rank, without a collective."""
    if isinstance(value, DTensor):
        if not all(placement.is_replicate() for placement in value.placements):
            raise CheckpointError(f"{what} is a partial sum on each rank; reduce it before saving")
        return value.to_local()
    return value
