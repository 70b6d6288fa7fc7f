"""The joint between `parallel` and `ckpt`: a model and an optimizer as named shards, and back.

Each tensor's part on this rank is read off the tensor (`parallel.layout`) and handed to `ckpt` as numpy
memory with a box. Scalars of the optimizer (its step counts) and the hyperparameters of its groups travel
in the manifest, by parameter name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from ckpt import ArrayKey, Box, CheckpointError, Shard, ShardSpec
from parallel import ParallelModel
from parallel.layout import local_part

PARAMETER, BUFFER = "fp32", "value"
"""States under which an atom keeps a parameter's and a buffer's own value."""

_HOW_NOT_WHAT = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a parameter group that say how a step is computed, not what it computes."""


class Held(NamedTuple):
    """One array of which this rank holds a part: what `ckpt` sees, and the tensor behind it."""

    shard: Shard
    tensor: Tensor
    """This rank's part, the live memory; `shard.data` is that memory itself, or a copy on the host."""
    saves: bool
    """False for copies that another rank or stage speaks for: loaded here, but never saved from here."""


def held_arrays(
    model: ParallelModel, optimizer: torch.optim.Optimizer | None, with_states: Collection[str] | None = None
) -> list[Held]:
    """Every parameter, buffer and optimizer state of which this rank has a part, the live tensors.

    `with_states` names the parameters whose optimizer states are wanted; None is all.
    """
    model.zero.reshard()
    arrays = []
    for name, parameter in model.module.named_parameters():
        first, saves = model.first_name(name), name not in model.tied.copies
        arrays.append(_held(first, PARAMETER, parameter, saves))
        wanted = optimizer if with_states is None or first in with_states else None
        state = {} if wanted is None else wanted.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim > 0:
                if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
                    raise CheckpointError(
                        f"the optimizer's {key!r} of {name} is a plain tensor, which doesn't say "
                        "what part of the whole it is; use one whose states are made by zeros_like(parameter)"
                    )
                arrays.append(_held(first, key, value, saves))
    speaks = model.topology.dp_rank == 0 and model.topology.tp_rank == 0  # replicas may differ, so one speaks
    arrays.extend(_held(name, BUFFER, buffer, speaks) for name, buffer in _persistent_buffers(model.module))
    return arrays


def finish_load(arrays: list[Held]) -> None:
    """Carry what was loaded into host copies over to the tensors behind them."""
    for array in arrays:
        loaded = torch.from_numpy(array.shard.data)
        if loaded.data_ptr() != array.tensor.data_ptr():
            array.tensor.copy_(loaded)


def create_states(model: ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer that has taken no step yet create its states, so that they can be loaded into."""
    get_optimizer_state_dict(model.module, optimizer)  # torch has it take a step with no gradients, no rate


def forget_states(model: ParallelModel, optimizer: torch.optim.Optimizer, *, but: Collection[str]) -> None:
    """Drop the states of all parameters but those named, as if these had never had a gradient."""
    for name, parameter in model.module.named_parameters():
        if model.first_name(name) not in but:
            optimizer.state.pop(parameter, None)


def describe(model: ParallelModel, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What the manifest says of this rank's part of the model and the optimizer (see `docs/format.md`)."""
    names = {id(p): model.first_name(n) for n, p in model.module.named_parameters()}
    parameters = {
        model.first_name(n): {"requires_grad": p.requires_grad} for n, p in model.module.named_parameters()
    }
    buffers = [name for name, _ in _persistent_buffers(model.module)]
    description: dict[str, Any] = {"model": {"parameters": parameters, "buffers": buffers}, "optimizer": None}
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
    names = {id(p): model.first_name(n) for n, p in model.module.named_parameters()}
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
            moves = key == "lr" and "initial_lr" in group  # a schedule's doing, not a given value
            if value != group[key] and not moves:
                changed.append(f"group {i}'s {key} is the checkpoint's {value}, not this run's {group[key]}")
            group[key] = value
    for name, parameter in model.module.named_parameters():
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


def _held(name: str, state: str, tensor: Tensor, saves: bool) -> Held:
    part = local_part(tensor)
    data = part.data.cpu().contiguous().numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    spec = ShardSpec(ArrayKey(name, state), dtype, part.shape, Box(part.offset, tuple(part.data.shape)))
    return Held(Shard(spec, data), part.data, saves)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def _group(group: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    values: dict[str, Any] = {"params": [names[id(p)] for p in group["params"]]}
    for key, value in group.items():
        if key in _HOW_NOT_WHAT:
            continue
        if isinstance(value, Tensor):
            value = value.item()
        values[key] = list(value) if isinstance(value, tuple) else value
    return values


def _like(current: Any, saved: Any) -> Any:
    """A saved value in the form in which the optimizer keeps it."""
    if isinstance(current, Tensor):
        return torch.full_like(current, saved)
    return tuple(saved) if isinstance(current, tuple) else saved


def _scalars(name: str, state: dict[str, Any]) -> dict[str, float]:
    """The states of a parameter that are single numbers.

    Raises:
        CheckpointError: one is neither a tensor nor a number, so it can't be stored.
    """
    scalars: dict[str, float] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if value.ndim == 0:
                scalars[key] = value.item()
        elif isinstance(value, int | float):
            scalars[key] = value
        else:
            raise CheckpointError(
                f"the optimizer's {key!r} of {name} is a {type(value).__name__}, not a number"
            )
    return scalars
