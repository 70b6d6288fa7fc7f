"""Initial weights that don't depend on the topology, and fp32 masters of low-precision parameters.

What a parameter is drawn from depends on the run's seed and the parameter's name alone. The draw is made on
the CPU, so that it is the same on every device. A rank draws the part that it keeps, in tiles. A parameter
that can't be drawn in tiles is drawn whole, one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallel.dtensor_layout import copy_from_full, local_part
from parallel.initial_weights import draw
from parallel.recorded_init import InitParameter, record
from parallel.values import LOW, allocate


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


def check_buffers(model: nn.Module) -> None:
    """Check that no buffer is on the meta device, where it has no content.

    Raises:
        ValueError: some are; names them.
    """
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if buffers:
        raise ValueError(
            f"the model has buffers on the meta device ({', '.join(buffers[:4])}), whose content would be "
            "lost; build it inside `with uni3d.meta_parameters():`, which gives buffers their values, or on "
            "the CPU"
        )


def check_can_materialise(model: nn.Module) -> InitParameter:
    """Return the `init_parameter(name, tensor, generator)` that a model on the meta device must have.

    Raises:
        ValueError: it has none.
    """
    init: InitParameter | None = getattr(model, "init_parameter", None)
    if init is None:
        raise ValueError(
            f"the model is on the meta device, but {type(model).__name__} has no "
            "init_parameter(name, tensor, generator); add it, give initialize its weights (weights=FILE, or "
            "resume=RUN of a run that has a checkpoint), or build the model on the CPU"
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
    allocate(module, device)
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
def make_masters(model: nn.Module) -> list[str]:
    """Check the parameters' types; return the names of bf16 and fp16 ones, which get fp32 masters.

    The optimizer always updates fp32 parameters, whatever type the model computes in. Those on the meta
    device become fp32 here, and contiguous, as sharding requires; 16-bit buffers of a model with 16-bit
    parameters become fp32. Other parameters are converted one by one in `build`, on their way to the ranks.

    Raises:
        ValueError: a parameter has another type; names it.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.dtype in LOW:
            changed.append(name)
            if parameter.is_meta:
                parameter.data = parameter.data.float()
        elif parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}; parameters must be torch.float32, torch.bfloat16 or "
                "torch.float16" + ("; call model.float()" if parameter.dtype == torch.float64 else "")
            )
        if parameter.is_meta and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    if changed:
        for buffer in model.buffers():
            if buffer.dtype in LOW:
                buffer.data = buffer.data.float()
    return changed
