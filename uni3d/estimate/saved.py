"""What each rank of any topology holds of a checkpoint's arrays: without ranks, torch or the model.

The manifest says which layers the model is a chain of, which modules tensor parallelism cuts and how
(`uni3d.checkpoint.model_spec`); the arrays say their shapes. From these follow the boxes that the ranks of a run would
load, by the rules by which training cuts a model: pipeline stages (`parallel.stages`), tensor parallelism
along the dim that a style says (`parallel.tensor`), ZeRO along the first dim (`uni3d.estimate.save.part_boxes`).
Ranks at different places of the pipeline hold different arrays, those at the same place other boxes of the
same ones. Who held what when a checkpoint was written is `uni3d.estimate.holders`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ckpt.read import WEIGHT_STATES
from uni3d.estimate.save import Ranks, balanced_cuts, part_boxes

if TYPE_CHECKING:
    import ckpt
    from ckpt.read import ArrayInfo
    from uni3d.manifest import RunManifest

PARAMETER, BUFFER = WEIGHT_STATES
"""The states that are a parameter's and a buffer's own value."""

_TP_DIMS = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "colwise_logits", "embedding_rowwise"), 0),
    **dict.fromkeys(("rowwise", "rowwise_split_input"), 1),
}
"""By style, the dim of a weight that is cut; a bias is cut along its only one, or not at all."""

_WHOLE = (
    "gather_input",
    "sequence_parallel",
    "replicated_with_grad_allreduce",
    "moe_tp_experts",
    "packed_colwise",
)
"""Styles that leave a module's weights whole, but for those of experts (`SavedModel.tp_dim`)."""

STYLES = (*_TP_DIMS, *_WHOLE)

_EVENLY = ("colwise", "rowwise", "rowwise_split_input")
"""Styles that need a degree that divides."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a run is split beside its degrees; the words are the config's."""

    schedule: str = "1f1b"
    virtual_stages: int = 1
    balance: Literal["flops", "parameters", "uniform"] = "flops"
    shard_group: int | None = None
    """Ranks over which ZeRO shards, a divisor of dp; None is all of dp."""

    def shards(self, ranks: Ranks) -> int:
        """Over how many ranks ZeRO shards."""
        return 1 if ranks.zero == 0 else self.shard_group or ranks.dp


class Refusal(NamedTuple):
    """A degree that can't be."""

    axis: str
    degree: int
    why: str

    def __str__(self) -> str:
        return f"{self.axis} {self.degree} {self.why}"


class Part(NamedTuple):
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


def _kind(part: Part) -> Kind:
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
        self._kinds: dict[tuple[int, Cut], list[dict[Kind, int]]] = {}
        self._places: dict[tuple[int, Cut], list[list[Part]]] = {}

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
        self, pp: int, dp: int, tp: int, cut: Cut, batch: int | None, *, sequence_parallel: bool = False
    ) -> Iterator[Refusal]:
        """The degrees that the model, or a global batch of so many samples, can't be split by."""
        if why := self.refuses_tp(tp, sequence_parallel=sequence_parallel):
            yield Refusal("tp", tp, why)
        if why := self.refuses_pp(pp, cut.virtual_stages):
            yield Refusal("pp", pp, why)
        if batch is not None and batch % dp:
            yield Refusal("dp", dp, f"doesn't divide the global batch of {batch}")
        if cut.shard_group is not None and dp % cut.shard_group:
            yield Refusal("dp", dp, f"isn't a multiple of the config's shard group of {cut.shard_group}")

    def refuses_pp(self, pp: int, virtual_stages: int = 1) -> str | None:
        """Why the model can't be cut into so many stages on so many ranks; None if it can."""
        stages, kind = pp * virtual_stages, self.declared.get("class", "the model")
        if stages == 1:
            return None
        if "pipeline_layers" not in self.declared:
            return f"{self._unsaid('pipeline_layers')}, so that pp must be 1"
        if self.layers is None:
            return "the manifest is older than those that say what layers cost, so that pp must be 1"
        if not self.declared.get("loss_fn"):
            return f"{kind} has no loss_fn(outputs, targets), which a pipeline needs; pp must be 1"
        if len(self.layers) < stages:
            of_rank = "" if virtual_stages == 1 else f", {virtual_stages} on each rank,"
            return f"has more stages{of_rank} than {kind} has pipeline_layers, {len(self.layers)}"
        return None

    def refuses_tp(self, tp: int, *, sequence_parallel: bool = False) -> str | None:
        """Why the model's layers can't be split so many ways; None if they can. See `parallel.check_plan`."""
        if tp == 1:
            return None
        if why := self.untold_tp():
            return f"{why}, so that tp must be 1"
        if "tp_refused" in self.declared:
            return f"{self.declared['tp_refused']}; tp must be 1"
        for name, (style, parts, size) in self._indivisible.items():
            if parts % tp:
                what = f"{parts} heads" if parts != size else f"{size} features"
                return f"doesn't divide the {what} of {name} ({style})"
        styles = set(self.plan.values())
        if sequence_parallel and not {"sequence_parallel", "embedding_rowwise"} <= styles:
            return (
                "sequence_parallel needs 'embedding_rowwise' and 'sequence_parallel' in the model's tp_plan"
            )
        return None

    def untold_tp(self) -> str | None:
        """Why nobody knows here what tensor parallelism cuts; None if it is known."""
        if "tp_plan" not in self.declared:
            return self._unsaid("tp_plan")
        odd = next(((name, style) for name, style in self.plan.items() if style not in STYLES), None)
        return odd and f"the tp_plan has the style {odd[1]!r} for {odd[0]}, which isn't known here"

    def _unsaid(self, what: str) -> str:
        if not self.declared:
            return "the manifest doesn't say how the model may be split"
        return f"{self.declared.get('class', 'the model')} has no {what}"

    @cached_property
    def _indivisible(self) -> dict[str, tuple[str, int, int]]:
        """Of each module that must be cut evenly: style, number of parts, size of the dim that is cut."""
        found: dict[str, tuple[str, int, int]] = {}
        units: dict[str, int] = self.declared.get("tp_units", {})
        parameters = {*self.parameters, *self.aliases}
        for name, style in self.plan.items():
            if name in parameters:  # of experts, stacked: gate and up lie one behind the other
                packed = style == "packed_colwise"
                size = self.shape(name)[-2] // 2 if packed else self.shape(name)[-1]
                found[name] = style, size, size
            elif style in _EVENLY and f"{name}.weight" in parameters:
                size = self.shape(f"{name}.weight")[_TP_DIMS[style]]
                parts = next((n for pattern, n in units.items() if fnmatchcase(name, pattern)), size)
                found[name] = style, parts, size
        return found

    # --- tensor parallelism ------------------------------------------------------------------------------

    @cached_property
    def plan(self) -> dict[str, str]:
        """Module, or parameter of experts -> style, as `parallel.expand_plan` gives it.

        A module without parameters or buffers isn't known here, nor does a style change it.
        """
        parameters = [*self.parameters, *self.aliases]
        modules = list(dict.fromkeys(o for name in [*parameters, *self.buffers] for o in _owners(name)))
        expanded: dict[str, str] = {}
        for pattern, style in self.declared.get("tp_plan", {}).items():
            matches = [name for name in modules if fnmatchcase(name, pattern)]
            matches = matches or [name for name in parameters if fnmatchcase(name, pattern)]
            expanded |= dict.fromkeys(matches, style)
        return expanded

    def tp_dim(self, parameter: str) -> int | None:
        """Along which dim tensor parallelism of any degree cuts a parameter; None if it doesn't."""
        owner = parameter.rpartition(".")[0]
        style = self.plan.get(owner, "")
        if style == "moe_tp_experts":
            return len(self.shape(parameter)) - 1 if self.plan.get(parameter) == "rowwise" else None
        dim = _TP_DIMS.get(style)
        return None if dim is None or dim >= len(self.shape(parameter)) else dim

    # --- pipeline stages ---------------------------------------------------------------------------------

    def places(self, pp: int, cut: Cut) -> list[list[Part]]:
        """For each place of the pipeline, the arrays of its stages; one twice that two of them have."""
        if (pp, cut) in self._places:
            return self._places[pp, cut]
        places: list[list[Part]] = [[] for _ in range(pp)]
        for stage, layers in enumerate(self._stretches(pp * cut.virtual_stages, cut.balance)):
            turn, rank = divmod(stage, pp)
            back = cut.schedule == "zero_bubble_v" and turn % 2
            places[pp - 1 - rank if back else rank] += self.parts(layers)
        self._places[pp, cut] = places
        return places

    def kinds(self, pp: int, cut: Cut) -> list[dict[Kind, int]]:
        """For each place, how many of its arrays there are of each kind: those with the same memory."""
        if (pp, cut) not in self._kinds:
            self._kinds[pp, cut] = [
                dict(Counter(_kind(part) for part in parts)) for parts in self.places(pp, cut)
            ]
        return self._kinds[pp, cut]

    def parts(self, layers: Collection[str] | None) -> list[Part]:
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
                parts.append(Part(info, name, dim if alike else None, not alike, role))
        for name in self._of(self.buffers, layers):
            parts += [Part(info, name, None, True, "buffer") for info in self._states[name]]
        return parts

    def _of(self, names: Sequence[str], layers: Collection[str] | None) -> list[str]:
        """Those of the names that belong to one of the layers."""
        if layers is None:
            return list(names)
        return [name for name in names if any(owner in layers for owner in _owners(name))]

    def _stretches(self, stages: int, balance: str) -> list[Collection[str] | None]:
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


def _owners(name: str) -> Iterator[str]:
    """The modules that a parameter or a buffer lies in, outermost first."""
    parts = name.split(".")[:-1]
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
