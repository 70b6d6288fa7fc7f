"""Optimizer steps: from the summed gradients of a global batch to updated parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.agreement import BatchError, StepRefusedError, Trace, explain, first_reason
from parallel.fsdp_internals import sharded_of
from parallel.gradients import (
    Step,
    clip_factor,
    counts_here,
    drop_unused,
    local_gradients,
    sum_over_ranks,
)
from parallel.loss import Loss
from uni3d.checkpoint.save import Saver
from uni3d.config import Config
from uni3d.engine.micro_batches import Sizes
from uni3d.engine.step_numbers import Numbers, PendingNumbers
from uni3d.observe import Observer, StepRecord
from uni3d.train_state import TrainState


class Outcome(NamedTuple):
    """Outcome of the last step."""

    norm: float | None
    """Gradient norm; None before the first step."""
    applied: bool
    """True if the step changed the parameters."""


class _Trained(NamedTuple):
    parameters: list[nn.Parameter]
    """Parameters of the optimizer on this rank."""
    counts: list[bool]
    """True for each that this rank counts in the norm: a logical parameter counts once over all ranks."""


class Stepper:
    """Takes the optimizer steps.

    On a GPU with a fused optimizer the host doesn't wait for a step's numbers. The optimizer itself changes
    nothing if they aren't finite; the host reads them during the next step and then undoes its counting.
    Otherwise the host reads them before the optimizer's step.
    """

    def __init__(
        self,
        state: TrainState,
        config: Config,
        *,
        saver: Saver,
        observer: Observer,
        look: Callable[[], None],
    ) -> None:
        """Prepare to step `state`'s optimizer.

        Each step's collective also carries the failures of background saves: from this rank's `saver`, and to
        it from the other ranks. `look` raises an error if another rank has failed.
        """
        self._state = state
        self._clip = config.gradient_clipping
        self._saver = saver
        self._observer = observer
        self._look = look
        self._unread: PendingNumbers | None = None
        self._undo: Callable[[], None] = lambda: None
        self.norm: float | None = None
        """Gradient norm of the last step."""
        self.applied = False
        """True if the last step changed the parameters."""
        self.overflowed = False
        """True if the last optimizer step was skipped for an overflow in fp16."""
        self._trained = _Trained([], [])
        self._states_are_new = False
        fused = getattr(state.optimizer, "_step_supports_amp_scaling", False)
        model = state.model
        on_gpu = model.topology.device.type == "cuda" and not model.zero.offload  # offload steps on the CPU
        self._may_defer = fused and state.scaler is None and on_gpu
        self.deferred = False
        """True if a step's numbers are read during the next one; never those of a step that makes states."""

    def finish(self, loss: Loss | None, share: float = 1.0, sizes: Sizes = Sizes()) -> Tensor:  # noqa: B008
        """Collective: take the step; return the global batch's mean loss, a float32 scalar.

        `share` is the factor by which the losses were multiplied before the backward passes, besides the loss
        scale.

        Raises:
            BatchError, StepRefusedError: the gradients can't be right, or there are none; no step was taken.
            FloatingPointError: the loss or a gradient of this step, or with `deferred` of the previous one,
                isn't finite, and there is no loss scale to lower. The step was not taken; if the previous
                one failed, neither was.
        """
        state, model, progress = self._state, self._state.model, self._state.progress
        assert state.optimizer is not None, "checked before the batch was taken"
        model.zero.reshard()  # a forward pass after the last backward has gathered the parameters again
        # 1. One number for the loss and one for the gradients' norm, over all ranks in one collective.
        if model.pipeline is not None:  # else the last backward pass has done it
            model.scalars.sum()
        model.replicas.check(loss)
        model.tied.sum()
        #    A failed background save rides along; the next call raises it, on all ranks together.
        gradients, counted = self._gradients()
        used, traces = model.zero.used(), model.zero.traces()
        told = self._told(gradients, used, traces, sizes, share)
        sums = sum_over_ranks(loss, counted, model.topology, told)
        tokens = sums.terms
        divisor = tokens * (share if state.scaler is None else state.scaler.factor)
        mean_loss, norm = sums.loss / tokens, sums.square.sqrt() / divisor
        right = (sums.apart + sums.unfit + tokens.frac() == 0) & (sums.idle < model.topology.world_size)
        # In fp16 a loss may be past the type's range though its gradients aren't, as DeepSpeed has it too.
        finite = (mean_loss + norm if state.scaler is None else norm).isfinite() & right
        try:
            self.settle()
        except (FloatingPointError, StepRefusedError, BatchError):
            progress.global_samples += progress.train_batch + int(sums.extra.item())  # this batch is lost too
            raise
        if self.deferred:  # which parameters no rank has used can't be known in time
            finite = finite & (sums.unused == 0)
        others = sums.alarms, tokens, sums.unused, sums.idle, sums.apart, sums.unfit, sums.extra
        numbers = torch.stack([mean_loss, norm, finite.double(), *others])
        samples = progress.global_samples + progress.train_batch
        here = (traces, sizes)
        report = PendingNumbers(progress.global_steps + 1, samples, state.rate, numbers, here, self._look)
        # 2. The gradients are sums over the global batch: average and clip them in one multiplication.
        scale = 1.0 / divisor * clip_factor(norm, self._clip)
        # 3. The step.
        if self.deferred:
            state.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._undo = self._undo_of_counting()
            self._update(gradients, scale)
            self._unread = report
        elif self._conclude(report):
            vars(state.optimizer).pop("found_inf", None)  # an earlier step's, if it was deferred
            if report.read().unused > 0:
                drop_unused(used, model.topology, keep=model.tied.shared)
                gradients, _ = self._gradients()
            self._update(gradients, scale)
            self.deferred = self._may_defer and report.read().unused == 0
        model.zero.show_parameters()
        return mean_loss.float()

    def _told(
        self,
        gradients: list[Tensor],
        used: Mapping[nn.Parameter, bool],
        traces: Sequence[Trace],
        sizes: Sizes,
        share: float,
    ) -> Step:
        """Return what this rank adds to the step's sums. The next step begins."""
        self._state.model.zero.begin_step()
        unused = sum(not had for parameter, had in used.items() if parameter.requires_grad)
        idle = not gradients or (bool(used) and not any(used.values()))
        if idle and self._state.model.scalars.used():
            idle = False
        return Step(
            unused=unused,
            idle=idle,
            traces=traces,
            mode=2 * round(1 / share) + sizes.are_means,
            alarm=self._saver.failed,
            unfit=sizes.unfit is not None,
            extra=sizes.extra,
        )

    def settle(self) -> None:
        """Read the numbers of the last step, if they haven't been read.

        Raises:
            FloatingPointError: they aren't finite. That step was not taken and isn't counted.
        """
        report, self._unread = self._unread, None
        if report is not None:
            try:
                self._conclude(report)
            finally:
                self._undo = lambda: None
        if self._states_are_new:
            # If the step at hand is rejected on the GPU, states that it makes stay uninitialized memory.
            self.deferred = self._states_are_new = False

    @property
    def steps(self) -> int:
        """Number of optimizer steps, those that were skipped too."""
        return self._state.progress.global_steps

    def look(self) -> Outcome:
        """Return the outcome of the last step. Local, so it neither raises nor undoes a step."""
        if self._unread is None:
            return Outcome(self.norm, self.applied)
        numbers = self._unread.read()
        return Outcome(numbers.norm, bool(numbers.finite))

    def _conclude(self, report: PendingNumbers) -> bool:
        """Record the step's numbers; return whether they are finite. Raises if not, without a loss scale."""
        state, progress = self._state, self._state.progress
        numbers = report.read()
        self.norm = numbers.norm
        self._saver.agree(numbers.alarms > 0)
        self.applied = bool(numbers.finite)
        if self._observer.wanted:
            self._observe(report, numbers)
        if refusal := self._refusal(report, numbers):
            self._lose_step(numbers)
            state.model.module.zero_grad()
            raise refusal
        if self.deferred and numbers.unused > 0:
            self._skip_unforeseen(report, numbers)
            return False
        if state.scaler is not None or self.applied:
            progress.global_samples += int(numbers.extra)
        if state.scaler is not None:
            self.overflowed = not self.applied
            if not self.applied:
                state.model.module.zero_grad()
                progress.skipped_steps += 1
                progress.count_step()
            state.scaler.update(overflow=not self.applied)
        elif not self.applied:  # the numbers are the same on all ranks, so all raise
            self._lose_step(numbers)
            state.model.module.zero_grad()
            raise FloatingPointError(
                f"step {report.step}: the loss is {numbers.loss:g} and the gradient norm {numbers.norm:g}; "
                "the step was not taken"
            )
        return self.applied

    def _lose_step(self, numbers: Numbers) -> None:
        """Undo the counting of a step that wasn't taken; its batch, taken from the iterator, is lost."""
        self._undo()
        self._state.progress.global_samples += self._state.progress.train_batch + int(numbers.extra)

    def _refusal(self, report: PendingNumbers, numbers: Numbers) -> Exception | None:
        """Return the error if the step's gradients can't be right, or None. Collective if they can't."""
        topology, step = self._state.model.topology, f"step {report.step} was not taken"
        if numbers.unfit > 0:
            return BatchError(f"{step}: {first_reason(report.sizes.unfit, topology)}")
        if numbers.apart > 0:
            return StepRefusedError(f"{step}: {explain(report.traces, topology)}")
        if not numbers.terms.is_integer():
            return StepRefusedError(
                f"{step}: its losses' numbers of terms add up to {numbers.terms:g}; a tuple of two values is "
                "taken for a sum and its number of terms: return the loss alone, or an object with a .loss"
            )
        if numbers.idle == topology.world_size:
            return StepRefusedError(
                f"{step}: no trained parameter has a gradient; compute the loss from the engine's output, "
                "with gradients enabled, and check which parameters require a gradient"
            )
        return None

    def _skip_unforeseen(self, report: PendingNumbers, numbers: Numbers) -> None:
        """Skip a deferred step in which, unlike in those before, some parameter had no gradient on some rank.

        The host learns it too late to leave them out. From here on it reads a step's numbers first.
        """
        self.deferred = self._may_defer = False
        self._lose_step(numbers)
        self._state.progress.skipped_steps += 1
        if self._state.model.topology.rank == 0:
            warnings.warn(
                f"step {report.step} was skipped: for the first time, some parameters had no gradient on "
                "some rank; later steps handle this",
                stacklevel=2,
            )

    def _observe(self, report: PendingNumbers, numbers: Numbers) -> None:
        scaler = self._state.scaler
        self._observer.step_taken(
            StepRecord(
                step=report.step,
                samples=report.samples + int(numbers.extra),
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
        state.model.module.zero_grad()  # also of parameters that the optimizer doesn't have
        if state.lr_scheduler is not None:
            state.lr_scheduler.step()
        state.progress.count_step()

    def _undo_of_counting(self) -> Callable[[], None]:
        """Return a function that undoes the counting of a step, for one that turns out not to be taken."""
        optimizer, scheduler, progress = self._state.optimizer, self._state.lr_scheduler, self._state.progress
        assert optimizer is not None
        counted = progress.global_steps, progress.global_samples
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        schedule = None if scheduler is None else copy.copy(scheduler.state_dict())

        def undo() -> None:
            progress.global_steps, progress.global_samples = counted
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
            if scheduler is not None:
                scheduler.load_state_dict(schedule)  # type: ignore[arg-type]

        return undo

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return this rank's parts of the gradients, and the ones that it counts in the norm."""
        model, optimizer = self._state.model, self._state.optimizer
        assert optimizer is not None
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if [id(p) for p in trained] != [id(p) for p in self._trained.parameters]:
            self._states_are_new = bool(self._trained.parameters)  # those of the first step are no surprise
            trained = self._take_parameters(optimizer)
            copies = {id(p) for n, p in model.module.named_parameters() if n in model.tied.copies}
            counts = [id(p) not in copies and counts_here(p, model.topology) for p in trained]
            self._trained = _Trained(trained, counts)
        gradients = local_gradients(trained)
        counted = [
            g for g, counts in zip(gradients, self._trained.counts, strict=True) if counts and g is not None
        ]
        return [g for g in gradients if g is not None], counted

    def _take_parameters(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        """Return the optimizer's parameters, whole ones that a script has added replaced by the sharded ones.

        Raises:
            ValueError: one isn't the engine's, so nobody would sum its gradients.
        """
        ours = {id(p) for p in self._state.model.module.parameters()}
        for i, group in enumerate(optimizer.param_groups):
            group["params"] = [sharded_of(p) for p in group["params"]]
            if strangers := sum(id(p) not in ours for p in group["params"]):
                raise ValueError(
                    f"group {i} of the optimizer has {strangers} parameters that aren't the engine's; train "
                    "them by an optimizer of their own, or make them part of the model before initialize()"
                )
        return [p for group in optimizer.param_groups for p in group["params"]]
