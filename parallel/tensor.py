"""Tensor parallelism: a model's plan (module pattern -> style) applied with torch's DTensor styles.

The styles have the names that Hugging Face's `tp_plan` gave them, and two for the ends of a language
model: an embedding split by vocabulary, and a head whose logits stay split by vocabulary, so that the loss
is computed without any rank ever holding all of them (`loss_parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "colwise_logits": lambda: ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}


def expand_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Module name -> style, for every module that a pattern of the plan names.

    Raises:
        ValueError: a pattern that names no module, or a style that isn't known.
    """
    names = [name for name, _ in model.named_modules()]
    expanded: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ValueError(f"tp_plan[{pattern!r}] is {style!r}; expected one of {', '.join(STYLES)}")
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"tp_plan names {pattern!r}, but {type(model).__name__} has no such module")
        expanded |= dict.fromkeys(matches, style)
    return expanded


def check_divisible(model: nn.Module, plan: Mapping[str, str], units: Mapping[str, int], degree: int) -> None:
    """Check that `degree` divides what each linear layer of an expanded plan is cut into.

    `units` (pattern -> number) says how many indivisible parts a layer's dimension has, where that isn't
    its size: attention heads. Embeddings and logits may be cut unevenly, linear layers between may not.

    Raises:
        ValueError: naming the layer, the size and the degree.
    """
    for name, style in plan.items():
        module = model.get_submodule(name)
        if style not in ("colwise", "rowwise") or not isinstance(module, nn.Linear):
            continue
        size = module.out_features if style == "colwise" else module.in_features
        parts = next((n for pattern, n in units.items() if fnmatchcase(name, pattern)), size)
        if parts % degree:
            what = f"{parts} heads" if parts != size else f"{size} features"
            raise ValueError(
                f"tp({degree}) doesn't divide the {what} of {name} ({style}); choose a tp that does"
            )


def rowwise_weights(model: nn.Module, plan: Mapping[str, str]) -> set[str]:
    """Names of the weights that a plan cuts along their second dim, whatever the degree."""
    patterns = [pattern for pattern, style in plan.items() if style == "rowwise"]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def apply_tensor_parallel(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split the modules of an expanded plan over `mesh`, in place; what it leaves out is replicated.

    A module that is left out must see the same input on all ranks, and so none between a column-wise and
    a row-wise layer may have parameters: each rank would give them the gradient of its own part.

    On one rank the styles would only turn each operation into its DTensor form with the same result,
    which makes a small model slower (`benchmarks/RESULTS.md`), so nothing is wrapped.
    """
    if mesh.size() == 1:
        return
    ties = tied_names(model)
    present = {name: STYLES[style]() for name, style in plan.items() if _has(model, name)}
    parallelize_module(model, mesh, present)
    for alias, name in ties.items():  # each module got its own split copy; make them one again
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))


def tied_names(model: nn.Module) -> dict[str, str]:
    """The other names of parameters that have several: `{alias: first name}`."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
