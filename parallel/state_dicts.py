"""`state_dict` and `load_state_dict` of a sharded module, with whole plain tensors as in the unsharded model.

Parameters that the modules show whole are given as they are, so one rank may ask for them alone. Sharded ones
are gathered, which all ranks must ask for together. With `keep_vars=True` all are the live parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.dtensor_layout import copy_from_full
from parallel.fsdp_internals import sharded_of
from parallel.topology import Topology

PATIENCE = timedelta(minutes=5)
"""Longest wait for the other ranks to ask for sharded parameters too."""


def set_state_dict_hooks(module: nn.Module, topology: Topology) -> None:
    """Make `module`, this rank's part of a model, give and take whole plain tensors."""
    if topology.degrees.pp > 1:
        module.register_state_dict_pre_hook(_refuse_part)  # type: ignore[no-untyped-call]
        return
    module.register_state_dict_pre_hook(partial(_wait_for_others, topology, iter(range(1 << 62)).__next__))  # type: ignore[no-untyped-call]
    for part in module.modules():
        if part._parameters:
            part.register_state_dict_post_hook(_gather)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_distribute)  # type: ignore[no-untyped-call]


def _refuse_part(_module: nn.Module, _prefix: str, keep_vars: bool) -> None:
    if keep_vars:
        return
    raise RuntimeError(
        "state_dict() of a pipeline's module can't give the whole model, as a rank has only its own stages; "
        "use engine.module_state_dict() for these, or save a checkpoint and export it"
    )


def _wait_for_others(
    topology: Topology, next_number: Callable[[], int], module: nn.Module, _prefix: str, keep_vars: bool
) -> None:
    """Wait until all ranks ask for the parameters, if that takes all of them.

    Raises:
        RuntimeError: some don't.
    """
    if keep_vars or topology.world_size == 1 or not any(isinstance(p, DTensor) for p in module.parameters()):
        return
    store, key = dist.distributed_c10d._get_default_store(), f"uni3d/state_dict/{next_number()}"
    asked, deadline = store.add(key, 1), time.monotonic() + PATIENCE.total_seconds()
    while asked < topology.world_size:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"state_dict() gathers sharded parameters from all ranks, but only {asked} of "
                f"{topology.world_size} called it within {PATIENCE.total_seconds():g} s; call it on all "
                "ranks (at ZeRO 0 to 2 without tensor parallelism one rank may call it alone)"
            )
        time.sleep(0.01)
        asked = store.add(key, 0)


@torch.no_grad()
def _gather(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Replace a module's own sharded tensors in a `state_dict` by whole ones."""
    for name in module._parameters:
        value = state_dict.get(prefix + name)
        if isinstance(value, DTensor) and not isinstance(value, nn.Parameter):
            here = cast(DTensor, value.to(value.device_mesh.device_type))  # it may be offloaded
            state_dict[prefix + name] = here.full_tensor().to(value.device)


@torch.no_grad()
def _distribute(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Replace whole tensors for a module's own sharded parameters by this rank's parts of them.

    A master that is shown in a lower precision takes its values from here; the shown one takes them later.
    """
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        if parameter is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue  # torch reports it
        if isinstance(value, DTensor):
            continue
        master = sharded_of(parameter)
        if master.dtype != parameter.dtype:
            copy_from_full(master, value.to(master.device))
        if isinstance(parameter, DTensor):
            part = torch.empty_like(parameter)
            copy_from_full(part, value.to(parameter.device))
            state_dict[prefix + name] = part
