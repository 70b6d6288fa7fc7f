"""Pipeline parallelism with torch's stages and schedules. ZeRO is told of each backward pass.

A model of one stage needs no schedule: see `ParallelModel.pipeline`.

The schedules: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al. 2021a), interleaved 1F1B
(Narayanan et al. 2021b), ZB1P and ZB-V (Zero bubble pipeline parallelism, Qi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.combinations import MANY_STAGES
from parallel.loss import Loss, LossFn, split_logits
from parallel.pipeline_stage import TorchStage
from parallel.placement import Placement
from parallel.settings import Schedule
from parallel.topology import Topology
from parallel.zero import Zero

KEPT_SCHEDULES = 4
"""Number of schedules that are kept: training's, evaluation's, and some for batches of another shape."""


class Pipeline:
    """The stages of one model, at least two, and this rank's part in them."""

    def __init__(
        self,
        zeros: Sequence[Zero],
        placement: Placement,
        topology: Topology,
        loss_fn: LossFn,
        schedule: Schedule,
    ) -> None:
        """Take `zeros`, this rank's stages in the placement's order."""
        self._stages = dict(zip(placement.on(topology.pp_rank), zeros, strict=True))
        self._placement = placement
        self._topology = topology
        self._loss_fn = loss_fn
        self._kind = schedule
        self._losses: list[Loss] = []
        self._factor = 1.0
        self._schedules: dict[tuple[Any, ...], Any] = {}

    def run(
        self, batches: Sequence[tuple[Tensor, Tensor]], *, train: bool, factor: float = 1.0
    ) -> Loss | None:
        """Run the forward pass of each micro batch and, with `train`, the backward pass.

        Collective over the pipeline. `batches` are this rank's micro batches `(inputs, targets)`, of equal
        size and the same on every stage. The first stage uses the inputs, the last the targets. Gradients are
        those of the summed loss times `factor`.

        Returns the summed loss on the rank of the last stage, None on the others.
        """
        # torch's schedules take whole batches, and cut them into micro batches along dim 0.
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        ends_here = any(map(self._placement.is_last, self._stages))
        self._losses.clear()
        self._factor = factor
        with split_logits(self._topology), torch.set_grad_enabled(train):
            schedule = self._schedule(inputs, targets, len(batches), train)
            args = (inputs,) if 0 in self._stages else ()
            run = schedule.step if train else schedule.eval
            run(*args, target=targets if ends_here else None, return_outputs=False)
        if not ends_here:
            return None
        # The last ones, since a new schedule first runs a micro batch to infer shapes.
        return Loss.sum(self._losses[-len(batches) :])

    def _schedule(self, inputs: Tensor, targets: Tensor, micro_batches: int, train: bool) -> Any:
        """Return the schedule for these shapes; torch makes a schedule for one shape.

        A new schedule runs the stages once to infer shapes, ZeRO's collectives included. Data-parallel ranks
        may differ in shapes, so if one of them needs a new schedule, all make one.
        """
        key = (inputs.shape, inputs.dtype, targets.shape, targets.dtype, micro_batches, train)
        if self._topology.degrees.dp > 1:
            # On the CPU where there is a backend for it: reading the result then waits for no GPU.
            device = "cpu" if "cpu" in dist.get_backend_config() else self._topology.device
            missing = torch.tensor(float(key not in self._schedules), device=device)
            dist.all_reduce(missing, dist.ReduceOp.MAX)
            if missing > 0:
                self._schedules.pop(key, None)
        if key not in self._schedules:
            if len(self._schedules) == KEPT_SCHEDULES:  # each has its own buffers
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = self._make_schedule(micro_batches)
        return self._schedules[key]

    def _make_schedule(self, micro_batches: int) -> Any:
        stages = [TorchStage(zero, i, self._placement, self._topology) for i, zero in self._stages.items()]
        kind = self._kind
        # With fewer micro batches than stages 1F1B has no steady state, and torch refuses it.
        if kind == "1f1b" and micro_batches < self._placement.stages:
            kind = "gpipe"
        given = stages if kind in MANY_STAGES else stages[0]
        return _SCHEDULES[kind](given, micro_batches, loss_fn=self._collect_loss, scale_grads=False)

    def _collect_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = Loss.of(self._loss_fn(outputs, targets))
        self._losses.append(Loss(loss.total.detach(), loss.tokens))
        lifted = loss.lifted(self._factor)
        return lifted.clone() if lifted._is_view() else lifted  # split backward passes detach it in place


_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}
