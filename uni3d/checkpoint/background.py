"""Threads beside training: a save writes a copy of the tensors while training goes on."""

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
"""Bytes to which each copy is aligned: a cache line."""


def threads_per_rank(ranks: int) -> int:
    """Return how many threads a rank may use for files; `ranks` share the machine if torchrun doesn't say."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


_all: weakref.WeakSet[Background[Any]] = weakref.WeakSet()


class Background(Generic[T]):
    """A thread for work that must end: the interpreter waits for it at exit, and a failure isn't lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None
        _all.add(self)
        atexit.register(self._at_exit)

    @property
    def failed(self) -> bool:
        """Whether the work has failed and `wait` hasn't said so yet."""
        return self._error is not None

    @property
    def result(self) -> T | None:
        """What the work returned, if it has ended and `wait` hasn't given it yet."""
        return self._result

    def start(self, work: Callable[[], T]) -> None:
        """Begin; there must be no other work that hasn't been waited for."""
        assert self._thread is None, "one at a time"

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:
                self._error = error

        # Not a daemon: the interpreter doesn't end before it.
        thread = threading.Thread(target=run, name=self._name, daemon=False)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more; told like an error of the work
            self._error = error
        else:
            self._thread = thread

    def wait(self) -> T | None:
        """What the work returned, when it has; None where there was none. Raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, error, self._result, self._error = self._result, self._error, None, None
        if error is not None:
            raise error
        return result

    @staticmethod
    def join_all() -> None:
        """Wait for the work of every other such thread of this process; what they raise stays with them."""
        for background in list(_all):
            if background._thread is not None:
                background._thread.join()

    def _at_exit(self) -> None:
        """Nobody asked after the last work: a process whose checkpoint failed must not look successful."""
        if self._error is not None:
            print(f"{self._name} failed: {self._error}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)


class Snapshot:
    """Host memory for copies of tensors; allocated once, and again only for other sizes."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where the tensors lie; the copies of a GPU's are in pinned memory."""
        self._device = device
        self._layout: list[tuple[torch.Size, torch.dtype]] = []
        self._copies: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies, in the host's memory and contiguous; valid until the next call."""
        layout = [(t.shape, t.dtype) for t in tensors]
        if layout != self._layout:
            self._allocate(layout)
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return self._copies

    def _allocate(self, layout: list[tuple[torch.Size, torch.dtype]]) -> None:
        self._copies, self._layout = [], []  # the old memory goes before the new one comes
        sizes = [-(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape, dtype in layout]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for (shape, dtype), part in zip(layout, torch.split(memory, sizes), strict=True):
            self._copies.append(part[: shape.numel() * dtype.itemsize].view(dtype).view(shape))
        self._layout = layout
