"""Initial weights that don't depend on the topology.

Each parameter is drawn whole from a generator of its own, seeded by the run's seed and the parameter's
name, and each rank keeps the part that is its own. The draw is made on the CPU, so that it is the same
wherever the run is. At most one whole parameter is in memory at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import copy_from_full

InitParameter = Callable[[str, Tensor, torch.Generator], None]


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on nothing but `seed` and `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def is_meta(module: nn.Module) -> bool:
    """Whether the module was built on the meta device. Half and half is an error.

    Raises:
        ValueError: some parameters are on the meta device and some aren't.
    """
    kinds = {p.is_meta for p in module.parameters()}
    if len(kinds) > 1:
        raise ValueError("some parameters are on the meta device and some are not; build the model on one")
    return kinds == {True}


def check_can_materialise(model: nn.Module) -> InitParameter:
    """The model's `init_parameter(name, tensor, generator)`, which a model on the meta device must have.

    Raises:
        ValueError: it has none, or it has buffers, whose content can't be known.
    """
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise ValueError(
            f"the model is on the meta device and has buffers ({', '.join(buffers[:4])}), whose content "
            "would be lost; build it on the CPU"
        )
    init: InitParameter | None = getattr(model, "init_parameter", None)
    if init is None:
        raise ValueError(
            f"the model is on the meta device, but {type(model).__name__} has no "
            "init_parameter(name, tensor, generator); add it, or build the model on the CPU"
        )
    return init


@torch.no_grad()
def materialise(
    module: nn.Module,
    init_parameter: InitParameter,
    *,
    seed: int,
    device: torch.device,
    first_names: Mapping[str, str],
) -> None:
    """Give a sharded module on the meta device its memory (this rank's parts alone) and initial values.

    `first_names` maps the other names of tied parameters to the ones that they are seeded by.
    """
    module.to_empty(device=device)
    # One piece of memory for all draws: of pieces taken and given back for each, an allocator keeps some.
    largest = max((p.numel() * p.element_size() for p in module.parameters()), default=0)
    scratch = torch.empty(largest, dtype=torch.uint8)
    for name, parameter in module.named_parameters():
        first = first_names.get(name, name)
        size = parameter.numel() * parameter.element_size()
        full = scratch[:size].view(parameter.dtype).view(parameter.shape)
        init_parameter(first, full, generator_for(seed, first))
        copy_from_full(parameter, full)


@torch.no_grad()
def broadcast_from_first_rank(module: nn.Module) -> None:
    """Collective: give every rank rank 0's values, for a model that each rank built on its own."""
    for tensor in [*module.parameters(), *module.buffers()]:
        whole = tensor.data.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # as bytes: gloo doesn't know every type
        tensor.data.copy_(whole)
