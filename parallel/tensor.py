"""Tensor parallelism: a model's plan (module pattern -> style) applied with torch's DTensor styles.

The styles are those of Hugging Face's `tp_plan`, and more. `colwise_logits` is a head whose logits stay
split by vocabulary, so that no rank ever holds all of them (with torch's `loss_parallel`). `gather_input` is
a module with several layers that take its input, which is then gathered once, and its gradient reduced once.
Further, `per_head` is a norm with a row of weights for each head.

With sequence parallelism (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models") the ranks also split the sequence between the split layers: embeddings and row-wise layers return a
rank's part of the sequence, norms (`sequence_parallel`) work on it, column-wise layers gather it. These
activations, and those sent between pipeline stages, are smaller by a factor of tp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
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
from parallel.packed import PackedColwise, PerHead
from parallel.plan_checks import check_fused, check_head_counts, check_whole_norms, class_plan, head_dim_of
from parallel.ties import tied_names
from parallel.tp_styles import (
    STYLES,
    Parts,
    match_plan,
    module_division,
    part_sizes,
    sequence_refusal,
    unwrapped,
    with_adapters,
    with_parts,
)

DTENSOR_STYLES: dict[str, Callable[[Placement], ParallelStyle]] = {
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
    # A norm over each head: the features are whole, and the heads, in the dim before them, are split.
    "replicated_with_grad_allreduce": lambda _: SequenceParallel(sequence_dim=-2, use_local_output=True),
    "per_head": lambda _: PerHead(),
}
"""DTensor style of each style of modules, given the placement of activations between the split layers."""

_KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "rowwise", "rowwise_split_input"), (nn.Linear,)),
    **dict.fromkeys(("colwise_logits", "packed_colwise"), (nn.Linear,)),
    "embedding_rowwise": (nn.Embedding,),
}
"""Modules that torch's styles can split."""


class Declared(NamedTuple):
    """A model's own declarations of how it is split, by patterns of names in that model."""

    plan: dict[str, str]
    units: dict[str, int]
    parts: dict[str, Parts]


def declared_splits(model: nn.Module) -> Declared:
    """Return a model's `tp_plan`, `tp_units` and `tp_parts`.

    A wrapper that passes on the attributes of the model in it, as `peft`'s does, has the same; their names
    get the wrapper's prefix.
    """
    found: list[dict[str, Any]] = []
    for attribute in ("tp_plan", "tp_units", "tp_parts"):
        given = getattr(model, attribute, None) or {}
        owner = next((name for name, m in model.named_modules() if _own(m, attribute) == given), "")
        found.append({f"{owner}.{pattern}" if owner else pattern: v for pattern, v in given.items()})
    return Declared(*found)


def _own(module: nn.Module, name: str) -> Any:
    """Return an attribute that `__getattr__` doesn't pass on from another object; None without one."""
    try:
        return object.__getattribute__(module, name)
    except AttributeError:
        return None


def expand_plan(
    model: nn.Module, plan: Mapping[str, str], parts: Mapping[str, Parts] | None = None
) -> dict[str, str]:
    """Return the style of every module, or parameter of experts, that a pattern of the plan names.

    A pattern of a library's class may name modules that a config doesn't build; it has no effect. Layers
    with several `parts` (pattern -> number or sizes) are `packed_colwise` if the plan says `colwise`.

    Raises:
        ValueError: another pattern names no module, or a style is unknown.
    """
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    of_class = class_plan(model)
    expanded: dict[str, str] = {}
    for pattern, matches in match_plan(plan, modules, parameters).items():
        style = plan[pattern]
        if not matches and of_class.get(pattern) == style:
            continue
        if style not in STYLES:
            raise ValueError(f"tp_plan[{pattern!r}] is {style!r}; expected one of {', '.join(STYLES)}")
        if not matches:
            raise ValueError(f"tp_plan names {pattern!r}, but {type(model).__name__} has no such module")
        expanded |= dict.fromkeys(matches, style)
    for pattern, found in match_plan(parts or {}, modules, []).items():
        if not found:
            raise ValueError(f"tp_parts names {pattern!r}, but {type(model).__name__} has no such module")
    expanded = with_parts(with_adapters(expanded, modules, parameters), parts or {})
    return expanded | _rows_per_head(model, expanded)


def _rows_per_head(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Return the style of modules that the plan leaves out, but whose weights have a row for each split head.

    Such a norm after a column-wise projection can only be meant so: a rank has as many rows as heads.
    """
    found: dict[str, str] = {}
    for name, style in plan.items():
        head = head_dim_of(model, name) if style == "colwise" and _has(model, name) else 1
        layer = model.get_submodule(name) if head > 1 else None
        if not isinstance(layer, nn.Linear):
            continue
        owner = unwrapped(name).rpartition(".")[0]
        for child, module in model.get_submodule(owner).named_children():
            shapes = {tuple(parameter.shape) for parameter in module.parameters()}
            key = f"{owner}.{child}" if owner else child
            if shapes == {(layer.out_features // head, head)} and key not in plan:
                found[key] = "per_head"
    return found


def check_plan(
    model: nn.Module,
    plan: Mapping[str, str],
    units: Mapping[str, int],
    degree: int,
    *,
    parts: Mapping[str, Parts] | None = None,
    sequence_parallel: bool = False,
) -> None:
    """Check that an expanded plan's styles suit their layers, and that `degree` divides the dims they cut.

    `units` (pattern -> number) gives the number of indivisible parts of a layer's dim, where that isn't its
    size: attention heads. For other layers the parent's `head_dim` decides, as in Hugging Face's attention.
    Embeddings and logits may be cut unevenly, linear layers between them may not. `parts` are those of fused
    projections, see `expand_plan`.

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
                f"expected {expected}"
            )
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) and style != "per_head":
            continue
        head = 1 if style == "per_head" else head_dim_of(model, name)
        assert isinstance(weight, Tensor), name
        division = module_division(name, style, weight.shape, units, head, parts)
        if division is not None and (why := division.refusal(degree)) is not None:
            raise ValueError(f"tp({degree}) {why}; choose a tp that does")
    check_fused(model, plan, parts or {})
    check_head_counts(model, plan, units)
    if not sequence_parallel:
        check_whole_norms(model, plan)
    why = sequence_refusal(type(model).__name__, set(plan.values())) if sequence_parallel else None
    if why is not None:
        raise ValueError(why)


def units_by_head(model: nn.Module, plan: Mapping[str, str], units: Mapping[str, int]) -> dict[str, int]:
    """Return the number of heads of the layers that `units` doesn't name but whose parent has a `head_dim`.

    By name, for the layers of an expanded plan; see `check_plan`.
    """
    found: dict[str, int] = {}
    for name, style in plan.items():
        if not _has(model, name) or any(fnmatchcase(name, p) for p in units):
            continue
        head, module = head_dim_of(model, name), model.get_submodule(name)
        if head != 1 and isinstance(module, nn.Linear):
            dim = 0 if style == "packed_colwise" else STYLES[style].dim
            even = style == "packed_colwise" or STYLES[style].even
            found |= {} if dim is None or not even else {name: module.weight.shape[dim] // head}
    return found


def check_sequence(shape: Sequence[int], degree: int) -> None:
    """Check that `degree` divides the sequence of token ids `(..., sequence)`.

    Raises:
        ValueError: it doesn't divide it.
    """
    if shape[-1] % degree:
        raise ValueError(
            f"sequence_parallel: tp({degree}) doesn't divide the sequence's {shape[-1]} tokens; "
            "pad the sequences, or choose a tp that does"
        )


def rowwise_weights(model: nn.Module, plan: Mapping[str, str]) -> set[str]:
    """Return the names of the weights that a plan cuts along their second dim, whatever the degree."""
    patterns = [pattern for pattern, style in plan.items() if style in STYLES and STYLES[style].dim == 1]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def apply_tensor_parallel(
    model: nn.Module,
    plan: Mapping[str, str],
    mesh: DeviceMesh,
    parts: Mapping[str, Parts] | None = None,
    *,
    sequence_parallel: bool = False,
) -> None:
    """Split the modules of an expanded plan over `mesh`, in place; all others are replicated.

    A replicated module must see the same input on all ranks (`Replicas` checks that it did).

    On one rank nothing is wrapped: the styles would only turn each operation into its DTensor form with the
    same result, which makes a small model slower (`benchmarks/RESULTS.md`).
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
        # A layer below `gather_input` has a whole input. Declared as split, it would reduce the gradient
        # alone.
        gathered = style in ("colwise", "packed_colwise") and name.startswith(gathering)
        layout = Replicate() if gathered else between
        if style == "packed_colwise":
            weight = model.get_submodule(name).get_parameter("weight")
            sizes = part_sizes(name, weight.shape[0], parts or {})
            present[name] = PackedColwise(sizes, layout)
        else:
            present[name] = DTENSOR_STYLES[style](layout)
        if sequence_parallel and style == "embedding_rowwise":
            model.get_submodule(name).register_forward_pre_hook(partial(_check_ids, mesh.size()))
    parallelize_module(model, mesh, present)
    for alias, name in ties.items():  # each module got its own split copy; tie them again
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(trained[name])  # some styles reset it


def _check_ids(degree: int, _: nn.Module, args: tuple[Any, ...]) -> None:
    check_sequence(args[0].shape, degree)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
