"""Values of a model's parameters and buffers, on their way into the parts that the ranks keep.

A model is always split on the meta device, where it takes no memory. One that has values gives them up before
and gets them back after, one parameter at a time: a device holds its parts and at most one whole parameter,
and a model in bf16 is never in fp32 as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.dtensor_layout import copy_from_full, local_tensor

LOW = (torch.bfloat16, torch.float16)
"""Types of which fp32 masters are made."""


class BuiltValues:
    """Values of a model that each rank built on its own; rank 0's count."""

    def __init__(self, model: nn.Module) -> None:
        """Take the values out of the model; its parameters are on the meta device then, and never 16-bit."""
        first_rank = dist.get_rank() == 0
        self._values: dict[str, Tensor] = {}
        self._kinds: list[tuple[str, torch.Size, torch.dtype]] = []
        empty: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            self._kinds.append((name, parameter.shape, parameter.dtype))
            if first_rank:
                self._values[name] = parameter.detach()
            dtype = torch.float32 if parameter.dtype in LOW else parameter.dtype
            without = torch.empty(parameter.shape, dtype=dtype, device="meta")
            empty[id(parameter)] = nn.Parameter(without, requires_grad=parameter.requires_grad)
        for module in model.modules():
            for key, there in list(module._parameters.items()):
                if there is not None and id(there) in empty:  # else a module with the same dict was here
                    setattr(module, key, empty[id(there)])  # RNNs have a `__setattr__` that must know

    @torch.no_grad()
    def hand_out(self, module: nn.Module, first_names: Mapping[str, str], device: torch.device) -> None:
        """Copy rank 0's values into the parts that this rank has, and forget them. Collective.

        `first_names` maps the other names of tied parameters. Values are sent between CPUs, or between the
        `device`s if the process group doesn't connect CPUs.
        """
        here: dict[str, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            here.setdefault(first_names.get(name, name), []).append(parameter)
        device = _where_ranks_meet(device)
        largest = max((math.prod(shape) * dtype.itemsize for _, shape, dtype in self._kinds), default=0)
        # One buffer for all: an allocator would keep some of the memory of many that come and go.
        scratch = torch.empty(0 if self._values else largest, dtype=torch.uint8, device=device)
        for name, shape, dtype in self._kinds:
            size = math.prod(shape) * dtype.itemsize
            value = self._values.pop(name) if self._values else scratch[:size].view(dtype).view(shape)
            whole = _from_first_rank(value, device)
            for part in here.get(name, ()):
                copy_from_full(part, whole)


@torch.no_grad()
def place_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers to `device`, with rank 0's values, and whatever else moves with a model. Collective."""
    meeting = _where_ranks_meet(device)
    for buffer in model.buffers():
        buffer.data.copy_(_from_first_rank(buffer.data, meeting))
    model._apply(  # type: ignore[no-untyped-call]
        lambda tensor: tensor if tensor.is_meta else tensor.to(device)
    )


@torch.no_grad()
def allocate(module: nn.Module, device: torch.device, *, nan: bool = False) -> None:
    """Give a sharded module's parameters on the meta device memory, for this rank's parts alone.

    Tensors that have memory keep it, with its content. With `nan`, the new memory is filled with NaN, so that
    a value that is never loaded ends the first step; otherwise it has any content.
    """
    on_meta = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    for name in on_meta if nan else ():
        local_tensor(module.get_parameter(name).detach()).fill_(math.nan)


def _where_ranks_meet(device: torch.device) -> torch.device:
    """Return the CPU if the process group connects CPUs, else `device`."""
    kinds = {kind.type for kind in dist.group.WORLD._device_types}  # type: ignore[union-attr]
    return torch.device("cpu") if "cpu" in kinds else device


def _from_first_rank(tensor: Tensor, device: torch.device) -> Tensor:
    """Return rank 0's content of a tensor, in the tensor's memory if that is contiguous and on `device`."""
    whole = tensor.to(device).contiguous()
    dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # as bytes: gloo doesn't support every type
    return whole
