"""Boxes of a checkpoint's arrays on the ranks of any topology, computed without ranks, torch or the model.

The manifest names the layers of the model's chain and the modules that tensor parallelism cuts
(`uni3d.checkpoint.model_spec`). With the arrays' shapes, the rules of training give the boxes: pipeline
stages (`parallel.placement`), tensor parallelism along the dim of a style (`parallel.tp_styles`), and ZeRO
along the first dim (`uni3d.estimate.save.part_boxes`). Different pipeline ranks hold different arrays. Ranks
that differ only in dp and tp hold boxes of the same arrays.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import ckpt
from ckpt.format import itemsize
from ckpt.parts import ArrayInfo
from ckpt.read import PARAMETER, WEIGHT_STATES
from parallel.combinations import pipeline_refusal
from parallel.degrees import Ranks
from parallel.placement import Placement, balanced_cuts
from parallel.settings import Balance, Settings
from parallel.tp_styles import (
    EXPERT_STYLES,
    STYLES,
    Division,
    Parts,
    expert_division,
    match_plan,
    module_division,
    no_plan,
    sequence_refusal,
    with_adapters,
    with_parts,
)
from uni3d.estimate.save import part_boxes
from uni3d.estimate.zero import largest_part
from uni3d.manifest import RunManifest, is_extra

USUAL = Settings()
"""Settings of a run with an unknown config."""

_UNDECLARED = "can't be checked: the manifest doesn't say how the model may be split"
_CutBy = tuple[int, str, int, str]


class RefusedDegrees(NamedTuple):
    """Degrees of one axis by which the model or its batch can't be split, with the reason."""

    axis: str
    degrees: list[int]
    why: str

    def __str__(self) -> str:
        return f"{self.axis} {', '.join(map(str, self.degrees))} {self.why}"


class Kind(NamedTuple):
    """Properties of an array that decide on its share of a rank's memory."""

    shape: tuple[int, ...]
    itemsize: int
    tp_dim: int | None
    whole: bool
    """True if every rank has the whole array, as with buffers."""
    role: Literal["trained", "frozen", "state", "buffer"]
    """Trained or frozen parameter, optimizer state, or buffer."""

    def largest(self, tp: int, shards: int) -> int:
        """Return the elements of the largest box on a rank."""
        return prod(self.shape) if self.whole else largest_part(self.shape, self.tp_dim, tp=tp, shards=shards)


class StageArray(NamedTuple):
    """An array on one pipeline rank, where every rank holds a box of it."""

    info: ArrayInfo
    name: str
    """Name of its tensor on this pipeline rank; the first one if a tied tensor has several."""
    kind: Kind

    def boxes(self, ranks: Ranks, shards: int) -> list[ckpt.Box]:
        """Return the boxes of the ranks of one pipeline rank, tensor-parallel neighbours side by side."""
        shards, tp_dim = (1, None) if self.kind.whole else (shards, self.kind.tp_dim)
        return part_boxes(self.info.shape, tp_dim, dp=ranks.dp, tp=ranks.tp, shards=shards)


class SavedModel:
    """Tensors of a checkpoint, and the manifest's rules for splitting them."""

    def __init__(self, arrays: Mapping[ckpt.ArrayKey, ArrayInfo], manifest: RunManifest) -> None:
        self._states: dict[str, list[ArrayInfo]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shapes of the parameters and buffers, by atom."""
        for key, info in arrays.items():
            if is_extra(key.state):  # small, and no tensor of the model
                continue
            self._states[key.atom].append(info)
            if key.state in WEIGHT_STATES:
                self.shapes[key.atom] = info.shape
        self._frozen = {name for name, trains in manifest.model.requires_grad.items() if not trains}
        self.declared = manifest.model.declared
        self.aliases = manifest.aliases
        self.writer = manifest.writer
        self.batch = manifest.engine.train_batch_size
        self.parameters = [
            name for name, infos in self._states.items() if any(i.key.state == PARAMETER for i in infos)
        ]
        self.buffers = [name for name in self._states if name not in set(self.parameters)]
        self._kinds: dict[_CutBy, list[dict[Kind, int]]] = {}
        self._by_pipeline_rank: dict[_CutBy, list[list[StageArray]]] = {}

    @property
    def layers(self) -> list[str] | None:
        """Chain that pipeline stages are cut from; None if the manifest lacks it or its layers' costs."""
        known = "layer_flops" in self.declared or "pipeline_costs" in self.declared
        return self.declared.get("pipeline_layers") if known else None

    @property
    def states_of_their_own_shape(self) -> list[str]:
        """Optimizer states with another shape than their parameter, for which no cutting rule is known."""
        states = ((name, info) for name in self.parameters for info in self._states[name])
        return ["/".join(info.key) for name, info in states if info.shape != self.shape(name)]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape of a parameter, given by any of its names."""
        return self.shapes[self.aliases.get(parameter, parameter)]

    # --- refusals ----------------------------------------------------------------------------------------

    def refused(
        self,
        pp: int,
        dp: int,
        tp: int,
        settings: Settings = USUAL,
        *,
        batch: int | None = None,
        shard_group: int | None = None,
    ) -> Iterator[RefusedDegrees]:
        """Yield the degrees by which the model, or a global batch of `batch` samples, can't be split."""
        if why := self.refuses_tp(tp, sequence_parallel=settings.sequence_parallel):
            yield RefusedDegrees("tp", [tp], why)
        if why := self.refuses_pp(pp, settings.virtual_stages):
            yield RefusedDegrees("pp", [pp], why)
        if batch is not None and batch % dp:
            yield RefusedDegrees("dp", [dp], f"doesn't divide the global batch of {batch}")
        if shard_group is not None and dp % shard_group:
            yield RefusedDegrees("dp", [dp], f"isn't a multiple of the config's shard group of {shard_group}")

    def refuses_pp(self, pp: int, virtual_stages: int = 1) -> str | None:
        """Return why the model can't be cut into stages for `pp` ranks, or None if it can."""
        if pp * virtual_stages > 1:
            if not self.declared:
                return _UNDECLARED
            if "pipeline_layers" in self.declared and self.layers is None:
                return "needs the costs of the layers, which the manifest doesn't have"
        layers = None if self.layers is None else len(self.layers)
        loss_fn = bool(self.declared.get("loss_fn"))
        return pipeline_refusal(self._model, layers, loss_fn=loss_fn, pp=pp, virtual_stages=virtual_stages)

    def refuses_tp(self, tp: int, *, sequence_parallel: bool = False) -> str | None:
        """Return why the model's layers can't be split this many ways, or None if they can."""
        if tp == 1:
            return None
        if why := self.untold_tp():
            return why
        if "tp_refused" in self.declared:
            return f"doesn't suit the model: {self.declared['tp_refused']}"
        refusals = (division.refusal(tp) for division in self._divisions)
        if (why := next((why for why in refusals if why is not None), None)) is not None:
            return why
        return sequence_refusal(self._model, set(self.plan.values())) if sequence_parallel else None

    def untold_tp(self) -> str | None:
        """Return why tensor parallelism can't be derived from the manifest, or None if it can."""
        if not self.declared:
            return _UNDECLARED
        if "tp_plan" not in self.declared:
            return no_plan(self._model)
        odd = next(((name, style) for name, style in self.plan.items() if style not in STYLES), None)
        return odd and f"needs the style {odd[1]!r} of the tp_plan for {odd[0]}, which is unknown here"

    @property
    def _model(self) -> str:
        return str(self.declared.get("class", "the model"))

    @cached_property
    def _divisions(self) -> list[Division]:
        """Modules, and expert parameters, that must be cut evenly."""
        found: list[Division | None] = []
        units: dict[str, int] = self.declared.get("tp_units", {})
        parameters = {*self.parameters, *self.aliases}
        for name, style in self.plan.items():
            if name in parameters:
                found.append(expert_division(name, style, self.shape(name)))
            elif f"{name}.weight" in parameters:
                shape = self.shape(f"{name}.weight")
                found.append(module_division(name, style, shape, units, parts=self._parts))
        return [division for division in found if division is not None]

    # --- tensor parallelism ------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> dict[str, str]:
        """Style by module or expert parameter, as `parallel.expand_plan` returns it.

        Modules without parameters and buffers aren't in a checkpoint. No style changes them.
        """
        parameters = [*self.parameters, *self.aliases]
        modules = list(dict.fromkeys(o for name in [*parameters, *self.buffers] for o in _owners(name)))
        plan: dict[str, str] = self.declared.get("tp_plan", {})
        expanded: dict[str, str] = {}
        for pattern, names in match_plan(plan, modules, parameters).items():
            expanded |= dict.fromkeys(names, plan[pattern])
        if "tp_refused" in self.declared:
            return expanded
        return with_parts(with_adapters(expanded, modules, parameters), self._parts)

    @property
    def _parts(self) -> dict[str, Parts]:
        parts: dict[str, Parts] = self.declared.get("tp_parts", {})
        return parts

    def tp_dim(self, parameter: str) -> int | None:
        """Return the dim along which tensor parallelism cuts a parameter, or None if it doesn't."""
        owner = parameter.rpartition(".")[0]
        style = self.plan.get(owner, "")
        if style == "moe_tp_experts":
            experts = EXPERT_STYLES.get(self.plan.get(parameter, ""))
            return None if experts is None or experts.packed else len(self.shape(parameter)) + experts.dim
        dim = STYLES[style].dim if style in STYLES else None
        return None if dim is None or dim >= len(self.shape(parameter)) else dim

    # --- pipeline stages ---------------------------------------------------------------------------------

    def by_pipeline_rank(self, pp: int, settings: Settings = USUAL) -> list[list[StageArray]]:
        """Return the arrays on each pipeline rank. An array in two of its stages is listed twice."""
        key = _cut_by(pp, settings)
        if key in self._by_pipeline_rank:
            return self._by_pipeline_rank[key]
        arrays: list[list[StageArray]] = [[] for _ in range(pp)]
        placement = Placement.of(pp, schedule=settings.schedule, virtual_stages=settings.virtual_stages)
        stretches = self._stretches(placement.stages, settings.balance)
        for rank, layers in zip(placement.ranks, stretches, strict=True):
            arrays[rank] += self.parts(layers)
        self._by_pipeline_rank[key] = arrays
        return arrays

    def kinds(self, pp: int, settings: Settings = USUAL) -> list[dict[Kind, int]]:
        """Return the number of arrays of each kind, on each pipeline rank."""
        key = _cut_by(pp, settings)
        if key not in self._kinds:
            arrays = self.by_pipeline_rank(pp, settings)
            self._kinds[key] = [dict(Counter(part.kind for part in parts)) for parts in arrays]
        return self._kinds[key]

    def parts(self, layers: Collection[str] | None) -> list[StageArray]:
        """Return the arrays of some layers, or of the whole model. A tied array has the first name found."""
        here: dict[str, str] = {}
        for name in self._of([*self.parameters, *self.aliases], layers):
            here.setdefault(self.aliases.get(name, name), name)
        parts = []
        for atom, name in here.items():
            dim, own = self.tp_dim(name), "frozen" if atom in self._frozen else "trained"
            for info in self._states[atom]:
                alike = info.shape == self.shape(atom)
                role: Any = own if info.key.state == PARAMETER else "state"
                size, tp_dim = itemsize(info.dtype), dim if alike else None
                parts.append(StageArray(info, name, Kind(info.shape, size, tp_dim, not alike, role)))
        for name in self._of(self.buffers, layers):
            for info in self._states[name]:
                kind = Kind(info.shape, itemsize(info.dtype), None, True, "buffer")
                parts.append(StageArray(info, name, kind))
        return parts

    def _of(self, names: Sequence[str], layers: Collection[str] | None) -> list[str]:
        """Return the names that belong to one of the layers."""
        if layers is None:
            return list(names)
        return [name for name in names if any(owner in layers for owner in _owners(name))]

    def _stretches(self, stages: int, balance: Balance) -> list[Collection[str] | None]:
        """Return the layers of each stage; None stands for the whole model."""
        layers = self.layers
        if layers is None:
            assert stages == 1, "refuses_pp was asked first"
            return [None]
        costs = self.declared.get("pipeline_costs")
        if costs is None:
            by: dict[str, Callable[[], list[int]]] = {
                "flops": lambda: list(self.declared["layer_flops"]),
                "parameters": lambda: [self._elements(name) for name in layers],
                "uniform": lambda: [1] * len(layers),
            }
            costs = by[balance]()
        return [frozenset(layers[a:b]) for a, b in _cuts(tuple(costs), stages)]

    def _elements(self, layer: str) -> int:
        names = (n for n in [*self.parameters, *self.aliases] if n.startswith(f"{layer}."))
        return sum(prod(self.shape(atom)) for atom in {self.aliases.get(n, n) for n in names})


_cuts = lru_cache(balanced_cuts)


def _cut_by(pp: int, settings: Settings) -> _CutBy:
    """Return a key of the settings that decide on the stages."""
    return pp, settings.schedule, settings.virtual_stages, settings.balance


def _owners(name: str) -> Iterator[str]:
    """Yield the modules that contain a parameter or buffer, outermost first."""
    parts = name.split(".")[:-1]
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
