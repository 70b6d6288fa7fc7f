"""Sums of gradients over ranks, where fully_shard's own way of summing them does more work than is needed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fsdp_internals import give_gradient, take_gradients


class WholeSums:
    """Sums of gradients that every rank keeps whole: a layer at a time, behind the backward pass.

    A layer's gradients are copied into one tensor, which they stay in. They can't be summed where they are:
    the backward pass may still read that memory, and two parameters may share it. (fully_shard copies them
    three times.)
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        """Sum over `group`, in `dtype`."""
        self._group = group
        self._dtype = dtype
        self._works: list[dist.Work] = []
        self._sums: list[tuple[Any, Tensor]] = []

    def start(self, layer: Any) -> None:
        """Start to sum the gradients of a layer, fully_shard's group. Collective, the layers in one order."""
        taken = take_gradients(layer)
        if not taken:
            return
        gradients = [gradient for _, gradient in taken]
        sizes = [gradient.numel() for gradient in gradients]
        together = torch.empty(sum(sizes), dtype=self._dtype, device=gradients[0].device)
        parts = torch.split(together, sizes)
        wholes = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(wholes, gradients)
        self._sums += [(record, whole) for (record, _), whole in zip(taken, wholes, strict=True)]
        work = dist.all_reduce(together, group=self._group, async_op=True)
        assert work is not None, "this rank is in the group"
        self._works.append(work)

    def finish(self) -> None:
        """Wait for the sums, on a GPU without the host, and make them the reduced gradients."""
        for record, gradient in self._ended():
            give_gradient(record, gradient)

    def drop(self) -> None:
        """Forget sums that a backward pass has left which ended in an error."""
        self._ended()

    def _ended(self) -> list[tuple[Any, Tensor]]:
        sums, works = self._sums, self._works
        self._sums, self._works = [], []
        for work in works:
            work.wait()
        return sums


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
