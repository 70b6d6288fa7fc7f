"""Repeated layers: units of ZeRO's gathering, of activation checkpointing and of compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

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


def blocks(model: nn.Module, links: Sequence[str] | None = None) -> list[nn.Module]:
    """Return a model's layers: the entries of its outermost module lists and dicts, nested ones included.

    With `links`, the layers of a chain, return the links that are in module lists or, if there are none, all
    links with parameters.
    """
    if links is not None:
        chain = {name: model.get_submodule(name) for name in links}
        parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in links}
        listed = [link for name, link in chain.items() if isinstance(parents[name], nn.ModuleList)]
        return listed or [link for link in chain.values() if next(link.parameters(), None) is not None]
    found: dict[int, nn.Module] = {}  # each once, even if it is used twice

    def walk(parent: nn.Module, listed: bool) -> None:
        for child in parent.children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                walk(child, listed=True)
            elif listed:
                found[id(child)] = child
            else:
                walk(child, listed=False)

    walk(model, listed=False)
    return list(found.values())


def units(candidates: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers that ZeRO gathers one by one.

    A layer stays with the root if it shares a weight with another (both must be gathered together) or has no
    matrices (a collective of its own would cost more than it saves).
    """
    owners: dict[int, int] = {}
    for layer in candidates:
        for parameter in layer.parameters():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return [
        layer
        for layer in candidates
        if any(p.ndim >= 2 for p in layer.parameters())
        and all(owners[id(p)] == 1 for p in layer.parameters())
    ]


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
