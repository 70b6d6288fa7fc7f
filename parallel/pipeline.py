"""Running a pipeline: torch's stages and schedules, with ZeRO told when each backward pass comes.

A model of one stage needs no schedule: see `ParallelModel.pipeline`.

The schedules: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al. 2021a), interleaved 1F1B
(Narayanan et al. 2021b), ZB1P and ZB-V (Zero bubble pipeline parallelism, Qi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from parallel.combinations import MANY_STAGES
from parallel.pipeline_stage import TorchStage
from parallel.placement import Placement
from parallel.settings import Schedule
from parallel.topology import Topology
from parallel.zero import Zero

LossFn = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""`(outputs, targets)` of a micro batch -> its loss summed and the number it was summed over, or its mean."""


KEPT_SCHEDULES = 4
"""Schedules that are kept: training's, evaluation's, and some for batches of another shape."""


class Loss(NamedTuple):
    """A loss that can be added up over micro batches and ranks before the division."""

    total: Tensor
    tokens: Tensor
    """How many values `total` is the sum of."""

    @classmethod
    def of(cls, value: Tensor | tuple[Tensor, Tensor]) -> Loss:
        """What a loss function gave; a single value is a mean, and weighs as one.

        Raises:
            ValueError: it is neither; a model's loss beside its logits, say.
        """
        if isinstance(value, tuple) and not _is_sum_and_count(value):
            raise ValueError(
                "a loss is one value, or a tuple of its sum and the number of its terms; got a tuple of "
                f"{', '.join(map(_described, value))}; return the loss alone, or an object with a .loss"
            )
        total, count = value if isinstance(value, tuple) else (value, torch.ones((), device=value.device))
        if isinstance(total, DTensor):  # computed on logits that were split by vocabulary
            total = total.full_tensor()
        if isinstance(count, DTensor):
            count = count.full_tensor()
        return cls(total, torch.as_tensor(count, device=total.device))

    def lifted(self, factor: float) -> Tensor:
        """What a backward pass begins with: the total, multiplied by a loss scale in fp32."""
        return self.total if factor == 1.0 else self.total.float() * factor

    @classmethod
    def sum(cls, losses: Sequence[Loss]) -> Loss:
        # Not in a type of 16 bits, which ends at 65,504 or counts to 256.
        return cls(
            torch.stack([loss.total.float() for loss in losses]).sum(),
            torch.stack([loss.tokens.double() for loss in losses]).sum(),
        )


def _is_sum_and_count(value: tuple[Any, ...]) -> bool:
    if len(value) != 2 or not isinstance(value[0], Tensor) or value[0].numel() != 1:
        return False
    count = value[1]
    if isinstance(count, Tensor):
        return count.numel() == 1 and not count.requires_grad
    return isinstance(count, int | float)


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def split_logits(topology: Topology) -> AbstractContextManager[None]:
    """Makes cross-entropy work on logits that are split by vocabulary; forward and backward run inside."""
    return loss_parallel() if topology.degrees.tp > 1 else nullcontext()


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
        """`zeros` are this rank's stages."""
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
        """Collective over the pipeline: forward, and with `train` backward, of each micro batch.

        `batches` are this rank's micro batches `(inputs, targets)`, of one size, the same on every stage; the
        first stage uses the inputs, the last the targets. Gradients are of the summed loss times `factor`.

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
        return Loss.sum(self._losses[-len(batches) :])  # a schedule's first run also tries one for its shapes

    def _schedule(self, inputs: Tensor, targets: Tensor, micro_batches: int, train: bool) -> Any:
        """torch's schedules are made for one shape; keep one for each that comes along.

        A new one tries the stages out, with ZeRO's collectives in it. Data-parallel ranks may have other
        shapes than this one, so if one of them needs a new schedule, all make one.
        """
        key = (inputs.shape, inputs.dtype, targets.shape, targets.dtype, micro_batches, train)
        if self._topology.degrees.dp > 1:
            # On the host where there is a way: to read it there, nobody waits for a GPU.
            device = "cpu" if "cpu" in dist.get_backend_config() else self._topology.device
            missing = torch.tensor(float(key not in self._schedules), device=device)
            dist.all_reduce(missing, dist.ReduceOp.MAX)
            if missing > 0:
                self._schedules.pop(key, None)
        if key not in self._schedules:
            if len(self._schedules) == KEPT_SCHEDULES:  # each has buffers of its own
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = self._make_schedule(micro_batches)
        return self._schedules[key]

    def _make_schedule(self, micro_batches: int) -> Any:
        stages = [TorchStage(zero, i, self._placement, self._topology) for i, zero in self._stages.items()]
        kind = self._kind
        # With fewer micro batches than stages 1F1B has no steady state; torch wants GPipe then.
        if kind == "1f1b" and micro_batches < self._placement.stages:
            kind = "gpipe"
        given = stages if kind in MANY_STAGES else stages[0]
        return _SCHEDULES[kind](given, micro_batches, loss_fn=self._collect_loss, scale_grads=False)

    def _collect_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = Loss.of(self._loss_fn(outputs, targets))
        self._losses.append(Loss(loss.total.detach(), loss.tokens))
        lifted = loss.lifted(self._factor)
        return (
            lifted.clone() if lifted._is_view() else lifted
        )  # split backward passes detach it where it lies


_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}
