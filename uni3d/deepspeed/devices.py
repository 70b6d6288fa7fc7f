"""`deepspeed.accelerator`: the device that this process computes on, by DeepSpeed's names."""

from __future__ import annotations

import os
import resource
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


class CPUAccelerator:
    """The CPU. What needs a device's own memory or streams tells of the host's, or does nothing."""

    _name = "cpu"

    def device_name(self, device_index: int | None = None) -> str:
        return self._name

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        return nullcontext()

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one."""

    def current_device(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def current_device_name(self) -> str:
        return self._name

    def device_count(self) -> int:
        """Return how many processes this host may run, as the launcher says; 1 without one."""
        return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)

    def is_available(self) -> bool:
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: operations have ended when they return."""

    def is_synchronized_device(self) -> bool:
        return True

    def communication_backend_name(self) -> str:
        return "gloo"

    def is_bf16_supported(self) -> bool:
        return True

    def is_fp16_supported(self) -> bool:
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    def is_triton_supported(self) -> bool:
        return False

    # --- random numbers ------------------------------------------------------------------------------

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.manual_seed(seed)

    def initial_seed(self) -> int:
        return torch.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        torch.set_rng_state(new_state)

    def default_generator(self, device_index: int = 0) -> torch.Generator:
        return torch.default_generator

    # --- memory, in bytes ----------------------------------------------------------------------------

    def empty_cache(self) -> None:
        """Do nothing: the host's allocator keeps no cache of its own."""

    def memory_allocated(self, device_index: int | None = None) -> int:
        """Return the memory of this process."""
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        """Return the most memory that this process had since it began."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(peak, self.memory_allocated())  # the system's own count lags behind

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        """Do nothing: the system counts from the beginning of the process."""

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        current, peak = self.memory_allocated(), self.max_memory_allocated()
        return {"allocated_bytes.all.current": current, "allocated_bytes.all.peak": peak}

    def total_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def available_memory(self, device_index: int | None = None) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    memory_reserved = memory_cached = memory_allocated
    max_memory_reserved = max_memory_cached = max_memory_allocated
    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    # --- streams, tensors, ranges --------------------------------------------------------------------

    Stream = Event = None

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def current_stream(self, device_index: int | None = None) -> Any:
        return None

    default_stream = current_stream

    def range_push(self, msg: str, *_: Any, **__: Any) -> None:
        """Do nothing: NVTX ranges are of GPUs."""

    def range_pop(self, *_: Any) -> None:
        """Do nothing."""

    def lazy_call(self, callback: Any) -> Any:
        return callback()

    def pin_memory(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._name


class CUDAAccelerator(CPUAccelerator):
    """The GPUs of this process, by `torch.cuda`."""

    _name = "cuda"
    Stream, Event = torch.cuda.Stream, torch.cuda.Event  # type: ignore[assignment]

    def device_name(self, device_index: int | None = None) -> str:
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> AbstractContextManager[Any]:
        return torch.cuda.device(device_index)

    def set_device(self, device_index: int) -> None:
        torch.cuda.set_device(device_index)

    def current_device(self) -> int:
        return torch.cuda.current_device()

    def current_device_name(self) -> str:
        return f"cuda:{torch.cuda.current_device()}"

    def device_count(self) -> int:
        return torch.cuda.device_count()

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def synchronize(self, device_index: int | None = None) -> None:
        torch.cuda.synchronize(device_index)

    def is_synchronized_device(self) -> bool:
        return False

    def communication_backend_name(self) -> str:
        return "nccl"

    def is_bf16_supported(self) -> bool:
        return bool(torch.cuda.is_bf16_supported())

    def is_triton_supported(self) -> bool:
        return bool(torch.cuda.get_device_capability()[0] >= 8)

    def random(self) -> Any:
        return torch.random

    def manual_seed(self, seed: int) -> Any:
        return torch.cuda.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> Any:
        return torch.cuda.manual_seed_all(seed)

    def initial_seed(self) -> int:
        return torch.cuda.initial_seed()

    def get_rng_state(self, device_index: int | None = None) -> Tensor:
        return torch.cuda.get_rng_state(self._index(device_index))

    def set_rng_state(self, new_state: Tensor, device_index: int | None = None) -> None:
        torch.cuda.set_rng_state(new_state, self._index(device_index))

    def default_generator(self, device_index: int = 0) -> torch.Generator:
        return torch.cuda.default_generators[device_index]

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_allocated(device_index)

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_allocated(device_index)

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.cuda.reset_peak_memory_stats(device_index)

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        return torch.cuda.memory_stats(device_index)

    def total_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[1]

    def available_memory(self, device_index: int | None = None) -> int:
        return torch.cuda.mem_get_info(device_index)[0]

    def memory_reserved(self, device_index: int | None = None) -> int:
        return torch.cuda.memory_reserved(device_index)

    def max_memory_reserved(self, device_index: int | None = None) -> int:
        return torch.cuda.max_memory_reserved(device_index)

    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved
    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def stream(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Any:
        return torch.cuda.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        return torch.cuda.default_stream(device_index)

    def range_push(self, msg: str, *_: Any, **__: Any) -> None:
        torch.cuda.nvtx.range_push(msg)  # type: ignore[no-untyped-call]

    def range_pop(self, *_: Any) -> None:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    def pin_memory(self, tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor.pin_memory()

    def _index(self, device_index: int | None) -> int:
        return torch.cuda.current_device() if device_index is None else device_index


@cache
def get_accelerator() -> CPUAccelerator:
    """Return the GPUs if there are any, else the CPU."""
    return CUDAAccelerator() if torch.cuda.is_available() else CPUAccelerator()


def is_current_accelerator_supported() -> bool:
    """Return True: CPUs and CUDA's GPUs are the devices that there are."""
    return True
