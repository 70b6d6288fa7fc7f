"""Splitting a model into pipeline stages.

A model that can be split is a chain: it names its layers in order (`pipeline_layers`), and each layer takes
the output of the one before it. A rank keeps the layers of its stages under the names of the unsplit model
and drops the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parallel.placement import balanced_cuts, check_layers
from parallel.settings import Balance


class Chain(nn.Module):
    """A rank's pipeline stages: stretches of a model's layers, under the names of the whole model."""

    def __init__(self, model: nn.Module, stretches: Sequence[Sequence[str]]) -> None:
        """Take the submodules out of `model`, which can't be used afterwards.

        `stretches` are the layers of each of the rank's pipeline stages. Parameters that two stages share are
        copied, one for each: every stage is sharded and run by itself.
        """
        super().__init__()
        _prune(model, [name for names in stretches for name in names])
        _untie(model, stretches)
        self._modules = model._modules
        # A plain list, not registered as submodules, which would give every parameter a second name.
        self._stretches = [nn.Sequential(*map(self.get_submodule, names)) for names in stretches]

    def stretches(self) -> list[nn.Sequential]:
        """Return each stage's layers, as a module that runs them in order."""
        return self._stretches

    def forward(self, x: Tensor) -> Tensor:
        for stretch in self._stretches:
            x = stretch(x)
        return x


def layer_names(model: nn.Module) -> list[str] | None:
    """Return the model's `pipeline_layers`, or None if it declares none.

    Raises:
        ValueError: they name a module that doesn't exist, or name one twice, or leave parameters out.
    """
    declared: list[str] | None = getattr(model, "pipeline_layers", None)
    if declared is None:
        return None
    known = dict(model.named_modules())
    for name in declared:
        if name not in known:
            raise ValueError(f"pipeline_layers names {name!r}, but {type(model).__name__} has no such module")
        if sum(name == other or name.startswith(f"{other}.") for other in declared) > 1:
            raise ValueError(f"pipeline_layers names {name!r} twice, or a part of it; name each layer once")
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not any(name.startswith(f"{layer}.") for layer in declared):
            raise ValueError(
                f"{name} is in none of the pipeline_layers; every parameter and buffer must belong to a layer"
            )
    return list(declared)


def split_layers(
    model: nn.Module, layers: Sequence[str], stages: int, balance: Balance = "flops"
) -> list[list[str]]:
    """Return the layers of each stage, consecutive and as evenly balanced as possible.

    `balance` "flops" counts multiplications per token, which is the number of elements of a layer's matrices
    (an embedding lookup has none), "parameters" counts the elements of all parameters, "uniform" counts
    layers. The model's own `pipeline_costs`, one number for each layer, take precedence.

    Raises:
        ValueError: there are fewer layers than stages, or `pipeline_costs` has another length.
    """
    check_layers(len(layers), stages)
    costs: Sequence[int] | None = getattr(model, "pipeline_costs", None)
    if costs is None:
        costs = layer_costs(model, layers, balance)
    if len(costs) != len(layers):
        raise ValueError(f"pipeline_costs has {len(costs)} numbers for {len(layers)} pipeline_layers")
    return [list(layers[a:b]) for a, b in balanced_cuts(costs, stages)]


def layer_costs(model: nn.Module, layers: Sequence[str], balance: Balance) -> list[int]:
    """Return the cost of each layer by `balance`, see `split_layers`."""
    return [_COSTS[balance](model.get_submodule(name)) for name in layers]


def _flops(layer: nn.Module) -> int:
    """Return the multiplications per token, plus 1 so that no layer is free."""
    matrices = (
        parameter.numel()
        for module in layer.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    )
    return 1 + sum(matrices)


_COSTS: dict[Balance, Callable[[nn.Module], int]] = {
    "flops": _flops,
    "parameters": lambda layer: sum(parameter.numel() for parameter in layer.parameters()),
    "uniform": lambda layer: 1,
}


def _prune(model: nn.Module, keep: Sequence[str]) -> None:
    """Delete the submodules that neither are, contain nor belong to one of `keep`."""
    for name, _ in list(model.named_modules()):
        wanted = any(
            name == "" or name == k or k.startswith(f"{name}.") or name.startswith(f"{k}.") for k in keep
        )
        if not wanted:
            parent, _, child = name.rpartition(".")
            try:
                del model.get_submodule(parent)._modules[child]
            except AttributeError:  # deleted with its parent
                continue


@torch.no_grad()
def _untie(model: nn.Module, stretches: Sequence[Sequence[str]]) -> None:
    """Replace the parameters that a stretch shares with an earlier one by copies of its own."""
    taken: set[int] = set()
    for names in stretches:
        copies: dict[int, nn.Parameter] = {}
        owners = {id(m): m for name in names for m in model.get_submodule(name).modules()}.values()
        mine = [(owner, key, p) for owner in owners for key, p in owner._parameters.items() if p is not None]
        for owner, key, parameter in mine:
            if id(parameter) in taken:
                copy = nn.Parameter(parameter.clone(), requires_grad=parameter.requires_grad)
                owner._parameters[key] = copies.setdefault(id(parameter), copy)
        taken |= {id(parameter) for _, _, parameter in mine}
