"""Tensor-parallel styles: what each style of a `tp_plan` cuts, and which degrees it takes. Loads no torch.

`parallel.tensor` applies the styles to modules. The same table tells, from names and shapes alone, which part
of a stored tensor a rank would hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd
from typing import NamedTuple, TypeVar

Parts = int | Sequence[int]
"""Number of equal parts of a layer's output, or their sizes."""


class TPStyle(NamedTuple):
    """Effect of a style on the weight of its module."""

    dim: int | None = None
    """Dim of the weight that is cut, None if the weight stays whole. A bias is cut only if this is 0."""
    even: bool = False
    """True if tp must divide that dim: linear layers between others. Otherwise parts may differ in size."""


STYLES: Mapping[str, TPStyle] = {
    "colwise": TPStyle(0, even=True),
    "rowwise": TPStyle(1, even=True),
    "colwise_gather_output": TPStyle(0),
    "colwise_logits": TPStyle(0),
    "rowwise_split_input": TPStyle(1, even=True),
    "embedding_rowwise": TPStyle(0),
    "gather_input": TPStyle(),
    "sequence_parallel": TPStyle(),
    "replicated_with_grad_allreduce": TPStyle(),
    "per_head": TPStyle(0, even=True),
    "moe_tp_experts": TPStyle(),  # its parameters have styles of their own, see EXPERT_STYLES
    "packed_colwise": TPStyle(),  # each part is cut: a rank's parts aren't adjacent, so all ranks store all
    "packed_rowwise": TPStyle(),
}


class ExpertStyle(NamedTuple):
    """Effect of a style on a parameter of stacked experts, in a module with the style `moe_tp_experts`."""

    dim: int
    packed: bool = False
    """True if the dim is gate and up, one after the other. They are cut for computing and stored whole."""


EXPERT_STYLES: Mapping[str, ExpertStyle] = {
    "packed_colwise": ExpertStyle(-2, packed=True),
    "packed_rowwise": ExpertStyle(-1, packed=True),
    "colwise": ExpertStyle(-2),
    "rowwise": ExpertStyle(-1),
}

SEQUENCE_STYLES = {"embedding_rowwise": "embeddings", "sequence_parallel": "norms"}
"""Styles that a plan must have for sequence parallelism, and the layers that they are for."""


class Division(NamedTuple):
    """A dim that tensor parallelism must cut into equal parts."""

    name: str
    """Module, or parameter of experts."""
    style: str
    parts: int
    """Number of indivisible parts: attention heads, or else the dim's elements."""
    size: int

    def refusal(self, tp: int) -> str | None:
        """Return why `tp` doesn't suit, as a predicate of the degree, or None if it does."""
        if self.parts % tp == 0:
            return None
        parts = f"{self.parts} heads" if self.parts != self.size else f"{self.size} features"
        return f"doesn't divide the {parts} of {self.name} ({self.style})"


def module_division(
    name: str,
    style: str,
    weight: Sequence[int],
    units: Mapping[str, int],
    head_dim: int = 1,
    parts: Mapping[str, Parts] | None = None,
) -> Division | None:
    """Return how a module's weight must be divided, or None if its style takes any degree.

    `weight` is the weight's shape. `units` (pattern -> number) gives the number of indivisible parts; for
    modules that it doesn't name, it is the size divided by `head_dim`. `parts` are those of fused layers,
    which are divided one by one.

    Raises:
        ValueError: the parts aren't parts of this weight.
    """
    if style == "packed_colwise":
        sizes = part_sizes(name, weight[0], parts or {})
        number = _declared(name, units)
        unit = head_dim if number is None else max(1, weight[0] // number)
        if any(size % unit for size in sizes):
            raise ValueError(
                f"the parts of {name}, {', '.join(map(str, sizes))}, don't consist of whole units of {unit} "
                f"features (its {weight[0]} features by tp_units, or else head_dim)"
            )
        return Division(name, style, gcd(*sizes) // unit, gcd(*sizes))
    dim, even = STYLES[style]
    if dim is None or not even:
        return None
    number = _declared(name, units)
    return Division(name, style, weight[dim] // head_dim if number is None else number, weight[dim])


def expert_division(name: str, style: str, shape: Sequence[int]) -> Division:
    """Return how a parameter of stacked experts must be divided."""
    dim, packed = EXPERT_STYLES[style]
    size = shape[dim] // 2 if packed else shape[dim]
    return Division(name, style, size, size)


def match_plan(
    plan: Iterable[str], modules: Collection[str], parameters: Collection[str]
) -> dict[str, list[str]]:
    """Return the modules that each pattern of a plan names, or else the parameters."""
    found = {}
    for pattern in plan:
        names = [name for name in modules if fnmatchcase(name, pattern)]
        found[pattern] = names or [name for name in parameters if fnmatchcase(name, pattern)]
    return found


def no_plan(model: str) -> str:
    """Return why a model without a `tp_plan` can't be split, as a predicate of the degree."""
    return f"needs a model with a tp_plan, but {model} has none"


def sequence_refusal(model: str, styles: Collection[str]) -> str | None:
    """Return why a plan with these styles doesn't suit sequence parallelism, or None if it does."""
    missing = [
        f"{style!r} for the {layers}" for style, layers in SEQUENCE_STYLES.items() if style not in styles
    ]
    if not missing:
        return None
    return (
        "sequence_parallel needs a tp_plan that says where the sequence is split, but that of "
        f"{model} has no {' and no '.join(missing)}"
    )


# --- fused layers ----------------------------------------------------------------------------------------


FUSED = re.compile(
    r"qkv|kqv|query_?key|(^|_)(kv|qk|qv)(_|$)|w(kv|qk)($|_)|c_attn|in_?proj|gate_?up|up_?gate|glu"
    r"|w_?[123]_?w?_?[123]$|fused|packed|merged",
    re.IGNORECASE,
)
"""Names of layers that are several in one. In torch, transformers and timm nearly all such names match."""


def with_parts(plan: Mapping[str, str], parts: Mapping[str, Parts]) -> dict[str, str]:
    """Return an expanded plan in which column-wise layers with several parts are `packed_colwise`."""
    return {
        name: "packed_colwise" if style == "colwise" and _declared(name, parts) not in (None, 1) else style
        for name, style in plan.items()
    }


def part_sizes(name: str, size: int, parts: Mapping[str, Parts]) -> list[int]:
    """Return the sizes of the parts of a `packed_colwise` layer's output, which are two unless declared.

    Raises:
        ValueError: they don't add up to the output's size.
    """
    given = _declared(name, parts)
    found = 2 if given is None else given
    if isinstance(found, int):
        if found < 1 or size % found:
            raise ValueError(f"tp_parts: the {size} features of {name} aren't {found} equal parts")
        return [size // found] * found
    if sum(found) != size or min(found) < 1:
        raise ValueError(f"tp_parts: {list(found)} don't add up to the {size} features of {name}")
    return list(found)


def fused_refusal(
    plan: Mapping[str, str],
    parts: Mapping[str, Parts],
    outputs: Mapping[str, int],
    inputs: Mapping[str, int],
) -> str | None:
    """Return why a column-wise layer seems to be several in one without declared parts; None if none does.

    Its name may say so, or the row-wise layers that come after it: if they take fewer features than it has,
    something was split in between. `outputs` and `inputs` are the features of column-wise and of row-wise
    layers, by name.
    """
    columns = [name for name, style in plan.items() if "colwise" in style]
    scopes = {name: scope_of(name, columns) for name in inputs}
    for name, size in outputs.items():
        if _declared(name, parts) is not None:
            continue
        after = {other: inputs[other] for other, scope in scopes.items() if name.startswith(scope)}
        less = next((other for other, taken in after.items() if taken < size), None)
        if FUSED.search(unwrapped(name).rpartition(".")[2]):
            reason = "by its name"
        elif less is not None and size not in after.values():
            reason = f"as {less} takes only {after[less]} of its {size} features"
        else:
            continue
        likely = 3 if re.search("q.?k.?v|query|c_attn", name, re.IGNORECASE) else 2
        pattern = re.sub(r"\b\d+\b", "*", unwrapped(name))
        return (
            f"tp_plan has {plan[name]!r} for {name}, which seems to be several layers in one, {reason}: a "
            f"rank's slice would mix them; set the model's tp_parts to {{{pattern!r}: {likely}}} for "
            f"{likely} equal parts, to their sizes, such as [16, 8, 8], or to 1 if it is one layer or its "
            "parts alternate by heads"
        )
    return None


def scope_of(name: str, columns: Collection[str]) -> str:
    """Return the prefix of names in the smallest module around a layer that has one of `columns`."""
    owner = name
    while "." in owner:
        owner = owner.rpartition(".")[0]
        if any(other.startswith(f"{owner}.") for other in columns):
            return f"{owner}."
    return ""


# --- adapters --------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\.(base_layer|original_module|lora_[AB]\.[^.]+|modules_to_save\.[^.]+)(?=\.|$)")


def unwrapped(name: str) -> str:
    """Return the name that a layer had before `peft` wrapped it."""
    return _WRAPPED.sub("", name)


def with_adapters(
    plan: Mapping[str, str], modules: Collection[str], parameters: Collection[str]
) -> dict[str, str]:
    """Return an expanded plan in which the styles of wrapped layers are those of the layers within.

    `peft` wraps a layer together with its low-rank adapter, `B A`: a column-wise layer's adapter has a
    column-wise B, a row-wise one's a row-wise A. A copy that is trained instead has the layer's own style.

    Raises:
        ValueError: a wrapped layer with an adapter of another kind.
    """
    within: dict[str, list[str]] = {}
    for module in modules:
        layer = unwrapped(module)
        if layer != module and layer in plan:
            within.setdefault(layer, []).append(module)
    found: dict[str, str] = {}
    for name, style in plan.items():
        if name not in within:
            found[name] = style
            continue
        like_layer = {"base_layer", "original_module", "modules_to_save", _CUT_FACTOR.get(style, "")}
        known = like_layer | ({"lora_A", "lora_B"} if style in _CUT_FACTOR else set())
        for parameter in parameters:
            if parameter.startswith(f"{name}.") and _child(parameter, name) not in known:
                raise ValueError(
                    f"{name} ({style}) has an adapter that can't be split: {parameter}; tensor parallelism "
                    "takes plain LoRA of linear layers"
                )
        found |= {module: style for module in within[name] if _child(module, name) in like_layer}
    return found


_CUT_FACTOR = {
    **{style: "lora_B" for style, effect in STYLES.items() if effect.dim == 0},
    **{style: "lora_A" for style, effect in STYLES.items() if effect.dim == 1},
    "packed_colwise": "lora_B",
}
"""Factor of an adapter that is cut, by the style of its layer."""


def _child(name: str, owner: str) -> str:
    return name.removeprefix(f"{owner}.").partition(".")[0]


T = TypeVar("T")


def _declared(name: str, declared: Mapping[str, T]) -> T | None:
    """Return what is declared for the first pattern that a layer matches, None if it matches none."""
    plain = unwrapped(name)
    return next((value for pattern, value in declared.items() if fnmatchcase(plain, pattern)), None)
