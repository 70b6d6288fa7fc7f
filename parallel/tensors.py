"""A module's tensors by name, as they are sharded or gathered to whole tensors.

Names and order are those of torch's `named_parameters()` and `named_buffers()`, which take milliseconds. This
takes tenths of one, since a checkpoint asks while training waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.dtensor_layout import copy_from_full
from parallel.fsdp_internals import sharded_of, showers


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters, each once, under its first name; the sharded ones, whatever the modules show."""
    seen: set[int] = set()
    found = []
    for prefix, owner in modules(module):
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((prefix + name, sharded_of(parameter)))
    return found


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the buffers in the module's `state_dict`, a shared one under each of its names."""
    return [
        (prefix + name, buffer)
        for prefix, owner in modules(module, once=False)
        for name, buffer in owner._buffers.items()
        if buffer is not None and name not in owner._non_persistent_buffers_set
    ]


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers, gathered one by one into host memory.

    Collective over the ranks of a stage. A tied parameter comes once, under its first name.
    """
    for name, tensor in [*named_parameters(module), *persistent_buffers(module)]:
        yield name, _whole(tensor)


@contextmanager
def whole_module(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of the module with whole plain parameters in host memory, and write them back at the end.

    Collective over the ranks of a stage, which must write the same values; each keeps its own part of them.
    Buffers are the live ones. The copy has no hooks, so none of sharding's either. Every rank needs host
    memory for the whole stage.
    """
    sharded = [parameter for _, parameter in named_parameters(module)]
    wholes = [nn.Parameter(_whole(p).clone(), requires_grad=p.requires_grad) for p in sharded]
    yield _copy(module, {id(p): whole for p, whole in zip(sharded, wholes, strict=True)}, {})
    for parameter, whole in zip(sharded, wholes, strict=True):
        copy_from_full(parameter, whole.detach())


class Parts(nn.Module):
    """Holder of a rank's modules, which adds nothing to their names."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        for i, part in enumerate(parts):
            self.add_module(str(i), part)


WRAPPERS = (DistributedDataParallel, Parts)
"""Modules whose children have the names of parameters for themselves."""

WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names under which `torch.compile`, activation checkpointing and FSDP1 keep a module that they wrap."""


@contextmanager
def sharded_shown(module: nn.Module) -> Iterator[bool]:
    """Show the sharded parameters of `module` inside, to be read and written; yield if it has any.

    Collective. Whole ones that a script sees between two steps are gathered and shown again at the end.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.reshard()
    try:
        yield bool(parts)
    finally:
        for show in showers(parts):
            show()


def modules(module: nn.Module, *, once: bool = True) -> list[tuple[str, nn.Module]]:
    """Return `(prefix of its tensors' names, module)`, parents before children.

    With `once`, a module that is there several times comes under its first name alone. Names leave out
    wrappers' segments.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    stack = [("", module)]
    while stack:
        prefix, owner = stack.pop()
        if once and id(owner) in seen:
            continue
        seen.add(id(owner))
        found.append((prefix, owner))
        wraps = isinstance(owner, WRAPPERS)
        children = [
            (prefix if wraps or name in WRAPPED else f"{prefix}{name}.", child)
            for name, child in owner._modules.items()
            if child is not None
        ]
        stack.extend(reversed(children))
    return found


def _copy(module: nn.Module, parameters: dict[int, nn.Parameter], made: dict[int, nn.Module]) -> nn.Module:
    """Copy the tree of modules, replacing parameters."""
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
