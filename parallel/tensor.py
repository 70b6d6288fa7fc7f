"""Tensor parallelism: a model's plan (module pattern -> style) applied with torch's DTensor styles.

The styles have the names that Hugging Face's `tp_plan` gave them, and three more: a head whose logits stay
split by vocabulary, so that the loss is computed without any rank ever holding all of them
(`colwise_logits`, with torch's `loss_parallel`); and a module of which several layers use the same input,
which is then gathered once, and its gradient summed once (`gather_input`).

With sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models") the ranks also share out what lies between the split layers: embeddings and row-wise layers give each
rank its stretch of the sequence, norms (`sequence_parallel`) work on it, column-wise layers gather it.
Their activations, and what pipeline stages send each other, are smaller by tp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from parallel.experts import ExpertsParallel, check_experts

STYLES: dict[str, Callable[[Placement], ParallelStyle]] = {
    "colwise": lambda between: ColwiseParallel(input_layouts=between),
    "rowwise": lambda between: RowwiseParallel(output_layouts=between),
    "colwise_gather_output": lambda between: ColwiseParallel(
        input_layouts=between, output_layouts=Replicate()
    ),
    "colwise_logits": lambda between: ColwiseParallel(
        input_layouts=between, output_layouts=Shard(-1), use_local_output=False
    ),
    "rowwise_split_input": lambda between: RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
    "embedding_rowwise": lambda between: RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
    "gather_input": lambda between: PrepareModuleInput(
        input_layouts=between, desired_input_layouts=Replicate()
    ),
    "sequence_parallel": lambda _: SequenceParallel(sequence_dim=-2, use_local_output=True),
    # A norm over each head: what it normalises is whole, and the dim before it, the heads, is split.
    "replicated_with_grad_allreduce": lambda _: SequenceParallel(sequence_dim=-2, use_local_output=True),
}
"""By name, how a module is split; given is how activations lie between the split layers."""

_KNOWN = (*STYLES, "moe_tp_experts", "packed_colwise")
"""Those, and the ones that only `parallel.experts` has."""

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input"), (nn.Linear,)),
    "colwise_logits": (nn.Linear,),
    "embedding_rowwise": (nn.Embedding,),
}
"""Which modules torch's styles know how to split."""

_EVENLY = ("colwise", "rowwise", "rowwise_split_input")
"""Styles of linear layers between others, whose parts must all be of one size."""


def expand_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Name -> style, for every module, or parameter of experts, that a pattern of the plan names.

    Raises:
        ValueError: a pattern that names no module, or a style that isn't known.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    expanded: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in _KNOWN:
            raise ValueError(f"tp_plan[{pattern!r}] is {style!r}; expected one of {', '.join(_KNOWN)}")
        matches = [name for name in modules if fnmatchcase(name, pattern)]
        matches = matches or [name for name in parameters if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"tp_plan names {pattern!r}, but {type(model).__name__} has no such module")
        expanded |= dict.fromkeys(matches, style)
    return expanded


def check_plan(
    model: nn.Module,
    plan: Mapping[str, str],
    units: Mapping[str, int],
    degree: int,
    *,
    sequence_parallel: bool = False,
) -> None:
    """Check that an expanded plan's styles suit their layers, and that `degree` divides what they cut.

    `units` (pattern -> number) says how many indivisible parts a layer's dimension has, where that isn't
    its size: attention heads. Where a model has none for a layer, its parent's `head_dim` says it, as in
    Hugging Face's attention. Embeddings and logits may be cut unevenly, linear layers between may not.

    Raises:
        ValueError: naming the layer, the size and the degree.
    """
    check_experts(model, plan, degree)
    for name, style in plan.items():
        if not _has(model, name):
            continue
        module = model.get_submodule(name)
        kinds = _KINDS.get(style)
        if kinds is not None and not isinstance(module, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"{name} is a {type(module).__name__}, which the style {style!r} can't split; "
                f"it needs {expected}"
            )
        if style not in _EVENLY or not isinstance(module, nn.Linear):
            continue
        size = module.out_features if style == "colwise" else module.in_features
        parts = next((n for pattern, n in units.items() if fnmatchcase(name, pattern)), None)
        if parts is None:
            parts = size // getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 1)
        if parts % degree:
            what = f"{parts} heads" if parts != size else f"{size} features"
            raise ValueError(
                f"tp({degree}) doesn't divide the {what} of {name} ({style}); choose a tp that does"
            )
    if sequence_parallel and not {"sequence_parallel", "embedding_rowwise"} <= set(plan.values()):
        raise ValueError(
            "sequence_parallel needs a tp_plan that says where the sequence is split: 'embedding_rowwise' "
            "for the embeddings and 'sequence_parallel' for the norms, which "
            f"{type(model).__name__}'s doesn't"
        )


def units_by_head(model: nn.Module, plan: Mapping[str, str], units: Mapping[str, int]) -> dict[str, int]:
    """Name -> number of parts, for layers of an expanded plan of which not `units` but a `head_dim` says it.

    See `check_plan`.
    """
    found: dict[str, int] = {}
    for name, style in plan.items():
        if style not in _EVENLY or not _has(model, name) or any(fnmatchcase(name, p) for p in units):
            continue
        head = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 1)
        module = model.get_submodule(name)
        if head != 1 and isinstance(module, nn.Linear):
            found[name] = (module.out_features if style == "colwise" else module.in_features) // head
    return found


def check_sequence(shape: Sequence[int], degree: int) -> None:
    """Check that `degree` divides the sequence of token ids `(..., sequence)`.

    Raises:
        ValueError: it doesn't.
    """
    if shape[-1] % degree:
        raise ValueError(
            f"sequence_parallel: tp({degree}) doesn't divide the sequence's {shape[-1]} tokens; "
            "pad the sequences, or choose a tp that does"
        )


def rowwise_weights(model: nn.Module, plan: Mapping[str, str]) -> set[str]:
    """Names of the weights that a plan cuts along their second dim, whatever the degree."""
    patterns = [pattern for pattern, style in plan.items() if style in ("rowwise", "rowwise_split_input")]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def apply_tensor_parallel(
    model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh, *, sequence_parallel: bool = False
) -> None:
    """Split the modules of an expanded plan over `mesh`, in place; what it leaves out is replicated.

    A module that is left out must see the same input on all ranks (`Replicas` looks whether it did).

    On one rank the styles would only turn each operation into its DTensor form with the same result,
    which makes a small model slower (`benchmarks/RESULTS.md`), so nothing is wrapped.
    """
    if mesh.size() == 1:
        return
    ties = tied_names(model)
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    # Activations are (..., sequence, features).
    between: Placement = Shard(-2) if sequence_parallel else Replicate()
    gathering = tuple(f"{name}." for name, style in plan.items() if style == "gather_input")
    present: dict[str, ParallelStyle] = {}
    for name, style in plan.items():
        if not _has(model, name) or (style == "sequence_parallel" and not sequence_parallel):
            continue
        if style == "moe_tp_experts":
            own = {n.removeprefix(f"{name}."): s for n, s in plan.items() if n.rpartition(".")[0] == name}
            present[name] = ExpertsParallel(own)
            continue
        # Told that its input is split where it is gathered already, a layer would sum its gradient alone.
        gathered = style == "colwise" and name.startswith(gathering)
        present[name] = STYLES[style](Replicate() if gathered else between)
        if sequence_parallel and style == "embedding_rowwise":
            model.get_submodule(name).register_forward_pre_hook(partial(_check_ids, mesh.size()))
    parallelize_module(model, mesh, present)
    for alias, name in ties.items():  # each module got its own split copy; make them one again
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # not every style keeps it


def _check_ids(degree: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    check_sequence(args[0].shape, degree)


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
