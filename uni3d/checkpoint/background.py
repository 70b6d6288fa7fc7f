"""Asynchronous saves: copies of the tensors, from which a thread writes while training goes on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ckpt.threads import cores

ALIGNMENT = 64
"""Alignment of each copy in bytes: a cache line."""


def threads_per_rank(ranks: int) -> int:
    """Return how many threads a rank may use for files. Without torchrun, all `ranks` share this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


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
