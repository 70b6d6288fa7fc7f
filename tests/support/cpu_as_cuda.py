"""A CPU that passes for a CUDA device: the engine's own code for GPUs runs, and its numbers are real.

A tensor on `cuda:0` wraps one on the CPU, which does its work. What the host would wait for on a GPU is
written down. It works in processes that were started with `LD_PRELOAD` set to the library of `compiled`.

It has no streams, so a value that is read before it is there is right here; and no memory of its own, so a
storage that is resized stays as it is.
"""

import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICE = torch.device("cuda:0")
waits: list[str] = []
"""Where the host waited for the device: the operation, and the functions that asked for it."""
moved: list[int] = []
"""Bytes of each tensor that was copied to the device."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
"""Operations whose result the host waits for."""
MIXED = ("copy_", "_to_copy", "to", "index", "index_put_", "_index_put_impl_")
"""Operations that take tensors of the CPU and of a GPU at once."""
ALIKE = ("stack", "cat")
"""Operations that don't take a scalar of the CPU beside tensors of a GPU, as all others do."""


def compiled(folder: Path) -> Path | None:
    """Return the library to preload, made in `folder`; None without a compiler, or with a torch for GPUs."""
    home, library = Path(torch.__file__).parent, folder / "cpu_as_cuda.so"
    compiler, linked = shutil.which("g++"), home / "lib"
    if compiler is None or torch.backends.cuda.is_built():
        return None
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{home / 'include'}", str(SOURCE)]
    command += ["-o", str(library), f"-L{linked}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{linked}"]
    subprocess.run(command, check=True)
    return library


class OnGPU(Tensor):
    """A tensor of the device, whose elements are those of `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGPU":
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        waits.append(f"tolist in {_callers()}")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, types, args, kwargs or {})


class CPUAsCUDA(TorchDispatchMode):
    """Mode in which tensors on "cuda" can be made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, types, args, kwargs or {})


def _computed(func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation's result, computed on the CPU, as a tensor of the device if it is one."""
    if any(issubclass(kind, FakeTensor) for kind in types):
        return func(*args, **kwargs)  # a shape that torch tries out
    if any(kind not in (OnGPU, nn.Parameter, Tensor) for kind in types):
        return NotImplemented  # a DTensor computes on its local tensors
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnGPU)]
    devices = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
    asked = devices[0].type if devices else None
    plain = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if not here and asked != "cuda":
        return func(*args, **plain)
    name = func.__name__.partition(".")[0]
    _check_devices(func, name, tensors, here)
    if _is_copy(name, args, here, asked) and isinstance(args[0], OnGPU) == (name == "copy_"):
        moved.append(args[0].nbytes)
    if name in WAITING or _is_blocking_copy(name, args, kwargs, here, asked):
        waits.append(f"{name} in {_callers()}")
    inner_args, inner_kwargs = tree_map(_inner, (args, plain))
    result = func(*inner_args, **inner_kwargs)
    if asked == "cpu":
        return result
    if name == "copy_":
        return args[0]
    known = {id(x.inner): x for x in here}  # a collective returns the tensors that it has filled
    result = tree_map(lambda x: known[id(x)] if id(x) in known else _wrapped(x), result)
    if not here or func.namespace != "aten":
        return result
    return return_and_correct_aliasing(func, args, kwargs, result)


def _inner(x: Any) -> Any:
    return torch.device("cpu") if isinstance(x, torch.device) else x.inner if isinstance(x, OnGPU) else x


def _wrapped(x: Any) -> Any:
    return OnGPU(x) if isinstance(x, Tensor) else x


def _check_devices(func: Any, name: str, tensors: list[Tensor], here: list[OnGPU]) -> None:
    """Raise as CUDA does if tensors of both devices meet."""
    strange = [x for x in tensors if not isinstance(x, OnGPU) and (x.ndim > 0 or name in ALIKE)]
    if here and strange and name not in MIXED:
        raise RuntimeError(f"{func}: expected all tensors on one device, got {DEVICE} and cpu")


def _is_blocking_copy(
    name: str, args: Any, kwargs: dict[str, Any], here: list[OnGPU], asked: str | None
) -> bool:
    in_place = args[2:3] if name == "copy_" else ()
    return _is_copy(name, args, here, asked) and not (in_place or (kwargs.get("non_blocking", False),))[0]


def _is_copy(name: str, args: Any, here: list[OnGPU], asked: str | None) -> bool:
    """Return whether an operation copies from one device to the other."""
    if name == "copy_":
        return isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU)
    return name in ("_to_copy", "to") and asked is not None and (asked == "cuda") != bool(here)


def _callers() -> str:
    frames = [f for f in traceback.extract_stack() if "/parallel/" in f.filename or "/uni3d/" in f.filename]
    ours = [f for f in frames if "/tests/" not in f.filename and "site-packages" not in f.filename]
    return " < ".join(f"{Path(f.filename).stem}.{f.name}" for f in reversed(ours[-3:]))


class Stream:
    """The device's only stream."""

    device, stream_id = DEVICE, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Event:
    """A place in the stream, which is always reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)

    def wait(self, stream: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits.append(f"Event.synchronize in {_callers()}")


def _synchronize(device: Any = None) -> None:
    waits.append(f"synchronize in {_callers()}")


def _empty(size: Any, *, dtype: Any = None, **_: Any) -> OnGPU:
    return OnGPU(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> OnGPU:
    return OnGPU(torch.empty_strided(size, stride, dtype=dtype))


def _copy_into(target: OnGPU, source: Tensor, non_blocking: bool = False) -> OnGPU:
    target.inner.copy_(source.inner if isinstance(source, OnGPU) else source)
    return target


def _on_cpu(kind: Any, _device: Any = "cpu") -> Any:
    return kind("cpu")


@contextmanager
def cpu_as_cuda() -> Iterator[None]:
    """Let `cuda:0` be there."""
    stream = Stream()
    stubs: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: "a CPU",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *args: True,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": lambda seed: None,  # the CPU's are seeded by the same calls
        "manual_seed_all": lambda seed: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "synchronize": _synchronize,
    }
    with ExitStack() as stack:
        for name, stub in stubs.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        for name, function in {"pin_memory": lambda x, *args: x, "is_pinned": lambda x, *args: True}.items():
            stack.enter_context(mock.patch.object(Tensor, name, function))
        for name in ("alloc_storage", "free_storage"):
            stack.enter_context(mock.patch.object(_fsdp_param, name))
        stack.enter_context(mock.patch.object(torch.accelerator, "synchronize", _synchronize))
        stack.enter_context(mock.patch.object(torch, "Generator", partial(_on_cpu, torch.Generator)))
        kernels = Library("aten", "IMPL")  # also in backward passes, which a thread without the mode runs
        kernels.impl("empty.memory_format", _empty, "CUDA")
        kernels.impl("empty_strided", _empty_strided, "CUDA")
        kernels.impl("copy_", _copy_into, "CUDA")
        stack.callback(kernels._destroy)
        lifts_on_cpu = torch._C._only_lift_cpu_tensors()
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifts_on_cpu)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made, then copied
        stack.enter_context(CPUAsCUDA())
        yield
