"""Which rank holds which part of an atom, by what a checkpoint's manifest says. Loads no torch.

The manifest has what the model says of its splitting (`model.declared`) and where its layers lay (`writer`);
the cuts themselves are `uni3d.paper`'s. Tests hold the parts to those of real ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from uni3d.paper import Ranks, balanced_cuts, part_boxes

if TYPE_CHECKING:
    from ckpt import Checkpoint

Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape, in elements of the atom."""

_COLWISE = ("colwise", "colwise_gather_output", "colwise_logits")
_ROWWISE = ("rowwise", "rowwise_split_input")
_EMBEDDING = "embedding_rowwise"
_WHOLE = ("gather_input", "sequence_parallel", "replicated_with_grad_allreduce", "moe_tp_experts")
_OF_EXPERTS = ("packed_colwise", "rowwise")
"""Styles of single parameters, those of stacked experts."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a model lies on ranks, or would."""

    ranks: Ranks
    layers: Sequence[Sequence[str]] | None
    """By place on the pipeline axis, the layers there; None for a model that isn't a chain."""
    shard_group: int | None = None
    """How many data-parallel ranks share out a tensor; None is all, but at ZeRO stage 0."""


def topology(manifest: Mapping[str, Any]) -> Ranks | None:
    """On what a checkpoint was written; None if its manifest doesn't say it."""
    writer = manifest.get("writer") or {}
    try:
        return Ranks(
            **{axis: writer["topology"][axis] for axis in ("pp", "dp", "tp")}, zero=writer["zero_stage"]
        )
    except (KeyError, TypeError, ValueError):
        return None


class Holders:
    """What each rank holds of a checkpoint's atoms, on any topology."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._where = f"{checkpoint.url}'s manifest"
        self._manifest = checkpoint.manifest
        self._said: dict[str, Any] | None = checkpoint.manifest.get("model", {}).get("declared")
        self._aliases: dict[str, str] = checkpoint.manifest.get("aliases", {})
        own = ("fp32", "value")
        self.shapes = {key.atom: info.shape for key, info in checkpoint.arrays.items() if key.state in own}
        """Of the atoms."""
        self._parameters = dict.fromkeys(key.atom for key in checkpoint.arrays if key.state == "fp32")
        names = [*self.shapes, *self._aliases]
        modules = {".".join(name.split(".")[:n]) for name in names for n in range(name.count(".") + 1)}
        plan: dict[str, str] = (self._said or {}).get("tp_plan") or {}
        self._plan = [(p, style, any(fnmatchcase(m, p) for m in modules)) for p, style in plan.items()]
        """Pattern, style, and whether it is of modules; else it is of parameters."""

    def writers(self) -> Split:
        """How the model lay on the ranks that wrote the checkpoint.

        Raises:
            ValueError: the manifest doesn't say it.
        """
        ranks, writer = topology(self._manifest), self._manifest.get("writer") or {}
        if ranks is None:
            raise ValueError(f"{self._where} doesn't say on which topology it was written")
        layers = writer.get("layers")
        if ranks.pp > 1 and layers is None:
            raise ValueError(
                f"{self._where} doesn't say which layers lay on which of the {ranks.pp} pipeline ranks "
                "(an older release wrote it), so nobody knows what they held"
            )
        self._check_declared(ranks.tp)
        return Split(ranks=ranks, layers=layers, shard_group=writer.get("shard_group"))

    def on(self, ranks: Ranks) -> Split:
        """How the model would lie on other ranks, with one pipeline stage on each.

        Raises:
            ValueError: it can't be split over them, or the manifest doesn't say how.
        """
        said = self._said or {}
        self._check_declared(ranks.tp)
        self._check_divides(ranks.tp)
        layers, costs = said.get("pipeline_layers"), said.get("pipeline_costs", said.get("layer_flops"))
        if ranks.pp == 1:
            return Split(ranks=ranks, layers=None)
        if layers is None or costs is None:
            lack = "pipeline_layers" if layers is None else "layer_flops"
            raise ValueError(
                f"{self._where} has no {lack} of {said.get('class', 'the model')}, so nobody knows where "
                f"pp({ranks.pp}) would cut it; give --pp 1"
            )
        if len(layers) < ranks.pp:
            raise ValueError(
                f"pp({ranks.pp}) needs at least {ranks.pp} layers, but the model has {len(layers)}"
            )
        return Split(ranks=ranks, layers=[layers[a:b] for a, b in balanced_cuts(costs, ranks.pp)])

    def parts(self, atom: str, split: Split) -> dict[int, Part]:
        """By rank, the part of an atom that it holds; empty where nothing was left for it.

        Ranks of pipeline stages without the atom are left out. A tied weight is on several.
        """
        shape, ranks, parts = self.shapes[atom], split.ranks, dict[int, Part]()
        for place in range(ranks.pp):
            name = self.name_at(atom, split, place)
            if name is None:
                continue
            first = place * ranks.of_a_stage
            if atom in self._parameters:
                tp_dim = self._tp_dim(name, len(shape)) if ranks.tp > 1 else None
                boxes: Sequence[Part] = part_boxes(
                    shape, tp_dim, dp=ranks.dp, tp=ranks.tp, shards=_shards(split)
                )
            else:  # a buffer is whole everywhere
                boxes = [((0,) * len(shape), shape)] * ranks.of_a_stage
            parts |= {first + i: (tuple(offset), tuple(n)) for i, (offset, n) in enumerate(boxes)}
        return parts

    def first_name(self, name: str) -> str:
        """The atom of a tied weight's other name; any other name as it is."""
        return self._aliases.get(name, name)

    def name_at(self, atom: str, split: Split, place: int) -> str | None:
        """The atom's name at a place on the pipeline axis; another one of a tied weight, or None."""
        names = [atom, *(alias for alias, first in self._aliases.items() if first == atom)]
        if split.layers is None:
            return atom
        layers = tuple(f"{layer}." for layer in split.layers[place])
        return next((name for name in names if name.startswith(layers)), None)

    def _check_declared(self, tp: int) -> None:
        if tp > 1 and self._said is None:
            raise ValueError(
                f"{self._where} keeps nothing of how the model may be split (model.declared; an older "
                f"release wrote it), so nobody knows what tp({tp}) cuts"
            )
        if tp > 1 and self._said is not None and not self._plan:
            kind = self._said.get("class", "this one")
            raise ValueError(f"tp({tp}) needs a model with a tp_plan, which {kind} hasn't; use tp 1")

    def _check_divides(self, tp: int) -> None:
        """`parallel.tensor.check_plan`, as far as shapes and `tp_units` tell."""
        if tp == 1:
            return
        units: dict[str, int] = (self._said or {}).get("tp_units") or {}
        for name in [*self._parameters, *self._aliases]:
            style, own = self._style(name)
            shape = self.shapes[self._aliases.get(name, name)]
            module, _, kind = name.rpartition(".")
            if own and style in _OF_EXPERTS:
                module, size = name, shape[-1] if style == "rowwise" else shape[-2] // 2
            elif kind == "weight" and style in ("colwise", *_ROWWISE):
                size = shape[0] if style == "colwise" else shape[1]
            else:
                continue
            parts = next((n for pattern, n in units.items() if fnmatchcase(module, pattern)), size)
            if parts % tp:
                what = f"{parts} heads" if parts != size else f"{size} features"
                raise ValueError(
                    f"tp({tp}) doesn't divide the {what} of {module} ({style}); choose a tp that does"
                )

    def _style(self, name: str) -> tuple[str | None, bool]:
        """The style of a parameter, and whether it is its own, not its module's."""
        module, found = name.rpartition(".")[0], {}
        for pattern, style, of_modules in self._plan:  # later ones count
            if fnmatchcase(module if of_modules else name, pattern):
                found[not of_modules] = style
        own = True in found
        return found.get(own), own

    def _tp_dim(self, name: str, ndim: int) -> int | None:
        """The dim that tensor parallelism cuts; None for what every rank of its axis holds whole."""
        style, own = self._style(name)
        kind = name.rpartition(".")[2]
        if style is None:
            return None
        if own and style in _OF_EXPERTS:
            return ndim - 1 if style == "rowwise" else None
        if style in _COLWISE or (style == _EMBEDDING and kind == "weight"):
            return 0
        if style in _ROWWISE:
            return 1 if kind == "weight" else None
        if style in _WHOLE:
            return None
        raise ValueError(f"tp_plan has the style {style!r} for {name}, which isn't known here")


def _shards(split: Split) -> int:
    return 1 if split.ranks.zero == 0 else split.shard_group or split.ranks.dp
