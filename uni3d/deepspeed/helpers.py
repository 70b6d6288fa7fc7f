"""Small functions of `deepspeed.utils` and `deepspeed.runtime.utils`."""

from __future__ import annotations

import functools
import logging
import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor
from torch.utils._pytree import tree_map

from parallel.placement import balanced_cuts
from uni3d.deepspeed.devices import get_accelerator
from uni3d.deepspeed.engines import engine_of
from uni3d.deepspeed.log import logger

F = TypeVar("F", bound=Callable[..., Any])
noop_context = nullcontext
_orig_torch_arange = torch.arange


def required_torch_version(
    min_version: str | float | None = None, max_version: str | float | None = None
) -> bool:
    """Return whether torch is at least and at most of these versions."""
    if min_version is None and max_version is None:
        raise AssertionError("required_torch_version needs min_version or max_version")
    found = Version(torch.__version__)
    above = min_version is None or Version(str(min_version)) <= found
    return above and (max_version is None or found <= Version(str(max_version)))


class OnDevice:
    """Context in which tensors are made on a device, "meta" by default, and floating-point ones in a type."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "meta", enabled: bool = True) -> None:
        self._dtype, self._device, self._enabled = dtype, torch.device(device), enabled
        self._before: list[torch.dtype] = []

    def __enter__(self) -> None:
        if self._enabled:
            self._before.append(torch.get_default_dtype())
            torch.set_default_dtype(self._dtype)
            self._device.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._enabled:
            self._device.__exit__(*error)
            torch.set_default_dtype(self._before.pop())


def zero_wrapper_for_fp_tensor_constructor(function: F, *_: Any, **__: Any) -> F:
    """Return the function as it is: `zero.Init` doesn't change how tensors are made."""
    return function


def instrument_w_nvtx(function: F) -> F:
    """Return the function with an NVTX range of its name around each call; on the CPU as it is."""
    if not torch.cuda.is_available():
        return function

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.cuda.nvtx.range(getattr(function, "__qualname__", repr(function))):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def see_memory_usage(message: str, force: bool = False) -> None:
    """Log the memory in use on rank 0, if `force`."""
    if not force or (dist.is_initialized() and dist.get_rank() != 0):
        return
    device, gib = get_accelerator(), 2**30
    logger.log(
        max(logging.INFO, logger.getEffectiveLevel()),
        "%s: memory %.2f GiB, at most %.2f GiB; reserved %.2f GiB",
        message,
        device.memory_allocated() / gib,
        device.max_memory_allocated() / gib,
        device.memory_reserved() / gib,
    )


def memory_status(msg: str, print_rank: int = -1, reset_max: bool = False) -> None:
    """Log the memory in use, on one rank or, with -1, on all."""
    if print_rank in (-1, dist.get_rank() if dist.is_initialized() else 0):
        logger.warning("%s: memory %.2f GiB", msg, get_accelerator().memory_allocated() / 2**30)
    if reset_max:
        get_accelerator().reset_peak_memory_stats()


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> Tensor:
    """Clip the gradients of plain parameters, as torch does.

    Raises:
        ValueError: an engine trains them, so `gradient_clipping` in its config clips them; or an `mpu`.
    """
    if mpu is not None:
        raise ValueError(
            "clip_grad_norm_: an mpu isn't supported; the config's gradient_clipping sees all ranks"
        )
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(engine_of(parameter) is not None for parameter in given):
        raise ValueError(
            "clip_grad_norm_ got parameters of an engine, whose gradients are on all ranks; set "
            "gradient_clipping in the config: engine.step() clips by the global norm"
        )
    return torch.nn.utils.clip_grad_norm_(given, max_norm, norm_type)


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy if it is loaded, and torch."""
    random.seed(seed)
    torch.manual_seed(seed)
    import numpy as np

    np.random.seed(seed)


def move_to_device(item: Any, device: Any, criterion_func: Callable[[Tensor], bool] | None = None) -> Any:
    """Return nested containers with their tensors, or those that the function chooses, on a device."""
    chosen = criterion_func or (lambda tensor: True)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) and chosen(x) else x, item)


def ensure_directory_exists(filename: str) -> None:
    """Make the folder of a file."""
    os.makedirs(os.path.dirname(os.path.abspath(filename)), exist_ok=True)


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """Return the text of a call."""
    return f"{base}({', '.join([*map(repr, args), *(f'{key}={value!r}' for key, value in kwargs.items())])})"


# --- partitions ----------------------------------------------------------------------------------------


def prefix_sum_inc(weights: Sequence[float]) -> list[float]:
    """Return the sums of the first 1, 2, ... numbers."""
    return list(accumulate(weights))


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Return where each of the parts begins, and the end; parts differ by at most one item."""
    return [part * num_items // num_parts for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Return where each part begins, and the end, so that the heaviest part is as light as possible.

    With fewer items than parts, the last ones are empty.
    """
    runs = balanced_cuts(weights, min(num_parts, len(weights)))
    return [0, *(end for _, end in runs), *[len(weights)] * (num_parts - len(runs))]
