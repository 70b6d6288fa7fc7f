"""From a plain model to this rank's part of it, in order: check, cut, split, change layers, shard, fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from parallel.blocks import blocks, change_forward, units
from parallel.gradients import ScalarGradients, TiedGradients
from parallel.pipeline import LossFn, Pipeline
from parallel.replicas import Replicas
from parallel.settings import Settings
from parallel.stages import Chain, layer_names, split_layers
from parallel.tensor import (
    apply_tensor_parallel,
    check_plan,
    expand_plan,
    rowwise_weights,
    tied_names,
)
from parallel.topology import Topology
from parallel.weights import broadcast_from_first_rank, check_can_materialise, is_meta, materialise
from parallel.zero import Zero


@dataclass(frozen=True, kw_only=True)
class ParallelModel:
    """This rank's part of a model, ready to train."""

    module: nn.Module
    """The rank's stage, sharded; its parameters have the names of the unsplit model."""
    topology: Topology
    zero: Zero
    ties: dict[str, str]
    """Other names of tied parameters -> the first name, over the whole model."""
    tied: TiedGradients
    scalars: ScalarGradients
    replicas: Replicas
    pipeline: Pipeline | None
    """Runs whole batches; None for a model that computes its own loss."""
    rowwise: set[str]
    """Weights that tensor parallelism, of any degree, cuts along their second dim."""
    sequence_parallel: bool
    """Whether the tensor-parallel ranks split sequences."""

    def first_name(self, name: str) -> str:
        """The name under which a parameter of this rank is known everywhere."""
        return self.ties.get(name, name)


def build(model: nn.Module, topology: Topology, settings: Settings) -> ParallelModel:
    """Collective: turn `model`, built alike on every rank, into this rank's part of it.

    The model may say how it is split: `pipeline_layers`, `tp_plan` and `tp_units`; what to train:
    `loss_fn(outputs, targets)`; and, when it was built on the meta device, how to fill its parameters:
    `init_parameter(name, tensor, generator)`. `model` itself is used up.

    Raises:
        ValueError: the model can't be split this way; the message names the layer, the size, the degree.
    """
    degrees = topology.degrees
    layers = layer_names(model)
    plan = _check_splits(model, topology, layers, settings)
    init = check_can_materialise(model) if is_meta(model) else None
    if init is None:
        broadcast_from_first_rank(model.to(topology.device))
    loss_fn: LossFn | None = getattr(model, "loss_fn", None)
    ties = tied_names(model)
    rowwise = rowwise_weights(model, getattr(model, "tp_plan", None) or {})

    module: nn.Module = model
    stage_names = [{name for name, _ in model.named_parameters(remove_duplicate=False)}]
    if layers is not None:
        stages = split_layers(model, layers, degrees.pp)
        stage_names = [
            {n for n in stage_names[0] if n.startswith(tuple(f"{k}." for k in kept))} for kept in stages
        ]
        module = Chain(model, stages[topology.pp_rank])
    apply_tensor_parallel(module, plan, topology.tp_mesh, sequence_parallel=settings.sequence_parallel)
    change_forward(blocks(module), settings.recompute, settings.compile)
    ends_in_loss = loss_fn is not None and topology.is_last_stage
    zero = Zero(
        module,
        units(module),
        topology.zero_mesh,
        settings.zero_stage,
        precision=settings.precision,
        offload=settings.offload,
        persistence_threshold=settings.persistence_threshold,
        output=torch.float32 if ends_in_loss else None,  # losses are computed in fp32
    )
    if init is not None:
        device = torch.device("cpu") if settings.offload else topology.device
        materialise(module, init, seed=settings.seed, device=device, first_names=ties)
    return ParallelModel(
        module=module,
        topology=topology,
        zero=zero,
        ties=ties,
        tied=TiedGradients(module, ties, stage_names, topology),
        scalars=ScalarGradients(module, topology),
        replicas=Replicas(module, topology),
        pipeline=None if loss_fn is None else Pipeline(zero, topology, loss_fn),
        rowwise=rowwise,
        sequence_parallel=settings.sequence_parallel,
    )


def _check_splits(
    model: nn.Module, topology: Topology, layers: Sequence[str] | None, settings: Settings
) -> dict[str, str]:
    """Check that the model can be split as the topology wants; returns its expanded tensor-parallel plan."""
    degrees = topology.degrees
    kind = type(model).__name__
    if degrees.pp > 1 and layers is None:
        raise ValueError(
            f"pp({degrees.pp}) needs a model with pipeline_layers, which {kind} hasn't; use pp 1"
        )
    if degrees.pp > 1 and getattr(model, "loss_fn", None) is None:
        raise ValueError(
            f"pp({degrees.pp}) needs a model with a loss_fn(outputs, targets), which {kind} hasn't"
        )
    declared = getattr(model, "tp_plan", None)
    if degrees.tp > 1 and not declared:
        raise ValueError(f"tp({degrees.tp}) needs a model with a tp_plan, which {kind} hasn't; use tp 1")
    if degrees.tp == 1:  # then a plan may have styles that aren't known here: nothing is split
        return {}
    plan = expand_plan(model, declared or {})
    check_plan(
        model,
        plan,
        getattr(model, "tp_units", {}),
        degrees.tp,
        sequence_parallel=settings.sequence_parallel,
    )
    return plan
