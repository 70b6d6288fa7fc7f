"""Checks of an expanded `tp_plan` for what would be computed wrongly without an error."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn

from parallel.tp_styles import Parts, fused_refusal, match_plan, scope_of, unwrapped

_BY_HEADS = (
    re.compile(r"self\.(\w*heads?)\s*,\s*-1\s*[,)\]]"),
    re.compile(r"\bh\w*\s*=\s*(?:\*\w+\.shape\s*,\s*)?self\.(\w*heads?)\s*[,)\n]"),
)
"""Shapes with a number of heads and whatever is left for each, as in `view(b, n, self.heads, -1)`, and as
in einops' `rearrange(x, 'b n (h d) -> b h n d', h=self.heads)`."""


def class_plan(model: nn.Module) -> dict[str, str]:
    """Return the entries that `transformers` declares for its classes, whatever a config builds of them."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if not hasattr(type(module), "base_model_prefix"):  # one of its models, or an inner one
            continue
        plans = getattr(type(module), "_tp_plan", None), getattr(module.config, "base_model_tp_plan", None)
        for pattern, style in [entry for plan in plans if plan for entry in plan.items()]:
            found[f"{prefix}.{pattern}" if prefix else pattern] = style
    return found


def check_fused(model: nn.Module, plan: Mapping[str, str], parts: Mapping[str, Parts]) -> None:
    """Check that no layer of an expanded plan seems to be several in one, without its `parts` being declared.

    The plan of a library's class is trusted: there, the parts alternate by heads.

    Raises:
        ValueError: naming the layer, and how to declare its parts.
    """
    linear = {n: m for n, m in model.named_modules() if n in plan and isinstance(m, nn.Linear)}
    inputs = {n: m.in_features for n, m in linear.items() if plan[n] == "rowwise"}
    trusted = _trusted(model, "colwise")
    outputs = {
        n: m.out_features
        for n, m in linear.items()
        if plan[n] == "colwise" and not {n, unwrapped(n)} & trusted
    }
    if (why := fused_refusal(plan, parts, outputs, inputs)) is not None:
        raise ValueError(why)


def check_whole_norms(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Check that a norm whose gradients are summed over the ranks isn't one of what every rank has.

    It would be if it has as many features as the column-wise layers after it take.

    Raises:
        ValueError: naming the norm, whose gradient would count once for each rank.
    """
    linear = {n: m for n, m in model.named_modules() if n in plan and isinstance(m, nn.Linear)}
    columns = {n: m.in_features for n, m in linear.items() if "colwise" in plan[n]}
    style = "replicated_with_grad_allreduce"
    trusted = _trusted(model, style)
    for name in [n for n in plan if plan[n] == style and n not in trusted]:
        weight = getattr(model.get_submodule(name), "weight", None)
        if not isinstance(weight, Tensor):
            continue
        scope = scope_of(name, columns)
        after = next(
            (n for n, size in columns.items() if n.startswith(scope) and size == weight.numel()), None
        )
        if after is not None and head_dim_of(model, name) != weight.numel():
            raise ValueError(
                f"tp_plan has {style!r} for {name}, but its {weight.numel()} features are all that {after} "
                "takes, which every rank has: its gradient would count once for each rank; leave it out of "
                "the plan, or use 'sequence_parallel'"
            )


def _trusted(model: nn.Module, style: str) -> set[str]:
    """Return the modules to which the plan of a library's class gives a style."""
    of_class, modules = class_plan(model), [name for name, _ in model.named_modules()]
    patterns = [pattern for pattern, given in of_class.items() if given == style]
    return {name for names in match_plan(patterns, modules, []).values() for name in names}


def check_head_counts(model: nn.Module, plan: Mapping[str, str], units: Mapping[str, int]) -> None:
    """Check that no forward pass cuts a rank's features into as many heads as all ranks have.

    It would get heads of fewer features each, without an error. Only the source can tell; where it can't be
    read, nothing is checked.

    Raises:
        ValueError: naming the module and its attribute.
    """
    modules, trusted = dict(model.named_modules()), _trusted(model, "colwise")
    owners: dict[str, set[int]] = {}
    for name, style in plan.items():
        layer = modules.get(name) if style in ("colwise", "packed_colwise") else None
        if isinstance(layer, nn.Linear) and not {name, unwrapped(name)} & trusted:
            head = head_dim_of(model, name)
            told = next((n for pattern, n in units.items() if fnmatchcase(unwrapped(name), pattern)), None)
            known = {told} if told is not None else {layer.out_features // head} if head > 1 else set()
            owners.setdefault(unwrapped(name).rpartition(".")[0], set()).update(known)
    for owner, known in owners.items():
        module = model.get_submodule(owner)
        for attribute in _shapes_by(module):
            heads = getattr(module, attribute, None)
            # A module may have a rank's number itself.
            if isinstance(heads, int) and heads > 1 and (not known or heads in known):
                raise ValueError(
                    f"the tp_plan gives each rank a part of the heads of {owner or type(model).__name__}, "
                    f"whose forward pass shapes them by self.{attribute} ({heads}), the number of all: give "
                    "the size of a head instead, and -1 for their number"
                )


def _shapes_by(module: nn.Module) -> list[str]:
    """Return the attributes by which a forward pass cuts features into heads of any size."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return []
    if "rearrange(" not in source and "unflatten(" not in source:
        return _BY_HEADS[0].findall(source)
    return [name for pattern in _BY_HEADS for name in pattern.findall(source)]


def head_dim_of(model: nn.Module, name: str) -> int:
    """Return the `head_dim` of a layer's parent, 1 if it has none."""
    size: int = getattr(model.get_submodule(unwrapped(name).rpartition(".")[0]), "head_dim", 1)
    return size
