"""Asynchronous saves: copies of the tensors, from which a thread writes while training goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ckpt.threads import cores

ALIGNMENT = 64
"""Alignment of each copy in bytes: a cache line."""
PIECE = 1 << 30
"""Most bytes of a piece of memory, but for a larger tensor. torch rounds a pinned one up to a power of two,
and keeps it when it is freed, for the next of its size (`CachingHostAllocator`)."""


def threads_per_rank(ranks: int) -> int:
    """Return how many threads a rank may use for files. Without torchrun, all `ranks` share this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


Kind = tuple[torch.Size, torch.dtype]
"""Shape and type of a tensor."""


class Snapshot:
    """Host memory for copies of tensors, allocated again only if their sizes change."""

    def __init__(self, device: torch.device) -> None:
        """Copy tensors of `device`; those of a GPU into pinned memory."""
        self._device = device
        self._layout: list[Kind] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()  # else each copy of a parameter would be added to a graph that only grows
    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return contiguous copies in host memory, valid until the next call."""
        layout = [(t.shape, t.dtype) for t in tensors]
        if layout != self._layout:
            self._copies, self._layout = [], []  # free the old memory before the new is allocated
            for piece in _pieces(layout):
                sizes = [_room(shape, dtype) for shape, dtype in piece]
                memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
                for (shape, dtype), part in zip(piece, torch.split(memory, sizes), strict=True):
                    self._copies.append(part[: shape.numel() * dtype.itemsize].view(dtype).view(shape))
            self._layout = layout
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return self._copies


def _pieces(layout: Sequence[Kind]) -> list[list[Kind]]:
    """Return the tensors that share a piece of memory."""
    pieces: list[list[Kind]] = [[]]
    filled = 0
    for kind in layout:
        size = _room(*kind)
        if pieces[-1] and filled + size > PIECE:
            pieces.append([])
            filled = 0
        pieces[-1].append(kind)
        filled += size
    return pieces


def _room(shape: torch.Size, dtype: torch.dtype) -> int:
    """Return the bytes that a copy takes up."""
    return -(-shape.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
