"""Cutting a model into pipeline stages.

A model that can be cut is a chain: it names its layers in order (`pipeline_layers`), and each takes what
the one before it gives. A stage keeps its stretch of the chain under the names of the unsplit model, and
drops the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor, nn


class Chain(nn.Module):
    """Some layers of a model, run one after the other, with the parameter names of the whole model."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Takes the submodules out of `model`, which is no longer of use."""
        super().__init__()
        _prune(model, layers)
        self._modules = model._modules
        self._chain_names = list(layers)

    def _links(self) -> list[nn.Module]:  # names with an underscore, as a submodule may have any other
        return [self.get_submodule(name) for name in self._chain_names]

    def forward(self, x: Tensor) -> Tensor:
        for link in self._links():
            x = link(x)
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


def split_layers(model: nn.Module, layers: Sequence[str], stages: int) -> list[list[str]]:
    """The layers of each stage: adjoining, and as even as can be in what their matrices cost.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if len(layers) < stages:
        raise ValueError(f"pp({stages}) needs at least {stages} layers, but the model has {len(layers)}")
    bounds = balanced_cuts([_cost(model.get_submodule(name)) for name in layers], stages)
    return [list(layers[a:b]) for a, b in bounds]


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


def _cost(layer: nn.Module) -> int:
    """Multiplications per token: the elements of the layer's matrices. Looking up an embedding costs none."""
    matrices = (
        parameter.numel()
        for module in layer.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    )
    return 1 + sum(matrices)


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
