"""The engine: one optimizer step after another, on whatever topology."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from ckpt import CheckpointError
from parallel import Failures, ParallelModel
from parallel.gradients import sum_over_ranks
from parallel.loss import Loss, split_logits
from uni3d.checkpoint.save import Checkpointer
from uni3d.config import BatchTriad, Config
from uni3d.engine.accessors import Accessors
from uni3d.engine.batches import BatchError, on_device, run_batches
from uni3d.engine.data import TrainingLoader
from uni3d.engine.loss_scale import LossScale
from uni3d.engine.random_state import random_state
from uni3d.engine.saving import Saving
from uni3d.engine.step import Stepper
from uni3d.observe import Observer

ALIKE = (FloatingPointError, CheckpointError)
"""Errors that all ranks raise at the same place."""


class Engine(Accessors, Saving):
    """Trains one model. Made by `uni3d.initialize`; every method is collective unless it says otherwise.

    A step's loss is the mean over the global batch: over its tokens where the model's `loss_fn` returns
    `(sum, count)`, over its micro batches where the loss is a single value.

    Attributes:
        optimizer, lr_scheduler, training_dataloader: as `initialize` made them, or None.
        global_steps: steps, over all resumes, those that were skipped for an overflow with them.
        global_samples: samples consumed, over all ranks and resumes.
        skipped_steps: steps that were skipped because a gradient overflowed in fp16.
        scaler: fp16's loss scale, or None.
    """

    def __init__(
        self,
        *,
        config: Config,
        triad: BatchTriad,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer | None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> None:
        self.config = config
        self.triad = triad
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.training_dataloader: TrainingLoader | None = None
        self.global_steps = 0
        self.global_samples = 0
        self.skipped_steps = 0
        self.scaler = LossScale(config.fp16) if config.precision == "fp16" else None
        self.checkpointer = Checkpointer(self)
        self._stepper = Stepper(self)
        self._own_iterator: Iterator[Any] | None = None
        self._micro_steps = 0  # micro batches since the last boundary
        self._pending: list[Loss] = []  # their losses, from the forward/backward/step calls
        self._backwards = 0  # of the micro batch at hand
        self._inside_no_sync = False
        self._forwards = {True: 0, False: 0}  # of the micro batch at hand, in training and in evaluation
        self._begun = False  # whether what the ranks do together has begun to change anything
        self._failures = Failures()
        self.observer = Observer(self)

    # --- whole batches ---------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One optimizer step on one global batch, under any topology.

        Takes `gradient_accumulation_steps` micro batches from `data_iter`, by default from the engine's own
        loader: `(inputs, targets)`, or what a model that computes its own loss is called with: a tuple of
        arguments, or a dict of them by name. Such a model returns the loss, or an object that has it as
        `.loss`. Returns the batch's mean loss, the same on all ranks.

        Raises:
            FloatingPointError: the loss or a gradient isn't finite; no step was taken.
            ValueError: micro batches of another size than the config's.
        """
        self._check_usable()
        self._check_between_steps("train_batch")
        self._check_optimizer("train_batch")
        with self._together("train_batch"):
            with self.observer.timed("data"):
                batches = self._take(data_iter)
            self._begun = True
            self._find_terms(batches)
            if self.observer.profiles_next():
                self._evaluate(batches)  # the first time, torch's schedules compute something for its shapes
                self.observer.profile(lambda: self._evaluate(batches))
            self.module.train()
            with self.observer.timed("forward and backward"), self._random_state():
                loss = run_batches(self.model, batches, self.triad, train=True, factor=self._factor())
            with self.observer.timed("step"):
                mean = self._stepper.finish(loss)
            self.observer.tell()
            return mean

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Mean loss of one global batch from `data_iter`, without learning from it."""
        self._check_usable()
        with self._together("eval_batch"):
            batches = self._take(data_iter)
            self._begun = True
            total, tokens, alarms = self._evaluate(batches)
        self.checkpointer.agree(alarms.item() > 0)
        return total / tokens

    def _evaluate(self, batches: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Over all ranks: the loss summed, the number of its terms, the number of alarms."""
        was_training = self.module.training
        self.module.eval()
        with torch.no_grad(), self._random_state():
            loss = run_batches(self.model, batches, self.triad, train=False)
        self.module.train(was_training)
        self.model.zero.reshard()
        total, tokens, _, alarms = sum_over_ranks(
            loss, [], self.model.topology, alarm=self.checkpointer.failed
        )
        return total, tokens, alarms

    def _take(self, data_iter: Iterator[Any] | None) -> list[Any]:
        """This rank's micro batches of the next global batch, on its device."""
        if data_iter is None:
            if self.training_dataloader is None:
                raise ValueError("give a data iterator, or training_data to initialize")
            if self._own_iterator is None:
                self._own_iterator = iter(self.training_dataloader)
            data_iter = self._own_iterator
        else:
            self._own_iterator = None  # its place in the data won't be that of training any more
        return [self._on_device(next(data_iter)) for _ in range(self.triad.accumulation)]

    def _find_terms(self, batches: list[Any]) -> None:
        """Before fp16's first backward pass: how many terms the loss of a global batch has."""
        if self.scaler is not None and self.scaler.terms is None:
            self.scaler.set_terms(self._evaluate(batches)[1].item())

    # --- micro batches, one by one (no pipeline stages) ------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one micro batch; needs pp = 1, where a rank sees the whole model."""
        self._check_usable()
        self._check_no_stages("forward")
        args, kwargs = self._on_device((args, kwargs))
        nth = self._forwards[self.module.training]
        self._forwards[self.module.training] += 1
        with self._together("forward", begun=True), self.observer.timed("forward"), self._random_state(nth):
            if torch.is_inference_mode_enabled():  # what ZeRO keeps must be of use for training
                with torch.inference_mode(False), torch.no_grad():
                    output = self._forward_once(args, kwargs)
            else:
                output = self._forward_once(args, kwargs)
            if not torch.is_grad_enabled():
                self.model.zero.reshard()  # or what a script writes into the parameters would not be used
        return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, output)

    def _forward_once(self, args: Any, kwargs: Any) -> Any:
        with split_logits(self.model.topology):
            counts = self.observer.profiles_next() and self._micro_steps == 0 and not self._pending
            if not (counts and torch.is_grad_enabled()):
                return self.module(*args, **kwargs)
            outputs: list[Any] = []
            self.observer.profile(
                lambda: outputs.append(self.module(*args, **kwargs)), self.triad.accumulation
            )
            return outputs[0]

    def backward(
        self, loss: Tensor | tuple[Tensor, Tensor], retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> Tensor:
        """Add up gradients of one micro batch's loss: its mean, or its sum and the number of its terms.

        With `scale_wrt_gas` false, a mean counts as often as there are micro batches in a step: its gradient
        isn't divided by their number. Returns the micro batch's mean loss, divided by that number unless
        `scale_wrt_gas` is false. Inside `no_sync`, a mean is added to the step's loss without being one more
        micro batch of it.
        """
        self._check_no_stages("backward")
        self._check_optimizer("backward")
        value = Loss.of(loss)
        steps = self.triad.accumulation
        mean = value.total.detach() / value.tokens / (steps if scale_wrt_gas else 1)
        if not scale_wrt_gas:
            value = Loss(value.total * steps, value.tokens)
        self.model.zero.before_backward(last=self._ends_step())
        with (
            self._together("backward", begun=True),
            self.observer.timed("backward"),
            split_logits(self.model.topology),
        ):
            if self.scaler is not None and self.scaler.terms is None:
                _, tokens, _, _ = sum_over_ranks(value, [], self.model.topology)
                self.scaler.set_terms(tokens.item() * steps)
            value.lifted(self._factor()).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            if self._ends_step():
                self.model.zero.reshard()  # the step's gradients are in `.grad` now
        counts = isinstance(loss, tuple) or not self._inside_no_sync
        self._pending.append(Loss(value.total.detach(), value.tokens if counts else value.tokens * 0))
        self._backwards += not self._inside_no_sync
        return mean

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro batch at hand is the last before an optimizer step. Local."""
        return self._micro_steps + 1 == self.triad.accumulation

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add gradients up on this rank, beyond the accumulation of the config.

        The backward pass after it sums all of them over the ranks. Needs ZeRO stage 0 or 1, as in DeepSpeed:
        the others don't keep gradients whole.
        """
        if self.model.zero.stage >= 2:
            raise RuntimeError(
                f"no_sync() needs whole gradients, which ZeRO stage {self.model.zero.stage} doesn't keep; "
                "use stage 0 or 1, or more gradient_accumulation_steps"
            )
        if self._inside_no_sync:
            raise RuntimeError("no_sync() can't be entered twice")
        self._inside_no_sync = True
        try:
            yield
        finally:
            self._inside_no_sync = False

    def step(self) -> None:
        """End a micro batch; at the accumulation boundary, take the optimizer step."""
        self._check_no_stages("step")
        self._check_optimizer("step")
        if self._inside_no_sync:
            raise RuntimeError("step() can't be called inside no_sync()")
        if self._backwards != 1:
            raise RuntimeError("step() comes after one backward() of each micro batch")
        boundary = self.is_gradient_accumulation_boundary()
        self._micro_steps += 1
        self._backwards = 0
        self._forwards = {True: 0, False: 0}
        self._stepper.applied = False
        if boundary:
            losses, self._pending, self._micro_steps = self._pending, [], 0
            with self._together("step", begun=True), self.observer.timed("step"):
                self._stepper.finish(Loss.sum(losses))
            self.observer.tell()

    def zero_grad(self) -> None:
        """Drop all gradients, and begin the step's accumulation anew, with a warning if that loses any."""
        if self._pending:
            warnings.warn(
                f"zero_grad() drops the gradients of {len(self._pending)} micro batches, of "
                f"{self.triad.accumulation} for a step; step() drops them itself when it has taken one",
                stacklevel=2,
            )
        self.model.zero.drop_gradients()
        self._pending, self._micro_steps, self._backwards = [], 0, 0
        self._forwards = {True: 0, False: 0}

    # --- modes, checks -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> None:
        """Set the module's mode for forward(); train_batch and eval_batch set their own. Local."""
        self.module.train(mode)

    def eval(self) -> None:
        self.train(False)

    def _ends_step(self) -> bool:
        """Whether the backward pass to come is a step's last."""
        return self.is_gradient_accumulation_boundary() and not self._inside_no_sync

    def _factor(self) -> float:
        """What a loss is multiplied by before its backward pass."""
        return 1.0 if self.scaler is None else self.scaler.factor

    def _on_device(self, values: Any) -> Any:
        return on_device(values, self.device)

    def _random_state(self, nth: int = 0) -> AbstractContextManager[None]:
        return random_state(
            self.model.topology,
            seed=self.config.seed,
            step=self.global_steps,
            micro_step=self._micro_steps,
            nth=nth,
        )

    @contextmanager
    def _together(self, call: str, *, begun: bool = False) -> Iterator[None]:
        """Around what the ranks do together: if one fails, all stop with that one's reason.

        After what all ranks raise alike, and what is raised before they have begun, training may go on.
        """
        self._begun = begun
        try:
            with self._failures.told(f"step {self.global_steps + 1}: {call}()", alike=ALIKE):
                yield
        except (*ALIKE, BatchError):
            raise
        except Exception as error:
            if self._begun:  # in the midst of a step, so its state is of no more use
                self._unusable = f"{call}() failed: {type(error).__name__}: {error}"
            raise

    def _data_moved(self) -> None:
        self._own_iterator = None
        if self.training_dataloader is not None:
            self.training_dataloader.moved()

    def _check_no_stages(self, call: str) -> None:
        if self.model.topology.degrees.pp > 1:
            raise RuntimeError(
                f"{call}() needs the whole model on a rank, but pp is {self.model.topology.degrees.pp}; "
                "use train_batch() or eval_batch()"
            )

    def _check_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ValueError(f"{call} needs an optimizer; name one in the config or give one to initialize")

    def _check_ready(self, call: str) -> None:
        self._check_usable()
        self._check_between_steps(call)
        self._stepper.settle()

    def _check_between_steps(self, call: str) -> None:
        if self._pending:
            raise RuntimeError(f"{call}() comes after step(), not between micro batches of a step")

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"this engine can't be used any more: {self._unusable}; initialize a new one")
        self.checkpointer.check()
