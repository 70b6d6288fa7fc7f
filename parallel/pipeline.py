"""Pipeline parallelism with torch's stages and schedules. ZeRO is told of each backward pass.

A model of one stage needs no schedule: see `ParallelModel.pipeline`.

The schedules: GPipe (Huang et al. 2019), 1F1B (PipeDream-Flush, Narayanan et al. 2021a), interleaved 1F1B
(Narayanan et al. 2021b), ZB1P and ZB-V (Zero bubble pipeline parallelism, Qi et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.agreement import BatchError, first_reason
from parallel.combinations import MANY_STAGES
from parallel.loss import Loss, LossFn, split_logits
from parallel.pipeline_stage import TorchStage
from parallel.placement import Placement
from parallel.settings import Schedule
from parallel.spans import Span, no_span
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
        self._targets: list[Any] = []
        self._factor = 1.0
        self._schedules: dict[tuple[Any, ...], Any] = {}
        self.span: Span = no_span
        """Encloses each pass of a stage, and each loss."""

    def run(
        self, batches: Sequence[tuple[Any, Any]], *, train: bool, size: int | None = None, factor: float = 1.0
    ) -> Loss | None:
        """Run the forward pass of each micro batch and, with `train`, the backward pass.

        Collective over the pipeline. `batches` are this rank's micro batches `(inputs, targets)`, of equal
        shapes, the same on every stage and, if `size` is given, of so many samples. The first stage uses the
        inputs, a tensor or a tuple of tensors; the last uses the targets, which may be of any kind.
        Gradients are those of the summed loss times `factor`.

        Returns the summed loss on the rank of the last stage, None on the others.

        Raises:
            BatchError: the micro batches of some rank don't fit; nothing was computed.
        """
        ends_here = any(map(self._placement.is_last, self._stages))
        self._losses.clear()
        self._targets = [targets for _, targets in batches]
        self._factor = factor
        with split_logits(self._topology), torch.set_grad_enabled(train):
            inputs, schedule = self._schedule([inputs for inputs, _ in batches], size, train)
            # torch's schedules take whole batches, and cut them into micro batches along dim 0.
            args = [torch.cat(parts) for parts in zip(*inputs, strict=True)] if 0 in self._stages else []
            numbers = torch.arange(len(batches)) if ends_here else None
            (schedule.step if train else schedule.eval)(*args, target=numbers, return_outputs=False)
        self._targets = []
        if not ends_here:
            return None
        # The last ones, since a new schedule first runs a micro batch to infer shapes.
        return Loss.sum(self._losses[-len(batches) :])

    def _schedule(
        self, given: list[Any], size: int | None, train: bool
    ) -> tuple[list[tuple[Tensor, ...]], Any]:
        """Return each micro batch's inputs, and the schedule for their shapes; torch makes one for one shape.

        A new schedule runs the stages once to infer shapes, ZeRO's collectives included. Data-parallel ranks
        may differ in shapes, so if one of them needs a new schedule, all make one.
        """
        inputs = [tuple(x) if isinstance(x, tuple | list) else (x,) for x in given]
        reason = _why_unfit(given, inputs, size)
        key = None if reason else (*((x.shape, x.dtype) for x in inputs[0]), len(inputs), train)
        new = key not in self._schedules
        if self._topology.degrees.dp > 1:
            # In host memory: reading the result waits for no GPU, and a ring would take a hop for each rank.
            most = self._topology.host.all_reduce(2 if reason else int(new), max)
            if most == 2:
                raise BatchError(first_reason(reason, self._topology))
            new = most == 1
        if reason or key is None:
            raise BatchError(reason)
        if new:
            self._schedules.pop(key, None)
            if len(self._schedules) == KEPT_SCHEDULES:  # each has its own buffers
                del self._schedules[next(iter(self._schedules))]
            self._schedules[key] = self._make_schedule(len(inputs))
        return inputs, self._schedules[key]

    def _make_schedule(self, micro_batches: int) -> Any:
        span: Span = lambda part, **where: self.span(part, **where)  # noqa: E731 (it may be set later)
        placed = self._placement, self._topology
        stages = [TorchStage(zero, i, *placed, span) for i, zero in self._stages.items()]
        kind = self._kind
        # With fewer micro batches than stages 1F1B has no steady state, and torch refuses it.
        if kind == "1f1b" and micro_batches < self._placement.stages:
            kind = "gpipe"
        given = stages if kind in MANY_STAGES else stages[0]
        return _SCHEDULES[kind](given, micro_batches, loss_fn=self._collect_loss, scale_grads=False)

    def _collect_loss(self, outputs: Any, number: Tensor) -> Tensor:
        """Return the loss of micro batch `number`, which stands for its targets of any kind."""
        with self.span("loss", stage=self._placement.stages - 1, micro_batch=int(number)):
            loss = Loss.of(self._loss_fn(outputs, self._targets[int(number)]))
        self._losses.append(Loss(loss.total.detach(), loss.tokens))
        lifted = loss.lifted(self._factor)
        return lifted.clone() if lifted._is_view() else lifted  # split backward passes detach it in place


def _why_unfit(given: list[Any], inputs: list[tuple[Any, ...]], size: int | None) -> str | None:
    """Return why torch's schedules can't run these micro batches, or None."""
    for micro_batch, tensors in zip(given, inputs, strict=True):
        fits = len(tensors) > 1 or isinstance(micro_batch, Tensor)  # torch would unpack a tuple of one
        if not fits or not all(isinstance(x, Tensor) and x.ndim for x in tensors):
            kinds = ", ".join(type(x).__name__ for x in tensors)
            of = f" of {kinds}" if isinstance(micro_batch, tuple | list) else ""
            return (
                f"the inputs of a micro batch are a {type(micro_batch).__name__}{of}; a pipeline takes a "
                "tensor or a tuple of tensors, whose first dim is the sample"
            )
    sizes = [len(tensors[0]) for tensors in inputs]
    if size is not None and any(n != size for n in sizes):
        return (
            f"the data iterator gave micro batches of {sizes} samples; a pipeline needs "
            f"train_micro_batch_size_per_gpu({size}) in each; leave out a short last batch (drop_last=True)"
        )
    shapes = [[(list(x.shape), str(x.dtype)) for x in tensors] for tensors in inputs]
    for shape in shapes:
        if shape != shapes[0]:
            return (
                f"a pipeline needs micro batches of one shape in a step; got {_text(shapes[0])} and "
                f"{_text(shape)}; pad them to one length"
            )
    return None


def _text(shapes: list[tuple[list[int], str]]) -> str:
    return " + ".join(f"{shape} ({dtype.removeprefix('torch.')})" for shape, dtype in shapes)


_SCHEDULES: dict[Schedule, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zero_bubble_v": ScheduleZBVZeroBubble,
}
