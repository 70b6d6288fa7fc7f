"""Repeated layers: the units of ZeRO's gathering, of activation checkpointing and of compilation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn


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


def units(root: nn.Module, candidates: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the layers of `root` that ZeRO gathers one by one.

    A layer stays with the root if it shares a weight with a module outside of it (both must be gathered
    together), has no forward pass of its own (as a ParameterList), or has no matrices (a collective of its
    own would cost more than it saves).
    """
    uses = _uses(root)

    def is_unit(layer: nn.Module) -> bool:
        own = _uses(layer)
        alone = all(uses[parameter] == count for parameter, count in own.items())
        matrices = any(p.ndim >= 2 for p in layer.parameters())
        return alone and matrices and type(layer).forward is not nn.Module.forward

    return [layer for layer in candidates if is_unit(layer)]


def _uses(module: nn.Module) -> Counter[int]:
    """Return how many places in the module have each parameter, by id."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
