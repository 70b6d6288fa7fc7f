"""Cutting a model into pipeline stages.

A model that can be cut is a chain: it names its layers in order (`pipeline_layers`), and each takes what
the one before it gives. A rank keeps the stretches of its stages under the names of the unsplit model, and
drops the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from parallel.settings import Balance


class Chain(nn.Module):
    """Some stretches of a model's chain of layers, with the parameter names of the whole model."""

    def __init__(self, model: nn.Module, stretches: Sequence[Sequence[str]]) -> None:
        """Takes the submodules out of `model`, which is no longer of use.

        `stretches` are the layers of each of a rank's pipeline stages. What two of them share they hold apart
        from here on, each its own copy: stages are sharded and computed each by itself.
        """
        super().__init__()
        _prune(model, [name for names in stretches for name in names])
        _part(model, stretches)
        self._modules = model._modules
        # Beside the tree of names, not in it: names with an underscore, as a submodule may have any other.
        self._stretches = [nn.Sequential(*map(self.get_submodule, names)) for names in stretches]

    def stretches(self) -> list[nn.Sequential]:
        """The layers of each stage, as a module that runs them one after the other."""
        return self._stretches

    def forward(self, x: Tensor) -> Tensor:
        for stretch in self._stretches:
            x = stretch(x)
        return x


def layer_names(model: nn.Module) -> list[str] | None:
    """The chain that the model declares as `pipeline_layers`; None if it declares none.

    Raises:
        ValueError: it names something that isn't there, or twice, or leaves parameters out.
    """
    declared: list[str] | None = getattr(model, "pipeline_layers", None)
    if declared is None:
        return None
    known = dict(model.named_modules())
    for name in declared:
        if name not in known:
            raise ValueError(f"pipeline_layers names {name!r}, but {type(model).__name__} has no such module")
        if sum(name == other or name.startswith(f"{other}.") for other in declared) > 1:
            raise ValueError(
                f"pipeline_layers names {name!r} twice, or a part of it; a layer runs once, as one link"
            )
    for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if not any(name.startswith(f"{layer}.") for layer in declared):
            raise ValueError(
                f"{name} is in none of the pipeline_layers; every parameter must belong to a layer"
            )
    return list(declared)


def split_layers(
    model: nn.Module, layers: Sequence[str], stages: int, balance: Balance = "flops"
) -> list[list[str]]:
    """The layers of each stage: adjoining, and as even as can be by `balance`.

    Raises:
        ValueError: there are fewer layers than stages, or not as many costs as layers.
    """
    if len(layers) < stages:
        raise ValueError(
            f"a pipeline of {stages} stages needs at least {stages} layers, but the model has {len(layers)}"
        )
    costs = layer_costs(model, layers, balance)
    return [list(layers[a:b]) for a, b in balanced_cuts(costs, stages)]


def layer_costs(model: nn.Module, layers: Sequence[str], balance: Balance = "flops") -> list[int]:
    """What each layer counts for when stages are cut.

    "flops" counts multiplications per token, which is the elements of a layer's matrices (looking up an
    embedding costs none); "parameters" all parameters' elements; "uniform" layers. What a layer costs may
    also be said by the model itself, in `pipeline_costs`: a number for each of the layers; that comes first.

    Raises:
        ValueError: there are not as many costs as layers.
    """
    costs: Sequence[int] | None = getattr(model, "pipeline_costs", None)
    if costs is None:
        return [_COSTS[balance](model.get_submodule(name)) for name in layers]
    if len(costs) != len(layers):
        raise ValueError(f"pipeline_costs has {len(costs)} numbers for {len(layers)} pipeline_layers")
    return list(costs)


def balanced_cuts(costs: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cut `costs` into `parts` non-empty runs so that the most costly run is as cheap as possible.

    The linear partition problem, by dynamic programming over the position of the last cut.
    """
    total = [0, *accumulate(costs)]
    # best[p][n]: the cheapest possible worst run when the first n are cut into p runs; cut[p][n]: where
    # the last of these runs begins.
    best = [[0.0] + [float("inf")] * len(costs)]
    cut: list[list[int]] = [[0] * (len(costs) + 1)]
    for p in range(1, parts + 1):
        best.append([float("inf")] * (len(costs) + 1))
        cut.append([0] * (len(costs) + 1))
        for n in range(p, len(costs) + 1):
            for start in range(p - 1, n):
                worst = max(best[p - 1][start], total[n] - total[start])
                if worst < best[p][n]:
                    best[p][n], cut[p][n] = worst, start
    runs, end = [], len(costs)
    for p in range(parts, 0, -1):
        runs.append((cut[p][end], end))
        end = cut[p][end]
    return runs[::-1]


def _flops(layer: nn.Module) -> int:
    """Multiplications per token, and one for what is none."""
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
    """Delete the submodules that neither are nor contain nor belong to one of `keep`."""
    for name, _ in list(model.named_modules()):
        wanted = any(
            name == "" or name == k or k.startswith(f"{name}.") or name.startswith(f"{k}.") for k in keep
        )
        if not wanted:
            parent, _, child = name.rpartition(".")
            try:
                del model.get_submodule(parent)._modules[child]
            except AttributeError:  # went with its parent
                continue


@torch.no_grad()
def _part(model: nn.Module, stretches: Sequence[Sequence[str]]) -> None:
    """Give each stretch parameters of its own in the place of those that it shares with an earlier one."""
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
