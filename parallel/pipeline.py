"""Running a pipeline: torch's stages and schedules, with ZeRO told when each backward pass comes.

One stage is a pipeline too: the same schedule with nobody to talk to. A step takes this rank's whole share
of the global batch and cuts it into micro batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

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
        """What a loss function gave; a single value is a mean, and weighs as one."""
        total, count = value if isinstance(value, tuple) else (value, torch.ones((), device=value.device))
        if isinstance(total, DTensor):  # computed on logits that were split by vocabulary
            total = total.full_tensor()
        if isinstance(count, DTensor):
            count = count.full_tensor()
        return cls(total, count)

    def lifted(self, factor: float) -> Tensor:
        """What a backward pass begins with: the total, multiplied by a loss scale in fp32."""
        return self.total if factor == 1.0 else self.total.float() * factor

    @classmethod
    def sum(cls, losses: Sequence[Loss]) -> Loss:
        return cls(
            torch.stack([loss.total for loss in losses]).sum(),
            torch.stack([loss.tokens for loss in losses]).sum(),
        )


def split_logits(topology: Topology) -> AbstractContextManager[None]:
    """Makes cross-entropy work on logits that are split by vocabulary; forward and backward run inside."""
    return loss_parallel() if topology.degrees.tp > 1 else nullcontext()


class Pipeline:
    """The stages of one model, and this rank's part in them."""

    def __init__(self, zero: Zero, topology: Topology, loss_fn: LossFn) -> None:
        self._zero = zero
        self._topology = topology
        self._loss_fn = loss_fn
        self._losses: list[Loss] = []
        self._factor = 1.0
        self._schedules: dict[tuple[Any, ...], Schedule1F1B | ScheduleGPipe] = {}

    def run(
        self, inputs: Tensor, targets: Tensor, micro_batches: int, *, train: bool, factor: float = 1.0
    ) -> Loss | None:
        """Collective over the pipeline: forward, and with `train` backward, of each micro batch.

        `inputs` and `targets` are this rank's samples of the batch, in dim 0, the same on every stage; the
        first stage uses the inputs, the last the targets. Gradients are of the summed loss times `factor`.

        Returns the summed loss on the last stage, None on the others.
        """
        schedule = self._schedule(inputs, targets, micro_batches, train)
        args = (inputs,) if self._topology.pp_rank == 0 else ()
        target = targets if self._topology.is_last_stage else None
        self._losses.clear()
        self._factor = factor
        with split_logits(self._topology):
            if train:
                schedule.step(*args, target=target, return_outputs=False)
            else:
                with torch.no_grad():
                    schedule.eval(*args, target=target, return_outputs=False)
        if not self._topology.is_last_stage:
            return None
        return Loss.sum(self._losses[-micro_batches:])  # a schedule's first run also tries one for its shapes

    def _schedule(
        self, inputs: Tensor, targets: Tensor, micro_batches: int, train: bool
    ) -> Schedule1F1B | ScheduleGPipe:
        """torch's schedules are made for one shape; keep one for each that comes along."""
        key = (inputs.shape, inputs.dtype, targets.shape, targets.dtype, micro_batches, train)
        if key not in self._schedules:
            if len(self._schedules) == KEPT_SCHEDULES:  # each has buffers of its own
                del self._schedules[next(iter(self._schedules))]
            topology = self._topology
            stage = _Stage(self._zero, topology)
            # With fewer micro batches than stages 1F1B has no steady state; torch wants GPipe then.
            kind = Schedule1F1B if micro_batches >= topology.degrees.pp else ScheduleGPipe
            self._schedules[key] = kind(stage, micro_batches, loss_fn=self._collect_loss, scale_grads=False)
        return self._schedules[key]

    def _collect_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = Loss.of(self._loss_fn(outputs, targets))
        self._losses.append(Loss(loss.total.detach(), loss.tokens))
        return loss.lifted(self._factor)


class _Hidden(nn.Module):
    """Hides that a module is sharded, so that torch's stage leaves gradients and resharding to `Zero`.

    Left to itself the stage keeps gradients whole until the last micro batch, which is ZeRO stage 1 only.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


class _Stage(PipelineStage):
    def __init__(self, zero: Zero, topology: Topology) -> None:
        super().__init__(
            _Hidden(zero.root),  # type: ignore[arg-type]
            topology.pp_rank,
            topology.degrees.pp,
            topology.device,
            group=topology.pp_group,
        )
        self._zero = zero

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._zero.before_backward(last=last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
