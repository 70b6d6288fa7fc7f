"""Losses that add up over micro batches and ranks, and logits split by vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._pytree import tree_map

from parallel.settings import Compile
from parallel.topology import Topology
from parallel.values import LOW

LossFn = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
"""`(outputs, targets)` of a micro batch -> (summed loss, number of terms), or the mean loss."""


class Loss(NamedTuple):
    """A loss as a sum and its number of terms, so that losses can be added before the division."""

    total: Tensor
    tokens: Tensor
    """Number of terms in `total`."""

    @classmethod
    def of(cls, value: Tensor | tuple[Tensor, Tensor]) -> Loss:
        """Wrap the result of a loss function. A single value is a mean, and counts as one term.

        Raises:
            ValueError: it is neither a value nor a sum and a count, for example a loss and logits.
        """
        if isinstance(value, tuple) and not _is_sum_and_count(value):
            raise ValueError(
                "expected a loss, or a tuple of its sum and its number of terms; got a tuple of "
                f"{', '.join(map(_described, value))}; return the loss alone, or an object with a .loss"
            )
        total, count = value if isinstance(value, tuple) else (value, torch.ones((), device=value.device))
        if isinstance(total, DTensor) and "shard" in (total.device_mesh.mesh_dim_names or ()):
            raise ValueError(
                "the loss was computed from sharded parameters (DTensors) outside of the forward pass; "
                "compute such a term from parameter.full_tensor(), or in the forward() of the layer that has "
                "the parameter"
            )
        if isinstance(total, DTensor):  # computed from logits that are split by vocabulary
            total = total.full_tensor()
        if isinstance(count, DTensor):
            count = count.full_tensor()
        return cls(total, torch.as_tensor(count, device=total.device))

    def lifted(self, factor: float) -> Tensor:
        """Return the total times a loss scale, in fp32, for the backward pass."""
        return self.total if factor == 1.0 else self.total.float() * factor

    @classmethod
    def sum(cls, losses: Sequence[Loss]) -> Loss:
        # 16 bits are too few: fp16 ends at 65,504, and bf16 counts to 256.
        return cls(
            torch.stack([loss.total.float() for loss in losses]).sum(),
            torch.stack([loss.tokens.double() for loss in losses]).sum(),
        )


def compiled(loss_fn: LossFn, how: Compile) -> LossFn:
    """Compile a loss function together with the cast of the model's outputs to fp32, which it takes.

    Fused, they read the outputs in the type of computation, so that logits in fp32 never exist as a whole.
    Not for logits that are split by vocabulary: with torch 2.13, inductor's code for `loss_parallel` gives
    wrong losses under sequence parallelism.
    """

    def of_low_precision(outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor]:
        return loss_fn(in_fp32(outputs), targets)

    options = {key: value for key, value in how.options.items() if key != "fullgraph"}  # that is for layers
    fused: LossFn = torch.compile(of_low_precision, backend=how.backend, **options)
    return fused


def in_fp32(outputs: Any) -> Any:
    """Return outputs with their tensors of a low precision in fp32."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype in LOW else x, outputs)


def split_logits(topology: Topology) -> AbstractContextManager[None]:
    """Let cross-entropy take logits that are split by vocabulary. Run forward and backward inside."""
    return loss_parallel() if topology.degrees.tp > 1 else nullcontext()


def _is_sum_and_count(value: tuple[Any, ...]) -> bool:
    if len(value) != 2 or not isinstance(value[0], Tensor) or value[0].numel() != 1:
        return False
    count = value[1]
    if isinstance(count, Tensor):
        return count.numel() == 1 and not count.requires_grad
    return isinstance(count, int | float)


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
