"""Loads into a GPU's memory, through a bounded amount of pinned host memory."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import ckpt
from ckpt.load import Target
from uni3d.state import Held, on_host, to_torch

BUFFER_BYTES = 4 << 20
"""Bytes of a buffer, as many as of a whole chunk of a checkpoint (`ckpt.chunking.CHUNK_BYTES`)."""
MOST_BYTES = 128 << 20
"""Most bytes of pinned memory, however many threads read."""


def targets_of(arrays: Sequence[Held], device: torch.device) -> list[Target]:
    """Return what a load fills: memory of `device`, or the host's, in a copy if that isn't contiguous.

    Raises:
        ckpt.CheckpointError: a tensor is on the meta device.
    """
    memory = PinnedMemory(device)
    if any(array.tensor.device.type not in ("cpu", "meta") for array in arrays):
        torch.accelerator.synchronize()  # what is still to be written, on whatever stream, comes first
    return [_target(array, memory) for array in arrays]


def _target(array: Held, memory: PinnedMemory) -> Target:
    if array.tensor.is_meta:
        raise ckpt.CheckpointError(
            f"{'/'.join(array.spec.key)} is on the meta device, so that nothing can be loaded into it; give "
            "it memory first (Module.to_empty)"
        )
    if array.tensor.device.type != "cpu":
        return ckpt.UnfilledShard(array.spec, DeviceArray(array.tensor, memory))
    return on_host(array.spec, array.tensor.contiguous())


class PinnedMemory:
    """Buffers for threads that copy, allocated when they are first needed."""

    def __init__(self, device: torch.device) -> None:
        """Copy to `device`; only memory for CUDA can be pinned."""
        self._pin = device.type == "cuda"
        # The last that was given back is lent first: no more are allocated than threads copy at once.
        self._free: queue.LifoQueue[npt.NDArray[np.uint8] | None] = queue.LifoQueue()
        for _ in range(max(1, MOST_BYTES // BUFFER_BYTES)):
            self._free.put(None)

    @contextmanager
    def buffer(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Lend a buffer of `BUFFER_BYTES`; wait for one if all are lent."""
        lent = self._free.get()
        try:
            if lent is None:
                lent = torch.empty(
                    BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=self._pin
                ).numpy()
            yield lent
        finally:
            self._free.put(lent)


class DeviceArray:
    """A tensor of a GPU that a load fills part by part; see `ckpt.shards.Unfilled`."""

    def __init__(self, tensor: Tensor, memory: PinnedMemory) -> None:
        """Fill `tensor`, of any strides."""
        self._tensor = tensor.detach()
        self._memory = memory

    def __setitem__(self, part: tuple[slice, ...] | EllipsisType, values: npt.NDArray[Any], /) -> None:
        """Copy `values` into a part, and wait until they are there."""
        _copy(self._tensor[part], values, self._memory)


def _copy(target: Tensor, values: npt.NDArray[Any], memory: PinnedMemory) -> None:
    """Copy values of any strides and size."""
    if values.nbytes > BUFFER_BYTES:
        dim = int(np.argmax(values.shape))
        middle = values.shape[dim] // 2
        for here, there in zip(
            np.split(values, [middle], dim), target.tensor_split([middle], dim), strict=True
        ):
            _copy(there, here, memory)
        return
    with memory.buffer() as buffer:
        staged = buffer[: values.nbytes].view(values.dtype).reshape(values.shape)
        np.copyto(staged, values)
        target.copy_(to_torch(staged))  # waits for the copy, so that the buffer can be lent again
