"""Asynchronous saves: a thread that writes copies of the tensors while training goes on."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ckpt.threads import cores

T = TypeVar("T")

ALIGNMENT = 64
"""Alignment of each copy in bytes: a cache line."""


def threads_per_rank(ranks: int) -> int:
    """Return how many threads a rank may use for files. Without torchrun, all `ranks` share this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


_all: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


class Background(Generic[T]):
    """A thread for work that must finish: the interpreter waits for it, and its error isn't lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self.result: T | None = None
        """Result of the work, once it has finished and until `wait` returns it."""
        self._error: BaseException | None = None
        _all.add(self)
        atexit.register(self._at_exit)

    @property
    def failed(self) -> bool:
        """True if the work has failed and `wait` hasn't raised its error yet."""
        return self._error is not None

    def start(self, work: Callable[[], T]) -> None:
        """Start the work. Earlier work must have been waited for."""
        assert self._thread is None, "one at a time"

        def run() -> None:
            try:
                self.result = work()
            except BaseException as error:
                self._error = error

        # Not a daemon, so that the interpreter waits for it at exit.
        thread = threading.Thread(target=run, name=self._name, daemon=False)
        try:
            thread.start()
        except RuntimeError as error:  # out of threads; `wait` raises it like an error of the work
            self._error = error
        else:
            self._thread = thread

    def wait(self) -> T | None:
        """Wait for the work; return its result, or None if there was none. Raises its error, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, error, self.result, self._error = self.result, self._error, None, None
        if error is not None:
            raise error
        return result

    @staticmethod
    def join_all() -> None:
        """Wait for the work of all instances in this process; each keeps its error for its own `wait`."""
        for background in list(_all):
            if background._thread is not None:
                background._thread.join()

    def _at_exit(self) -> None:
        """Exit with 1 if an error was never raised: a process whose checkpoint failed must not succeed."""
        if self._error is not None:
            print(f"{self._name} failed: {self._error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)


class Snapshot:
    """Host memory for copies of tensors, allocated again only if their sizes change."""

    def __init__(self, device: torch.device) -> None:
        """Copy tensors of `device`; those of a GPU into pinned memory."""
        self._device = device
        self._layout: list[tuple[torch.Size, torch.dtype]] = []
        self._copies: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return contiguous copies in host memory, valid until the next call."""
        layout = [(t.shape, t.dtype) for t in tensors]
        if layout != self._layout:
            self._copies, self._layout = [], []  # free the old memory before the new is allocated
            sizes = [-(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in layout]
            memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            for (shape, dtype), part in zip(layout, torch.split(memory, sizes), strict=True):
                self._copies.append(part[: shape.numel() * dtype.itemsize].view(dtype).view(shape))
            self._layout = layout
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return self._copies
