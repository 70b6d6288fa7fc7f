"""The end of a step: from the summed gradients of a global batch to updated parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.gradients import counts_here, local_gradients, sum_over_ranks
from parallel.loss import Loss
from uni3d.checkpoint.save import Saver
from uni3d.config import Config
from uni3d.observe import Observer, StepRecord
from uni3d.train_state import TrainState


class Numbers(NamedTuple):
    """What is known of a step when it has been taken, the same on all ranks."""

    loss: float
    """Mean over the global batch."""
    norm: float
    """Of all gradients together, before clipping."""
    finite: float
    """1 if both are, else 0."""
    alarms: float
    """How many ranks had an alarm to raise."""
    terms: float
    """How many values the loss is the mean of."""


class Outcome(NamedTuple):
    norm: float | None
    """Of the gradients; None before the first step."""
    applied: bool


class _Trained(NamedTuple):
    parameters: list[nn.Parameter]
    """This rank's that the optimizer has."""
    counts: list[bool]
    """Whether each counts on this rank in the norm: each logical parameter counts once."""


class Report:
    """A step's numbers on their way to the host, which needn't wait for them."""

    def __init__(self, step: int, samples: int, rate: float, numbers: Tensor) -> None:
        self.step = step
        self.samples = samples
        """Consumed when it has been taken."""
        self.rate = rate
        """Learning rate of the first group."""
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> Numbers:
        """Waits until they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return Numbers(*self._numbers.tolist())


class Stepper:
    """Takes the optimizer steps.

    On a GPU with a fused optimizer the host doesn't wait for a step's numbers: the optimizer itself leaves
    everything as it is if they aren't finite, and the host reads them while the next step is computed, and
    then takes back what it counted. Elsewhere it reads them before the optimizer's step.
    """

    def __init__(self, state: TrainState, config: Config, *, saver: Saver, observer: Observer) -> None:
        """Prepare to step `state`'s optimizer.

        Each step's collective also says whether some rank's save has failed in the background: `saver` knows
        about this rank's, and is told about the others'.
        """
        self._state = state
        self._clip = config.gradient_clipping
        self._saver = saver
        self._observer = observer
        self._unread: Report | None = None
        self._take_back: Callable[[], None] = lambda: None
        self.norm: float | None = None
        """Of the last step's gradients."""
        self.applied = False
        """Whether the last step changed the parameters."""
        self._trained = _Trained([], [])
        fused = getattr(state.optimizer, "_step_supports_amp_scaling", False)
        model = state.model
        on_gpu = model.topology.device.type == "cuda" and not model.zero.offload  # where the optimizer works
        self.deferred = fused and state.scaler is None and on_gpu
        """Whether a step's numbers are read during the next one."""

    def finish(self, loss: Loss | None) -> Tensor:
        """Collective: take the step; returns the global batch's mean loss, a float32 scalar.

        Raises:
            FloatingPointError: the loss or a gradient isn't finite, and there is no loss scale to lower; it
                may be those of the step before. No step was taken, of neither batch then.
        """
        state, model, progress = self._state, self._state.model, self._state.progress
        assert state.optimizer is not None, "checked before the batch was taken"
        model.zero.reshard()  # a forward pass after the backward one has brought whole copies back
        # 1. One number for the loss and one for the gradients' norm, over all ranks in one collective.
        model.scalars.sum()
        model.replicas.check()
        model.tied.sum()
        #    A save that failed in the background is told along; the next call raises it, on all ranks.
        gradients, counted = self._gradients()
        total, tokens, square, alarms = sum_over_ranks(
            loss, counted, model.topology, alarm=self._saver.failed
        )
        lifted = 1.0 if state.scaler is None else state.scaler.factor
        mean_loss, norm = total / tokens, square.sqrt() / (tokens * lifted)
        finite = (mean_loss + norm).isfinite()
        try:
            self.settle()
        except FloatingPointError:
            progress.global_samples += progress.train_batch  # this step's batch goes with the bad one's
            raise
        numbers = torch.stack([mean_loss, norm, finite.double(), alarms, tokens])
        samples = progress.global_samples + progress.train_batch
        report = Report(progress.global_steps + 1, samples, state.rate, numbers)
        # 2. Gradients are of the sum over the global batch: divide, and clip, in one multiplication.
        scale = 1.0 / (tokens * lifted)
        if self._clip > 0:
            scale = scale * (self._clip / (norm + 1e-6)).clamp(max=1.0)
        # 3. The step.
        if self.deferred:
            state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._take_back = self._remember()
            self._update(gradients, scale)
            self._unread = report
        elif self._judge(report):
            self._update(gradients, scale)
        return mean_loss.float()

    def settle(self) -> None:
        """Read the numbers of a step that haven't been read yet.

        Raises:
            FloatingPointError: they aren't finite; that step wasn't taken, nor is it counted.
        """
        report, self._unread = self._unread, None
        if report is not None:
            self._judge(report)

    def look(self) -> Outcome:
        """How the last step went. Local: nothing is raised, and nothing taken back, before all ranks do."""
        if self._unread is None:
            return Outcome(self.norm, self.applied)
        numbers = self._unread.read()
        return Outcome(numbers.norm, bool(numbers.finite))

    def _judge(self, report: Report) -> bool:
        """Whether the step is, or was rightly, taken; without a loss scale, raises if not."""
        state, progress = self._state, self._state.progress
        numbers = report.read()
        self.norm = numbers.norm
        self._saver.agree(numbers.alarms > 0)
        self.applied = bool(numbers.finite)
        if self._observer.wanted:
            self._tell(report, numbers)
        if state.scaler is not None:
            if not self.applied:
                state.model.module.zero_grad()
                progress.skipped_steps += 1
                progress.count_step()
            state.scaler.update(overflow=not self.applied)
        elif not self.applied:  # the same numbers on all ranks, so all raise
            self._take_back()
            state.model.module.zero_grad()
            progress.global_samples += progress.train_batch  # consumed, as the data iterator has them
            raise FloatingPointError(
                f"step {report.step}: the loss is {numbers.loss:g} and the gradients' norm "
                f"{numbers.norm:g}; no step was taken"
            )
        return self.applied

    def _tell(self, report: Report, numbers: Numbers) -> None:
        scaler = self._state.scaler
        self._observer.step_taken(
            StepRecord(
                step=report.step,
                samples=report.samples,
                loss=numbers.loss,
                norm=numbers.norm,
                rate=report.rate,
                scale=None if scaler is None else scaler.scale,
                terms=numbers.terms,
            )
        )

    def _update(self, gradients: list[Tensor], scale: Tensor) -> None:
        state = self._state
        assert state.optimizer is not None
        if gradients:
            torch._foreach_mul_(gradients, scale.float().to(gradients[0].device))
        state.optimizer.step()
        state.model.module.zero_grad()  # those too that the optimizer doesn't have
        if state.lr_scheduler is not None:
            state.lr_scheduler.step()
        state.progress.count_step()

    def _remember(self) -> Callable[[], None]:
        """What takes back the counting of a step that turns out not to have been taken."""
        optimizer, scheduler, progress = self._state.optimizer, self._state.lr_scheduler, self._state.progress
        assert optimizer is not None
        counted = progress.global_steps, progress.global_samples
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        schedule = None if scheduler is None else copy.copy(scheduler.state_dict())

        def take_back() -> None:
            progress.global_steps, progress.global_samples = counted
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
            if scheduler is not None:
                scheduler.load_state_dict(schedule)  # type: ignore[arg-type]

        return take_back

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of the gradients, and those of them that count on it."""
        model, optimizer = self._state.model, self._state.optimizer
        assert optimizer is not None
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if [id(p) for p in trained] != [id(p) for p in self._trained.parameters]:
            copies = {id(p) for n, p in model.module.named_parameters() if n in model.tied.copies}
            counts = [id(p) not in copies and counts_here(p, model.topology) for p in trained]
            self._trained = _Trained(trained, counts)
        gradients = local_gradients(trained)
        counted = [
            g for g, counts in zip(gradients, self._trained.counts, strict=True) if counts and g is not None
        ]
        return [g for g in gradients if g is not None], counted
