"""Activation checkpointing and compilation of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.settings import Compile, Recompute

aten = torch.ops.aten
KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.linear.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops._c10d_functional.all_reduce.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        torch.ops._c10d_functional.all_gather_into_tensor.default,
    }
)
"""Operations whose outputs selective recomputation keeps: computing or sending them again costs more."""


def change_forward(layers: Sequence[nn.Module], again: Recompute | None, compiled: Compile | None) -> None:
    """Apply activation checkpointing and compilation to the layers' `forward`, in place.

    Only `forward` is replaced, so modules keep their names. ZeRO's hooks are registered later and stay
    outside, so that a layer's parameters are gathered when it is recomputed.
    """
    for i, layer in enumerate(layers):
        forward: Callable[..., Any] = layer.forward
        if again is not None and i % again.every == 0:
            forward = partial(_recomputed, forward, again.mode == "selective")
        if compiled is not None:
            forward = partial(
                _with_waited, torch.compile(forward, backend=compiled.backend, **compiled.options)
            )
        if forward is not layer.forward:
            layer.forward = forward


def _with_waited(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled `forward` with the results of collectives that its arguments stand for.

    Tensor-parallel modules before it, such as an embedding, return such tensors. A compiled function would
    give them no gradient.
    """
    return forward(*_waited(args), **{name: _waited(value) for name, value in kwargs.items()})


def _waited(value: Any) -> Any:
    """Return tensors, in tuples too, waited for. Lists and dicts stay: a layer may write into them."""
    if isinstance(value, AsyncCollectiveTensor):
        return _Waited.apply(value)  # type: ignore[no-untyped-call]
    return tuple(map(_waited, value)) if type(value) is tuple else value


class _Waited(torch.autograd.Function):
    """Result of a collective under way, with the gradient passed on."""

    @staticmethod
    def forward(ctx: Any, pending: AsyncCollectiveTensor) -> Tensor:
        result: Tensor = pending.wait()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _recomputed(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
