"""A sharded module's tensors as wholes: given out one by one, or put in their places for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.layout import copy_from_full
from parallel.names import named_parameters, persistent_buffers


def whole_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Collective over the ranks of a stage: parameters and persistent buffers, gathered one by one.

    Each tied parameter comes once, under its first name. The tensors are in the host's memory.
    """
    for name, tensor in [*named_parameters(module), *persistent_buffers(module)]:
        yield name, _whole(tensor)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Collective over the ranks of a stage: inside, parameters are whole plain tensors in the host's memory.

    What has been written to them is there afterwards, each rank keeping its own part; the ranks must write
    the same. Takes the host's memory for all of the stage, on every rank.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, name))
    sharded = [parameter for _, parameter in named_parameters(module)]
    wholes = [nn.Parameter(_whole(p).clone(), requires_grad=p.requires_grad) for p in sharded]
    _put(places, sharded, wholes)
    try:
        yield
    finally:
        _put(places, sharded, sharded)
    for parameter, full in zip(sharded, wholes, strict=True):
        copy_from_full(parameter, full.detach())


def _put(
    places: dict[int, list[tuple[nn.Module, str]]], sharded: list[nn.Parameter], new: list[nn.Parameter]
) -> None:
    for parameter, replacement in zip(sharded, new, strict=True):
        for owner, name in places[id(parameter)]:
            owner._parameters[name] = replacement


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        here = cast(DTensor, tensor.to(tensor.device_mesh.device_type))  # it may be offloaded
        return here.full_tensor().detach().cpu()
    return tensor.detach().cpu()
