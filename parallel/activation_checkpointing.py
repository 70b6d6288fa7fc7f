"""Activation checkpointing and compilation of a model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
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
            forward = torch.compile(forward, backend=compiled.backend, **compiled.options)
        if forward is not layer.forward:
            layer.forward = forward


def _recomputed(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    options: dict[str, Any] = {}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
