"""A sharded module's tensors as wholes: given out one by one, or in a copy that can be written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.layout import copy_from_full
from parallel.tensors import named_parameters, persistent_buffers


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Collective over the ranks of a stage: parameters and persistent buffers, gathered one by one.

    Each tied parameter comes once, under its first name. The tensors are in the host's memory.
    """
    for name, tensor in [*named_parameters(module), *persistent_buffers(module)]:
        yield name, _whole(tensor)


@contextmanager
def whole_module(module: nn.Module) -> Iterator[nn.Module]:
    """Collective over the ranks of a stage: the module with whole plain parameters, in the host's memory.

    What has been written to them is in the sharded ones afterwards, each rank keeping its own part; the ranks
    must write the same. Buffers are the live ones. Hooks are left out, those of sharding with them. Takes the
    host's memory for all of the stage, on every rank.
    """
    sharded = [parameter for _, parameter in named_parameters(module)]
    wholes = [nn.Parameter(_whole(p).clone(), requires_grad=p.requires_grad) for p in sharded]
    yield _copy(module, {id(p): whole for p, whole in zip(sharded, wholes, strict=True)}, {})
    for parameter, whole in zip(sharded, wholes, strict=True):
        copy_from_full(parameter, whole.detach())


def _copy(module: nn.Module, parameters: dict[int, nn.Parameter], made: dict[int, nn.Module]) -> nn.Module:
    """A copy of the tree of modules, with other parameters."""
    if id(module) in made:
        return made[id(module)]
    kind: type[nn.Module] = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    copy: nn.Module = kind.__new__(kind)
    copy.__dict__ = {k: type(v)() if k.endswith("_hooks") else v for k, v in module.__dict__.items()}
    made[id(module)] = copy
    copy._parameters = {
        name: None if p is None else parameters[id(p)] for name, p in module._parameters.items()
    }
    copy._modules = {
        name: None if child is None else _copy(child, parameters, made)
        for name, child in module._modules.items()
    }
    return copy


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        here = cast(DTensor, tensor.to(tensor.device_mesh.device_type))  # it may be offloaded
        return here.full_tensor().detach().cpu()
    return tensor.detach().cpu()
