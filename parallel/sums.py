"""Sums of gradients over ranks, where fully_shard's own way of summing them does more work than is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fsdp_internals import give_gradient, take_gradients

SMALL = 1 << 15
"""Elements from which on a gradient is summed by itself. Smaller ones share a collective."""


class WholeSums:
    """Sums of gradients that every rank keeps whole, in their own memory and behind the backward pass.

    fully_shard would copy them into one tensor for each layer, and that into a second one.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        """Sum over `group`, in `dtype`."""
        self._group = group
        self._dtype = dtype
        self._works: list[dist.Work] = []
        self._sums: list[tuple[Any, Tensor]] = []

    def start(self, layer: Any) -> None:
        """Start to sum the gradients of a layer, fully_shard's group. Collective, the layers in one order."""
        small = []
        for record, gradient in take_gradients(layer):
            summed = gradient.to(self._dtype).contiguous()  # a copy only if it must be one
            if summed.numel() < SMALL:
                small.append((record, summed))
            else:
                self._sum(summed)
                self._sums.append((record, summed))
        if small:
            together = torch.cat([gradient.flatten() for _, gradient in small])
            self._sum(together)
            parts = torch.split(together, [gradient.numel() for _, gradient in small])
            pairs = zip(small, parts, strict=True)
            self._sums += [(record, part.view(gradient.shape)) for (record, gradient), part in pairs]

    def _sum(self, tensor: Tensor) -> None:
        work = dist.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        self._works.append(work)

    def finish(self) -> None:
        """Wait for the sums, on a GPU without the host, and make them the reduced gradients."""
        for work in self._works:
            work.wait()
        for record, gradient in self._sums:
            give_gradient(record, gradient)
        self._works, self._sums = [], []


class ExchangedSums:
    """Reduce-scatter as an exchange of parts that each rank then sums, for gloo.

    gloo's own sums the whole input on every rank and keeps a part: it sends twice the bytes, and takes twice
    the time (`benchmarks/RESULTS.md`). For `FSDPModule.set_custom_reduce_scatter`.
    """

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sum `input_tensor (k n)` over the k ranks of `group`; the i-th part `(n)` is rank i's output."""
        assert op == dist.ReduceOp.SUM, op
        assert not async_op, "the sum follows the exchange"
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), 0, out=output_tensor)
