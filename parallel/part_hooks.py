"""Layers gathered also when their parts are called without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from parallel.fsdp_internals import group_of, parameters_of


def gather_for_parts(modules: Sequence[FSDPModule]) -> None:
    """Gather the parameters of sharded `modules`, the first of which is the root, for their parts too.

    A root's methods other than `forward` call its parts, as in CLIP; a parent may call a layer's parts.
    """
    for module in modules:
        group = group_of(module)
        owners = {record._module_info.module for record in parameters_of(module)}
        for part in _parts(cast(nn.Module, module)):
            if not isinstance(part, FSDPModule) and not owners.isdisjoint(part.modules()):
                hook = _PartHook(group, stays=module is modules[0])
                hook.handle = part.register_forward_pre_hook(hook)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module's children, and those of containers in their place."""
    for child in module.children():
        if type(child).forward is nn.Module.forward:
            yield from _parts(child)
        else:
            yield child


class _PartHook:
    """Gathers a group before the forward pass of one of its parts, if it isn't whole.

    A layer whose parts find it whole is called by its parent, so it takes its hook off, unless it `stays`.
    Not in a compiled forward pass: that would break the graph, and dynamo, which doesn't guard hooks, would
    keep the pieces for all later steps.
    """

    handle: RemovableHandle

    def __init__(self, group: Any, *, stays: bool) -> None:
        self._group, self._stays = group, stays

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        if not self._group.is_unsharded:
            self._group.unshard()
            self._group.wait_for_unshard()
            self._stays = True
        elif not self._stays and not torch.compiler.is_compiling():
            self.handle.remove()
