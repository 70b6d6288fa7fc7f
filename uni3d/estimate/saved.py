"""What each rank of any topology holds of a checkpoint's arrays: without ranks, torch or the model.

The manifest names the layers of the model's chain and the modules that tensor parallelism cuts
(`uni3d.checkpoint.model_spec`); the arrays have their shapes. The boxes that a run's ranks would load follow
by the rules of training: pipeline stages (`parallel.placement`), tensor parallelism along the dim of a style
(`parallel.tp_styles`), ZeRO along the first dim (`uni3d.estimate.save.part_boxes`). Ranks at different places
of the pipeline hold different arrays, ranks at the same place different boxes of the same arrays. The ranks
that wrote a checkpoint are in `uni3d.estimate.holders`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ckpt.read import WEIGHT_STATES
from parallel.combinations import pipeline_refusal
from parallel.degrees import Ranks
from parallel.placement import Placement, balanced_cuts
from parallel.settings import Balance, Settings
from parallel.tp_styles import (
    STYLES,
    Division,
    expert_division,
    match_plan,
    module_division,
    no_plan,
    sequence_refusal,
)
from uni3d.estimate.save import part_boxes

if TYPE_CHECKING:
    import ckpt
    from ckpt.read import ArrayInfo
    from uni3d.manifest import RunManifest

PARAMETER, BUFFER = WEIGHT_STATES
"""The states that are a parameter's and a buffer's own value."""

USUAL = Settings()
"""Settings of a run whose config isn't known."""

_UNDECLARED = "can't be checked: the manifest doesn't say how the model may be split"
_CutBy = tuple[int, str, int, str]


class RefusedDegree(NamedTuple):
    """A degree that a model or its batch can't be split by."""

    axis: str
    degree: int
    why: str

    def __str__(self) -> str:
        return f"{self.axis} {self.degree} {self.why}"


class StageArray(NamedTuple):
    """An array of which every rank at one place of the pipeline holds a box."""

    info: ArrayInfo
    name: str
    """Of its tensor there: of a tied one's names the first."""
    tp_dim: int | None
    whole: bool
    """Whether every rank has all of it, as of a buffer."""
    role: Literal["trained", "frozen", "state", "buffer"]
    """A parameter that is trained or one that isn't, an optimizer's state, a buffer."""

    def boxes(self, ranks: Ranks, shards: int) -> list[ckpt.Box]:
        """By rank of the pipeline's place, tensor-parallel neighbours side by side."""
        shards, tp_dim = (1, None) if self.whole else (shards, self.tp_dim)
        return part_boxes(self.info.shape, tp_dim, dp=ranks.dp, tp=ranks.tp, shards=shards)


class Kind(NamedTuple):
    """What an array's part of a rank's memory depends on."""

    shape: tuple[int, ...]
    itemsize: int
    tp_dim: int | None
    whole: bool
    role: Literal["trained", "frozen", "state", "buffer"]

    def largest(self, tp: int, shards: int) -> int:
        """Elements of the largest box that a rank has: the first, as all are cut in ceil(n / k)."""
        shape = list(self.shape)
        if self.whole or not shape:
            return prod(shape)
        if self.tp_dim is not None:
            shape[self.tp_dim] = -(-shape[self.tp_dim] // tp)
        shape[0] = -(-shape[0] // shards)
        return prod(shape)


def _kind(part: StageArray) -> Kind:
    info, role = part.info, part.role
    size = info.nbytes // max(1, prod(info.shape))
    return Kind(info.shape, size, part.tp_dim, part.whole, role)


class SavedModel:
    """A checkpoint's tensors, and what is known of how they may be split."""

    def __init__(self, arrays: Mapping[ckpt.ArrayKey, ArrayInfo], manifest: RunManifest) -> None:
        self._states: dict[str, list[ArrayInfo]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the parameters and buffers."""
        for key, info in arrays.items():
            self._states[key.atom].append(info)
            if key.state in (PARAMETER, BUFFER):
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
        self._places: dict[_CutBy, list[list[StageArray]]] = {}

    @property
    def layers(self) -> list[str] | None:
        """The chain that pipeline stages are cut from, if the manifest has one and what it is cut by."""
        known = "layer_flops" in self.declared or "pipeline_costs" in self.declared
        return self.declared.get("pipeline_layers") if known else None

    @property
    def states_of_their_own_shape(self) -> list[str]:
        """Optimizer states of another shape than their parameter's: how they are cut isn't known here."""
        return [
            "/".join(info.key)
            for name in self.parameters
            for info in self._states[name]
            if info.shape != self.shape(name)
        ]

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Of a parameter, by any of its names."""
        return self.shapes[self.aliases.get(parameter, parameter)]

    # --- what can't be -----------------------------------------------------------------------------------

    def refused(
        self,
        pp: int,
        dp: int,
        tp: int,
        settings: Settings = USUAL,
        *,
        batch: int | None = None,
        shard_group: int | None = None,
    ) -> Iterator[RefusedDegree]:
        """Yield the degrees by which the model, or a global batch of so many samples, can't be split."""
        if why := self.refuses_tp(tp, sequence_parallel=settings.sequence_parallel):
            yield RefusedDegree("tp", tp, why)
        if why := self.refuses_pp(pp, settings.virtual_stages):
            yield RefusedDegree("pp", pp, why)
        if batch is not None and batch % dp:
            yield RefusedDegree("dp", dp, f"doesn't divide the global batch of {batch}")
        if shard_group is not None and dp % shard_group:
            yield RefusedDegree("dp", dp, f"isn't a multiple of the config's shard group of {shard_group}")

    def refuses_pp(self, pp: int, virtual_stages: int = 1) -> str | None:
        """Return why the model can't be cut into this many stages on as many ranks, or None if it can."""
        if pp * virtual_stages > 1:
            if not self.declared:
                return _UNDECLARED
            if "pipeline_layers" in self.declared and self.layers is None:
                return "needs the costs of the layers, which the manifest doesn't have"
        return pipeline_refusal(
            self._model,
            None if self.layers is None else len(self.layers),
            loss_fn=bool(self.declared.get("loss_fn")),
            pp=pp,
            virtual_stages=virtual_stages,
        )

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
        """Modules and parameters of experts that must be cut evenly."""
        found: list[Division | None] = []
        units: dict[str, int] = self.declared.get("tp_units", {})
        parameters = {*self.parameters, *self.aliases}
        for name, style in self.plan.items():
            if name in parameters:
                found.append(expert_division(name, style, self.shape(name)))
            elif f"{name}.weight" in parameters:
                found.append(module_division(name, style, self.shape(f"{name}.weight"), units))
        return [division for division in found if division is not None]

    # --- tensor parallelism ------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> dict[str, str]:
        """Module, or parameter of experts -> style, as `parallel.expand_plan` gives it.

        A module without parameters or buffers isn't known here, nor does a style change it.
        """
        parameters = [*self.parameters, *self.aliases]
        modules = list(dict.fromkeys(o for name in [*parameters, *self.buffers] for o in _owners(name)))
        plan: dict[str, str] = self.declared.get("tp_plan", {})
        expanded: dict[str, str] = {}
        for pattern, names in match_plan(plan, modules, parameters).items():
            expanded |= dict.fromkeys(names, plan[pattern])
        return expanded

    def tp_dim(self, parameter: str) -> int | None:
        """Along which dim tensor parallelism of any degree cuts a parameter; None if it doesn't."""
        owner = parameter.rpartition(".")[0]
        style = self.plan.get(owner, "")
        if style == "moe_tp_experts":
            return len(self.shape(parameter)) - 1 if self.plan.get(parameter) == "rowwise" else None
        dim = STYLES[style].dim if style in STYLES else None
        return None if dim is None or dim >= len(self.shape(parameter)) else dim

    # --- pipeline stages ---------------------------------------------------------------------------------

    def places(self, pp: int, settings: Settings = USUAL) -> list[list[StageArray]]:
        """Return the arrays at each place of the pipeline; one that two of its stages have comes twice."""
        key = _cut_by(pp, settings)
        if key in self._places:
            return self._places[key]
        places: list[list[StageArray]] = [[] for _ in range(pp)]
        placement = Placement.of(pp, schedule=settings.schedule, virtual_stages=settings.virtual_stages)
        for rank, layers in zip(
            placement.ranks, self._stretches(placement.stages, settings.balance), strict=True
        ):
            places[rank] += self.parts(layers)
        self._places[key] = places
        return places

    def kinds(self, pp: int, settings: Settings = USUAL) -> list[dict[Kind, int]]:
        """Return the number of arrays of each kind, hence of equal memory, at each place of the pipeline."""
        key = _cut_by(pp, settings)
        if key not in self._kinds:
            self._kinds[key] = [
                dict(Counter(_kind(part) for part in parts)) for parts in self.places(pp, settings)
            ]
        return self._kinds[key]

    def parts(self, layers: Collection[str] | None) -> list[StageArray]:
        """The arrays of a stretch of layers, or of the model. Of a tied one's names the first here counts."""
        here: dict[str, str] = {}
        for name in self._of([*self.parameters, *self.aliases], layers):
            here.setdefault(self.aliases.get(name, name), name)
        parts = []
        for atom, name in here.items():
            dim, own = self.tp_dim(name), "frozen" if atom in self._frozen else "trained"
            for info in self._states[atom]:
                alike = info.shape == self.shape(atom)
                role: Any = own if info.key.state == PARAMETER else "state"
                parts.append(StageArray(info, name, dim if alike else None, not alike, role))
        for name in self._of(self.buffers, layers):
            parts += [StageArray(info, name, None, True, "buffer") for info in self._states[name]]
        return parts

    def _of(self, names: Sequence[str], layers: Collection[str] | None) -> list[str]:
        """Those of the names that belong to one of the layers."""
        if layers is None:
            return list(names)
        return [name for name in names if any(owner in layers for owner in _owners(name))]

    def _stretches(self, stages: int, balance: Balance) -> list[Collection[str] | None]:
        """The layers of each stage; None for all the model."""
        layers = self.layers
        if layers is None:
            assert stages == 1, "asked for before"
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
    """Return the settings that decide on the stages, as a key."""
    return pp, settings.schedule, settings.virtual_stages, settings.balance


def _owners(name: str) -> Iterator[str]:
    """The modules that a parameter or a buffer lies in, outermost first."""
    parts = name.split(".")[:-1]
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
