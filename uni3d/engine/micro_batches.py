"""Forward and backward passes of a step's micro batches, without a pipeline.

`Engine.train_batch` runs them in a loop; a script that calls `forward`, `backward` and `step` runs them one
by one. In a pipeline, torch's schedule is the loop.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from parallel import ParallelModel
from parallel.agreement import BatchError, first_reason
from parallel.gradients import Step, Sums, sum_over_ranks
from parallel.loss import Loss, in_fp32, split_logits
from parallel.spans import Span, no_span
from uni3d.engine.batches import Result, loss_of
from uni3d.optim.loss_scale import LossScale


class Sizes(NamedTuple):
    """Sizes of this rank's micro batches in a step, and whether their losses can be averaged."""

    unfit: str | None = None
    """Reason why not."""
    extra: int = 0
    """Number of samples beyond the config's."""
    are_means: bool = False
    """True if each loss is a mean of an unknown number of terms."""


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put the module into eval mode; give each of its modules its own mode back at the end."""
    modes = {part: part.training for part in module.modules()}  # parents before children
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            if part.training != mode:
                part.train(mode)  # a layer's own `train` may do more, such as taking LoRA's weights out again


class MicroBatches:
    """Progress within a step: the micro batches done and their losses.

    Attributes:
        index: number of the current micro batch, counted from 0.
        losses: losses of the backward passes since the last step, detached.
        micro_steps: micro batches that have been ended, by this engine.
        boundary: what the script says instead of counting; None counts.
        share: factor of this step's losses; set before its first backward pass.
        sizes: sizes of the last micro batches that `train` or `evaluate` ran.
        span: encloses the passes of `train`.
    """

    def __init__(self, model: ParallelModel, scaler: LossScale | None, steps: int, size: int) -> None:
        """Start a step of `steps` micro batches of `size` samples."""
        self._model = model
        self._scaler = scaler
        self._steps = steps
        self._size = size
        self.sizes = Sizes()
        self.micro_steps = 0
        self.boundary: bool | None = None
        self._inside_no_sync = self._in_backward = self._strays = False
        self.share = 1.0
        self.span: Span = no_span
        self.clear()

    def clear(self) -> None:
        """Restart the step."""
        self.index = self._unsynced = 0
        self.losses: list[Loss] = []
        self._are_means = self._summed = False
        self._model.scalars.begin_step()
        self._begin_next()

    def drop(self) -> None:
        """Drop all gradients and restart the step; warn if gradients are lost."""
        if self.losses:
            warnings.warn(
                f"zero_grad() drops the gradients of {len(self.losses)} of the step's {self._steps} micro "
                "batches; it isn't needed, as step() zeroes the gradients itself",
                stacklevel=3,
            )
        self._model.zero.drop_gradients()
        self._strays = False
        self.clear()

    def _begin_next(self) -> None:
        self._backwards = 0
        self._forwards = {True: 0, False: 0}  # by the module's `training`

    @property
    def begins_step(self) -> bool:
        """True before the first backward pass of a step."""
        return self.index == 0 and not self.losses

    @property
    def is_boundary(self) -> bool:
        """True if the current micro batch is the step's last."""
        return (self.index + 1) % self._steps == 0 if self.boundary is None else self.boundary

    @property
    def awaits_step(self) -> bool:
        """True from the backward pass that sums the step's gradients over the ranks to `step()`."""
        return self._summed and self._backwards > 0

    @property
    def taken(self) -> int:
        """Number of micro batches since the last step, those inside `no_sync` included.

        Several backward passes before `step()` are of one micro batch, unless the script sets the boundaries.
        """
        now = self._backwards if self.boundary is not None else min(1, self._backwards)
        return self.index + self._unsynced + now

    @property
    def ends_step(self) -> bool:
        """True if the next backward pass is the step's last."""
        return self.is_boundary and not self._inside_no_sync

    def check_whole(self, call: str) -> None:
        """Raise RuntimeError if this rank has only a part of the pipeline."""
        pp = self._model.topology.degrees.pp
        if pp > 1:
            raise RuntimeError(
                f"{call}() needs the whole model on a rank, but pp is {pp}; use train_batch() or eval_batch()"
            )

    def check_none(self, call: str) -> None:
        """Raise RuntimeError between the micro batches of a step."""
        if self.losses or self._inside_no_sync:
            raise RuntimeError(f"{call}() can't be called between a step's micro batches; call step() first")

    # --- the loop --------------------------------------------------------------------------------------

    def train(self, batches: Iterable[Any], *, sure: bool = False) -> Loss:
        """Run forward and backward passes of a step's micro batches; return the summed loss.

        Sets `sizes`. `sure` says that each micro batch has as many samples as the config says.
        """
        seen = []
        for batch in batches:
            with self.span("forward", micro_batch=self.index), split_logits(self._model.topology):
                result = loss_of(self._model, batch)
            with self.span("backward", micro_batch=self.index):
                self.backward(result.loss)
            self.end()
            seen.append(result._replace(loss=self.losses[-1]))
        self.sizes = self._sizes(seen, sure=sure)
        return self.take()

    def evaluate(self, batches: Iterable[Any], *, sure: bool = False) -> Loss:
        """Run forward passes alone; return the summed loss. Otherwise as `train`."""
        with split_logits(self._model.topology):
            results = [loss_of(self._model, batch) for batch in batches]
        self.sizes = self._sizes(results, sure=sure)
        return Loss.sum([result.loss for result in results])

    def sum_evaluation(self, loss: Loss | None, *, alarm: bool) -> Sums:
        """Sum the loss of an evaluation over all ranks. Collective.

        Raises:
            BatchError: the losses of some rank can't be averaged; all ranks raise it.
        """
        reason, topology = self.sizes.unfit, self._model.topology
        sums = sum_over_ranks(loss, [], topology, Step(alarm=alarm, unfit=reason is not None))
        if sums.unfit.item() > 0:
            raise BatchError(first_reason(reason, topology))
        return sums

    def _sizes(self, results: list[Result], *, sure: bool) -> Sizes:
        sizes = [self._size if sure or r.samples is None else r.samples for r in results]
        means = [result.is_mean for result in results]
        reason = None
        if any(means) and not all(means):
            reason = "the losses of some micro batches are means, and others a sum and its number of terms"
        elif (any(means) or self._model.loss_fn is not None) and any(size != self._size for size in sizes):
            why = "as their losses are means, which count alike" if any(means) else "as in a pipeline"
            reason = (
                f"the data iterator gave micro batches of {sizes} samples; expected "
                f"train_micro_batch_size_per_gpu({self._size}) in each, {why} (samples are the first dim of "
                "the tensors); leave out a short last batch (drop_last=True), or let a model that computes "
                "its own loss return (sum, count)"
            )
        return Sizes(reason, sum(sizes) - self._size * len(sizes), all(means))

    # --- one micro batch -------------------------------------------------------------------------------

    def count_forward(self) -> int:
        """Count a forward pass; return the number of earlier ones of this micro batch in the same mode."""
        mode = self._model.module.training
        self._forwards[mode] += 1
        return self._forwards[mode] - 1

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run `call`, a forward pass of the module; return its output with DTensors made whole."""
        if torch.is_inference_mode_enabled():
            # Parameters that ZeRO gathers in inference mode couldn't be trained afterwards.
            with torch.inference_mode(False), torch.no_grad(), split_logits(self._model.topology):
                output = call()
        else:
            with split_logits(self._model.topology):
                output = call()
        if not torch.is_grad_enabled():
            self._model.zero.show_parameters()
        output = tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, output)
        if self._model.loss_fn is not None:
            output = in_fp32(output)  # which only a compiled loss would do itself
        self._watch(output)
        return output

    def _watch(self, output: Any) -> None:
        """Notice backward passes through an output that aren't the engine's.

        Their gradients would be added to the next step's: neither summed over the ranks nor scaled.
        """
        weak = weakref.ref(self)  # torch keeps hooks where Python's garbage collector doesn't see them

        def hook(_gradient: Tensor) -> None:
            alive = weak()
            if alive is not None and not alive._in_backward and not alive._strays:
                alive._strays = _will_accumulate(alive._model.zero.whole_parameters())

        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]

    def check_no_strays(self) -> None:
        """Raise RuntimeError if there are gradients of backward passes that aren't the engine's."""
        if self._strays:
            raise RuntimeError(
                "a backward pass outside of engine.backward() has left gradients in the engine's parameters, "
                "neither summed over ranks nor scaled; call engine.backward(loss) in place of "
                "loss.backward(). If they are of another model's loss, call engine.zero_grad() to drop them, "
                "before this step's first backward()"
            )

    def backward(self, loss: Loss, *, retain_graph: bool = False, is_mean: bool = False) -> None:
        """Accumulate the gradients of `loss`, which `is_mean` says to be a micro batch's mean.

        If a step's losses are means, their gradients add up to the mean over its micro batches, however many
        backward passes it has.

        Raises:
            BatchError: some of the step's losses are means, and others are not.
        """
        zero, topology = self._model.zero, self._model.topology
        if not self.losses:
            self.share = 1.0 / (topology.degrees.dp * self._steps) if is_mean else 1.0
            self._are_means = is_mean
        if is_mean != self._are_means:
            raise BatchError(
                "some losses of this step are means, and others a sum and its number of terms; give "
                "backward() one kind, after engine.zero_grad()"
            )
        last = self.ends_step
        with split_logits(topology):
            if self._scaler is not None and self._scaler.terms is None:
                terms = sum_over_ranks(loss, [], topology).terms
                self._scaler.set_terms(terms.item() * self._steps)
            factor = self.share if self._scaler is None else self._scaler.factor
            self._in_backward = True
            self._model.scalars.before_backward()
            try:
                with zero.backward(last=last):
                    loss.lifted(factor).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            finally:
                self._in_backward = False
            if last:
                self._model.scalars.sum()
        self._summed = last
        self.losses.append(Loss(loss.total.detach(), loss.tokens))
        self._backwards += not self._inside_no_sync
        self._unsynced += self._inside_no_sync

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients locally, without communication; see `Engine.no_sync`."""
        if self._model.zero.stage >= 2:
            raise RuntimeError(
                f"no_sync() needs whole gradients, which ZeRO stage {self._model.zero.stage} doesn't keep; "
                "use stage 0 or 1, or more gradient_accumulation_steps"
            )
        if self._inside_no_sync:
            raise RuntimeError("no_sync() can't be nested")
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    def check_engine_steps(self) -> None:
        """Check that the optimizer's own `step()` may be called: no gradients wait for the engine's.

        Raises:
            RuntimeError: some do. It would step without the micro batches to come, clipping and counting.
        """
        if self.losses or self._strays:
            raise RuntimeError(
                "optimizer.step() was called between backward() and the engine's step(), which takes the "
                "optimizer's step itself; call engine.step() after each backward(), and not optimizer.step()"
            )

    def end(self) -> None:
        """End the current micro batch.

        Raises:
            RuntimeError: it had no backward pass, or `no_sync` is still open, or the step ends here and
                its gradients haven't been summed over the ranks.
        """
        if self._inside_no_sync:
            raise RuntimeError("step() can't be called inside no_sync()")
        if not self._backwards:
            raise RuntimeError("step() needs one backward() per micro batch; this one had 0")
        if self.is_boundary and not self._summed:
            raise RuntimeError(
                "the last backward() before this step() didn't sum the gradients over the ranks; call "
                "set_gradient_accumulation_boundary(True) before it, and let it be outside of no_sync()"
            )
        self.index += 1
        self.micro_steps += 1
        self._begin_next()

    def take(self) -> Loss:
        """Return the step's summed loss and start the next step."""
        total = self.total()
        self.clear()
        return total

    def total(self) -> Loss:
        """Return the sum of the step's losses so far; means count as those of all its micro batches."""
        total = Loss.sum(self.losses)
        return Loss(total.total, torch.full_like(total.tokens, self._steps)) if self._are_means else total


def _will_accumulate(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether the backward pass that is under way will add to a gradient of the parameters.

    `torch.autograd.grad`, as in a gradient penalty, doesn't.
    """
    for parameter in parameters:
        if parameter.requires_grad:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            try:
                if torch._C._will_engine_execute_node(node):
                    return True
            except RuntimeError:  # its gradient is asked for by `torch.autograd.grad`
                continue
    return False
