"""Pipeline parallelism with torch's stages and schedules. ZeRO is told of each backward pass.

A model in one stage is run by the same class, without a schedule. A step takes this rank's whole share of the
global batch and splits it into micro batches.

The schedules: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al. 2021a), interleaved 1F1B
(Narayanan et al. 2021b), ZB1P and ZB-V (Zero bubble pipeline parallelism, Qi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
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
    """The stages of one model, and this rank's part in them."""

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
        self, inputs: Tensor, targets: Tensor, micro_batches: int, *, train: bool, factor: float = 1.0
    ) -> Loss | None:
        """Run the forward pass of each micro batch and, with `train`, the backward pass.

        Collective over the pipeline. `inputs` and `targets` are this rank's samples of the batch, in dim 0,
        the same on every stage; the first stage uses the inputs, the last the targets. Gradients are those of
        the summed loss times `factor`.

        Returns the summed loss on the rank of the last stage, None on the others.
        """
        ends_here = any(map(self._placement.is_last, self._stages))
        self._losses.clear()
        self._factor = factor
        with split_logits(self._topology), torch.set_grad_enabled(train):
            if self._placement.stages == 1:
                self._run_alone(inputs, targets, micro_batches, train)
            else:
                schedule = self._schedule(inputs, targets, micro_batches, train)
                args = (inputs,) if 0 in self._stages else ()
                run = schedule.step if train else schedule.eval
                run(*args, target=targets if ends_here else None, return_outputs=False)
        if not ends_here:
            return None
        # The last ones, since a new schedule first runs a micro batch to infer shapes.
        return Loss.sum(self._losses[-micro_batches:])

    def _run_alone(self, inputs: Tensor, targets: Tensor, micro_batches: int, train: bool) -> None:
        """Run the only stage without a schedule, which would keep the logits through the backward pass."""
        (zero,) = self._stages.values()
        module = cast(nn.Module, zero.root)
        parts = zip(inputs.tensor_split(micro_batches), targets.tensor_split(micro_batches), strict=True)
        for i, (part, target) in enumerate(parts, start=1):
            loss = self._collect_loss(module(part), target)
            if train:
                zero.before_backward(last=i == micro_batches)
                loss.backward()  # type: ignore[no-untyped-call]

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
