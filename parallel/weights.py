"""Initial weights that don't depend on the topology, and fp32 masters of low-precision parameters.

What a parameter is drawn from depends on the run's seed and the parameter's name alone. The draw is made on
the CPU, so that it is the same on every device. A rank draws the part that it keeps, in tiles. A parameter
that can't be drawn in tiles is drawn whole, one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.dtensor_layout import copy_from_full, local_part
from parallel.initial_weights import draw
from parallel.recorded_init import InitParameter, record

LOW = (torch.bfloat16, torch.float16)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on nothing but `seed` and `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def is_meta(module: nn.Module) -> bool:
    """Return whether the module was built on the meta device.

    Raises:
        ValueError: some parameters are on the meta device and some aren't.
    """
    kinds = {p.is_meta for p in module.parameters()}
    if len(kinds) > 1:
        raise ValueError("some parameters are on the meta device and some are not; build the model on one")
    return kinds == {True}


def check_can_materialise(model: nn.Module) -> InitParameter:
    """Return the `init_parameter(name, tensor, generator)` that a model on the meta device must have.

    Raises:
        ValueError: it has none, or it has buffers, whose content isn't known.
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
    """Allocate a sharded module on the meta device (this rank's parts alone) and fill in initial values.

    `first_names` maps the other names of tied parameters to the names that seed them. `init_parameter` fills
    a whole tensor in place. It may be called twice for a name, the first time with a tensor without memory.
    """
    module.to_empty(device=device)
    largest = max((p.numel() * p.element_size() for p in module.parameters()), default=0)
    scratch: Tensor | None = None
    for name, parameter in module.named_parameters():
        first = first_names.get(name, name)
        shape, dtype = tuple(parameter.shape), parameter.dtype
        operations = record(init_parameter, first, shape, dtype, generator_for(seed, first))
        if operations is not None:
            draw(local_part(parameter), operations, seed, first)
            continue
        if scratch is None:
            # One buffer for all draws: an allocator would keep some of the memory of many that come and go.
            scratch = torch.empty(largest, dtype=torch.uint8, device="cpu")
        size = parameter.numel() * parameter.element_size()
        full = scratch[:size].view(dtype).view(shape)
        _draw_whole(init_parameter, full, seed, first)
        copy_from_full(parameter, full)


def _draw_whole(init_parameter: InitParameter, full: Tensor, seed: int, name: str) -> None:
    """Fill a whole parameter; what is drawn from torch's own generator depends on seed and name too."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator_for(seed, f"{name} without a generator").initial_seed())
        init_parameter(name, full, generator_for(seed, name))


@torch.no_grad()
def broadcast_from_first_rank(module: nn.Module) -> None:
    """Copy rank 0's values to every rank, for a model that each rank built on its own. Collective."""
    for tensor in [*module.parameters(), *module.buffers()]:
        whole = tensor.data.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=0)  # as bytes: gloo doesn't support every type
        tensor.data.copy_(whole)


@torch.no_grad()
def make_masters(model: nn.Module) -> list[str]:
    """Convert bf16 and fp16 parameters, and then buffers, to fp32 in place; return the parameters' names.

    The optimizer always updates fp32 parameters, whatever type the model computes in. Parameters also become
    contiguous, as sharding requires. They stay the same objects, so an optimizer over them stays valid.

    Raises:
        ValueError: a parameter has another type; names it.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.dtype in LOW:
            parameter.data = parameter.data.float()
            changed.append(name)
        elif parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}; parameters must be torch.float32, torch.bfloat16 or "
                "torch.float16" + ("; call model.float()" if parameter.dtype == torch.float64 else "")
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    if changed:
        for buffer in model.buffers():
            if buffer.dtype in LOW:
                buffer.data = buffer.data.float()
    return changed
