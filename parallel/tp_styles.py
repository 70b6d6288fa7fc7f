"""Tensor-parallel styles: what each style of a `tp_plan` cuts, and which degrees it takes. Loads no torch.

`parallel.tensor` applies the styles to modules. The same table tells, from names and shapes alone, which part
of a stored tensor a rank would hold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple


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
    "moe_tp_experts": TPStyle(),  # its parameters have styles of their own, see EXPERT_STYLES
    "packed_colwise": TPStyle(),
}

EXPERT_STYLES = ("packed_colwise", "rowwise")
"""Styles of parameters, in a module with the style `moe_tp_experts`."""

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
    name: str, style: str, weight: Sequence[int], units: Mapping[str, int], head_dim: int = 1
) -> Division | None:
    """Return how a module's weight must be divided, or None if its style takes any degree.

    `weight` is the weight's shape. `units` (pattern -> number) gives the number of indivisible parts; for
    modules that it doesn't name, it is the size divided by `head_dim`.
    """
    dim, even = STYLES[style]
    if dim is None or not even:
        return None
    size = weight[dim]
    parts = next((n for pattern, n in units.items() if fnmatchcase(name, pattern)), size // head_dim)
    return Division(name, style, parts, size)


def expert_division(name: str, style: str, shape: Sequence[int]) -> Division:
    """Return how a parameter of stacked experts must be divided."""
    size = shape[-2] // 2 if style == "packed_colwise" else shape[-1]  # gate and up, one after the other
    return Division(name, style, size, size)


def match_plan(
    plan: Mapping[str, str], modules: Collection[str], parameters: Collection[str]
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
