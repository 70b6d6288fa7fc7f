"""A copy of what a save will write, so that training can go on while it is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Of each copy in the memory: a cache line."""


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
