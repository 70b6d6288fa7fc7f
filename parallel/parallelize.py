"""Turn a plain model into this rank's part: check, split into stages and tensors, shard, initialize."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from parallel.activation_checkpointing import change_forward
from parallel.combinations import check_combination, pipeline_refusal
from parallel.degrees import Ranks
from parallel.dtensor_layout import StageLayout
from parallel.fsdp_internals import keep_class_names
from parallel.gradients import ScalarGradients
from parallel.layers import blocks, units
from parallel.loss import LossFn, compiled
from parallel.parameter_hooks import find_extras, set_hooks
from parallel.pipeline import Pipeline
from parallel.placement import Placement
from parallel.replica_check import Replicas
from parallel.settings import Settings
from parallel.stages import Chain, layer_names, split_layers
from parallel.tensor import (
    Declared,
    apply_tensor_parallel,
    check_plan,
    declared_splits,
    expand_plan,
    rowwise_weights,
)
from parallel.ties import TiedGradients, tied_names
from parallel.topology import Topology
from parallel.tp_styles import no_plan
from parallel.values import BuiltValues, allocate, place_buffers
from parallel.weights import check_buffers, check_can_materialise, is_meta, materialise
from parallel.zero import Zero, ZeroStages


@dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """This rank's part of a model, ready to train."""

    module: nn.Module
    """The rank's stages, sharded; its parameters have the names of the unsplit model."""
    topology: Topology
    zero: ZeroStages
    ties: dict[str, str]
    """First name of each other name of a tied parameter, over the whole model."""
    tied: TiedGradients
    scalars: ScalarGradients
    replicas: Replicas
    loss_fn: LossFn | None
    """`loss_fn(outputs, targets)`; None for a model that computes its own loss."""
    pipeline: Pipeline | None
    """Pipeline that runs whole batches; None for a single stage, which needs no schedule."""
    rowwise: set[str]
    """Weights that tensor parallelism, of any degree, cuts along their second dim."""
    sequence_parallel: bool
    """True if the tensor-parallel ranks split sequences."""
    layers: list[list[str]] | None
    """Layers at each place on the pipeline axis; None for a model that isn't a chain."""

    def first_name(self, name: str) -> str:
        """Return the name of one of this rank's parameters in the whole model."""
        return self.ties.get(name, name)

    # --- as checkpoints see it (`uni3d.stored_model`) ------------------------------------------

    @cached_property
    def layout(self) -> StageLayout:
        return StageLayout(self.topology)

    @property
    def flat(self) -> None:
        """No part is wrapped in FSDP1."""

    @property
    def copies(self) -> Collection[str]:
        return self.tied.copies

    @property
    def stage(self) -> int:
        return self.topology.pp_rank

    @property
    def speaks_for_stage(self) -> bool:
        return self.topology.speaks_for_stage

    @property
    def device(self) -> torch.device:
        return self.topology.device

    @property
    def ranks(self) -> Ranks:
        degrees = self.topology.degrees
        return Ranks(pp=degrees.pp, dp=degrees.dp, tp=degrees.tp, zero=self.zero.stage)

    @property
    def shard_group(self) -> int:
        return self.topology.mesh["shard"].size()

    @property
    def data_part(self) -> tuple[int, int]:
        return self.topology.dp_rank, self.topology.degrees.dp

    def carry_writes(self) -> None:
        self.zero.carry_writes()

    def reshard(self) -> None:
        self.zero.reshard()


def build(
    model: nn.Module, topology: Topology, settings: Settings, *, loaded_later: bool = False
) -> ParallelModel:
    """Turn `model`, built alike on every rank, into this rank's part of it. Collective.

    The model may have attributes that say how to split it (`pipeline_layers`, `tp_plan`, `tp_units`,
    `tp_parts`), its loss (`loss_fn(outputs, targets)`) and, for a model on the meta device, how to initialize
    its parameters (`init_parameter(name, tensor, generator)`). `model` can't be used afterwards.

    With `loaded_later`, the parameters are NaN, for the caller to load; buffers have their values.

    Raises:
        ValueError: the model can't be split this way; the message names the layer, the size, the degree.
    """
    degrees, layers, declared = topology.degrees, layer_names(model), declared_splits(model)
    plan = _check_splits(model, declared, topology, settings, layers)
    extras = find_extras(model)
    ties = tied_names(model)
    fill = _filler(model, ties, topology, settings, loaded_later=loaded_later)
    loss_fn, takes_fp32 = _loss(model, settings, degrees.tp)
    rowwise = rowwise_weights(model, declared.plan)

    module, placement, stage_names, repeating = model, Placement(ranks=(0,)), [_names(model)], blocks(model)
    stretches: Sequence[nn.Module] = [model]
    kept: list[list[str]] | None = None
    if layers is not None:
        placement = Placement.of(
            degrees.pp, schedule=settings.schedule, virtual_stages=settings.virtual_stages
        )
        stages = split_layers(model, layers, placement.stages, settings.balance)
        stage_names = [_names(model, names) for names in stages]
        kept = [[name for i in placement.on(place) for name in stages[i]] for place in range(degrees.pp)]
        repeating = blocks(model, layers)
        module = Chain(model, [stages[i] for i in placement.on(topology.pp_rank)])
        stretches = module.stretches()
    sequence = settings.sequence_parallel
    apply_tensor_parallel(module, plan, topology.tp_mesh, declared.parts, sequence_parallel=sequence)
    change_forward(repeating, settings.recompute, settings.compile)
    zeros = []
    for stretch, stage in zip(stretches, placement.on(topology.pp_rank), strict=True):
        candidates = repeating if layers is None else list(stretch.children())
        last = placement.is_last(stage)
        zeros.append(_shard(stretch, candidates, topology, settings, last=last, fp32=last and takes_fp32))
    fill(module)
    zero = ZeroStages(zeros)
    set_hooks(module, zero, extras, topology)
    return ParallelModel(
        module=module,
        topology=topology,
        zero=zero,
        ties=ties,
        tied=TiedGradients(module, ties, stage_names, placement, topology),
        scalars=ScalarGradients(module, topology),
        replicas=Replicas(module, topology),
        loss_fn=loss_fn,
        pipeline=_pipeline(zeros, placement, topology, loss_fn, settings),
        rowwise=rowwise,
        sequence_parallel=sequence,
        layers=kept,
    )


def _filler(
    model: nn.Module, ties: dict[str, str], topology: Topology, settings: Settings, *, loaded_later: bool
) -> Callable[[nn.Module], None]:
    """Take the values out of the model; return the function that gives them to this rank's part of it.

    Collective, and so is the function.

    Raises:
        ValueError: the model is on the meta device, and its buffers too, or it can't be initialized.
    """
    check_buffers(model)
    device = torch.device("cpu") if settings.offload else topology.device
    init = check_can_materialise(model) if is_meta(model) and not loaded_later else None
    if init is not None:
        place_buffers(model, topology.device)
        return partial(materialise, init_parameter=init, seed=settings.seed, device=device, first_names=ties)
    values = BuiltValues(model)  # before buffers are moved, as no device must have all parameters
    place_buffers(model, topology.device)
    if loaded_later:  # the values, if any, are forgotten
        return partial(allocate, device=device, nan=True)

    def fill(module: nn.Module) -> None:
        allocate(module, device)
        values.hand_out(module, ties, topology.device)

    return fill


def _pipeline(
    zeros: Sequence[Zero],
    placement: Placement,
    topology: Topology,
    loss_fn: LossFn | None,
    settings: Settings,
) -> Pipeline | None:
    if loss_fn is None or placement.stages == 1:
        return None
    return Pipeline(zeros, placement, topology, loss_fn, settings.schedule)


def _loss(model: nn.Module, settings: Settings, tp: int) -> tuple[LossFn | None, bool]:
    """Return the model's loss function, compiled if the layers are, and whether it takes outputs in fp32."""
    loss_fn: LossFn | None = getattr(model, "loss_fn", None)
    if loss_fn is None or settings.compile is None or tp > 1:
        return loss_fn, loss_fn is not None
    return compiled(loss_fn, settings.compile), False


def _shard(
    stretch: nn.Module,
    layers: Sequence[nn.Module],
    topology: Topology,
    settings: Settings,
    *,
    last: bool,
    fp32: bool,
) -> Zero:
    """Shard a stretch of the model, the last one or one before others, whose outputs are in `fp32` or not."""
    zero = Zero(
        stretch,
        units(stretch, layers),
        topology.zero_mesh,
        settings.zero_stage,
        precision=settings.precision,
        offload=settings.offload,
        persistence_threshold=settings.persistence_threshold,
        last=last,
        output=torch.float32 if fp32 else None,
    )
    keep_class_names(stretch)
    return zero


def _names(model: nn.Module, layers: Sequence[str] | None = None) -> set[str]:
    """Return all names of the parameters of a model, or of some of its layers."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if layers is None:
        return names
    return {name for name in names if name.startswith(tuple(f"{layer}." for layer in layers))}


def _check_splits(
    model: nn.Module, declared: Declared, topology: Topology, settings: Settings, layers: Sequence[str] | None
) -> dict[str, str]:
    """Check that the model can be split as asked; return its expanded tensor-parallel plan."""
    degrees = topology.degrees
    kind, virtual = type(model).__name__, settings.virtual_stages
    check_combination(settings)
    count, loss_fn = None if layers is None else len(layers), getattr(model, "loss_fn", None) is not None
    if why := pipeline_refusal(kind, count, loss_fn=loss_fn, pp=degrees.pp, virtual_stages=virtual):
        given = f"pp({degrees.pp})" if virtual == 1 else f"virtual_stages({virtual})"
        raise ValueError(
            f"{given} {why}; use pp=1" if virtual == 1 else f"{given} {why}; use virtual_stages=1"
        )
    if degrees.tp > 1 and not declared.plan:
        raise ValueError(f"tp({degrees.tp}) {no_plan(kind)}; use tp=1")
    if degrees.tp == 1:  # nothing is split, so the plan may have unknown styles
        return {}
    plan = expand_plan(model, declared.plan, declared.parts)
    check_plan(
        model,
        plan,
        declared.units,
        degrees.tp,
        parts=declared.parts,
        sequence_parallel=settings.sequence_parallel,
    )
    return plan
