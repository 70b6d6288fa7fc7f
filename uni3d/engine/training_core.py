"""The engine's training calls: whole batches, or micro batches one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from parallel import HostComm, ParallelModel
from parallel.loss import Loss
from parallel.spans import Span, no_span
from uni3d.checkpoint.save import Saver
from uni3d.config import BatchTriad, Config
from uni3d.engine.batches import loss_in, on_device, random_state
from uni3d.engine.data_loader import BatchSource, TrainingLoader, loading
from uni3d.engine.garbage import collected_after
from uni3d.engine.given_loader import GivenLoader
from uni3d.engine.guard import Guard
from uni3d.engine.micro_batches import MicroBatches, in_eval_mode
from uni3d.engine.optimizer_face import put_face
from uni3d.engine.step import Stepper
from uni3d.observe import Observer
from uni3d.state import Inventory
from uni3d.train_state import TrainState


class TrainingCore(nn.Module):
    """Trains one model, its only child, `module`. See `Engine`.

    The attributes are those of `Engine`. What begins with an underscore is for the classes built on this one.
    """

    def __init__(
        self,
        *,
        config: Config,
        triad: BatchTriad,
        state: TrainState,
        model_spec: dict[str, Any],
        training_data: Dataset[Any] | GivenLoader | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Collective. `model_spec` is the model's own description, for the manifest."""
        super().__init__()
        self.config = config
        self.triad = triad
        self.model: ParallelModel = state.model
        self.module: nn.Module = state.model.module
        self.training = self.module.training
        topo = state.model.topology
        self.device, self.global_rank, self.world_size = topo.device, topo.rank, topo.world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # unset without torchrun
        self.optimizer, self.lr_scheduler = state.optimizer, state.lr_scheduler
        self.scaler = state.scaler
        self._state = state
        self._progress = state.progress
        self._comm = topo.host
        self._inventory = Inventory(state.model)
        self._saver = Saver(
            state,
            comm=self._comm,
            writing=HostComm(self._comm),
            inventory=self._inventory,
            model_spec=model_spec,
        )
        self._observer = Observer(config, triad, state, self._comm, self._saver.committed)
        self._guard = Guard(state.progress, self._comm)
        self._stepper = Stepper(
            state, config, saver=self._saver, observer=self._observer, look=self._guard.look
        )
        self._micro = MicroBatches(state.model, state.scaler, triad.accumulation, triad.micro_batch)
        if state.optimizer is not None:
            put_face(state.optimizer, self._micro, self._stepper, state.scaler)
        data: Any = training_data
        if data is not None and not isinstance(data, GivenLoader):
            position = lambda: self._progress.global_samples  # noqa: E731
            data = self.loader(data, collate_fn, position, lambda: self._micro.taken)
        self.training_dataloader: TrainingLoader | GivenLoader | None = data
        self._source = BatchSource(self.training_dataloader, state.model, triad)
        self._given: Iterator[Any] | None = None
        """Source of `train_batch`'s batches, if the script has set it."""
        self._span: Span = no_span
        state.model.zero.show_parameters()

    # --- whole batches ---------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Take one optimizer step on one global batch; return its mean loss, the same on all ranks.

        Takes `gradient_accumulation_steps` micro batches from `data_iter`, by default from what
        `set_dataloader` or `set_dataiterator` has set, or else from the engine's own loader: `(inputs,
        targets)`, or a tuple or dict of arguments for a model that computes its own loss. Such a model
        returns the loss, or an object that has it as `.loss`.

        Raises:
            FloatingPointError: the loss or a gradient isn't finite; no step was taken.
            StopIteration: `data_iter` ended before the step had all its micro batches.
            BatchError: some rank's micro batches don't fit, or are means of another size than the config's.
        """
        self._check_usable()
        self._micro.check_none("train_batch")
        self._micro.check_no_strays()
        self._check_optimizer("train_batch")
        with collected_after(), self._guard.together("train_batch"):
            with self._observer.timed("data"), self._span("data"):
                batches = self._source.take(self._given if data_iter is None else data_iter)
            self._guard.begun = True
            if self.scaler is not None and self.scaler.terms is None:  # before fp16's first backward pass
                self.scaler.set_terms(self._evaluate(batches)[1].item())
            if self._observer.profiles_next():
                self._evaluate(batches)  # the first time, torch's schedules compute something for its shapes
                self._observer.profile(lambda: self._evaluate(batches))
            if not self.module.training:  # else modules that the script put into eval mode stay in it
                self.train()
            with self._observer.timed("forward and backward"), self._random_state():
                loss = self._run(batches, train=True)
            with self._observer.timed("step"), self._span("step"):
                mean = self._stepper.finish(loss, sizes=self._micro.sizes)
            self._observer.tell()
            return mean

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Return the mean loss of one global batch from `data_iter`, without training on it."""
        self._check_usable()
        with self._guard.together("eval_batch"):
            batches = self._source.take(data_iter)
            self._guard.begun = True
            total, tokens, alarms = self._evaluate(batches)
        self._saver.agree(alarms.item() > 0)
        return total / tokens

    def _evaluate(self, batches: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return, over all ranks: the summed loss, the number of its terms, the number of alarms."""
        with in_eval_mode(self), torch.no_grad(), self._random_state():
            loss = self._run(batches, train=False)
        self.model.zero.show_parameters()
        sums = self._micro.sum_evaluation(loss, alarm=self._saver.failed)
        return sums.loss, sums.terms, sums.alarms

    def _run(self, batches: list[Any], *, train: bool) -> Loss | None:
        """Run this rank's micro batches; return the summed loss, None where a later stage has it."""
        if self.model.pipeline is not None:
            factor, size = self.scaler.factor if train and self.scaler else 1.0, self.triad.micro_batch
            if train:
                self._micro.micro_steps += len(batches)
            return self.model.pipeline.run(batches, train=train, size=size, factor=factor)
        run = self._micro.train if train else self._micro.evaluate
        return run(batches, sure=self._source.sure)

    def enclose_parts(self, span: Span) -> None:
        """Enclose each part of later `train_batch` calls in what `span` returns (`parallel.spans`). Local."""
        self._span = self._micro.span = span
        if self.model.pipeline is not None:
            self.model.pipeline.span = span

    def loader(
        self,
        dataset: Dataset[Any],
        collate_fn: Callable[[list[Any]], Any] | None = None,
        position: Callable[[], int] | None = None,
        taken: Callable[[], int] = lambda: 0,
    ) -> TrainingLoader:
        """Return this rank's micro batches of `dataset`: each `for` begins at `position()`, or 0. Local."""
        load = partial(TrainingLoader, dataset, self.triad, position=position, taken=taken)
        return load(collate_fn=collate_fn, **loading(self.config, self.model.topology))

    # --- micro batches, one by one (no pipeline stages) ------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for one micro batch; needs pp = 1, where a rank has the whole model."""
        self._check_usable()
        self._micro.check_whole("forward")
        args, kwargs = on_device((args, kwargs), self.device)
        first, nth = self._micro.begins_step, self._micro.count_forward()
        call = partial(self.module, *args, **kwargs)
        if first and torch.is_grad_enabled() and self._observer.profiles_next():
            call = partial(self._observer.profile, call, self.triad.accumulation)
        together = self._guard.together("forward", begun=True)
        with together, self._observer.timed("forward"), self._random_state(nth):
            return self._micro.forward(call)

    def backward(self, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Accumulate gradients of one micro batch's loss: its mean, or its sum and the number of its terms.

        An output that has it as `.loss` or `["loss"]` will do. Returns the mean. It and the gradient are
        divided by the micro batches per step unless `scale_wrt_gas` is false. Several calls before `step()`
        add up: gradients of means are added, sums and their numbers of terms are added before the division.
        """
        self._micro.check_whole("backward")
        self._micro.check_no_strays()
        self._check_optimizer("backward")
        loss = loss_in(loss)
        value = Loss.of(loss)
        steps = self.triad.accumulation
        mean = value.total.detach() / value.tokens / (steps if scale_wrt_gas else 1)
        if not scale_wrt_gas:
            value = Loss(value.total * steps, value.tokens)
        with self._guard.together("backward", begun=True), self._observer.timed("backward"):
            self._micro.backward(value, retain_graph=retain_graph, is_mean=not isinstance(loss, tuple))
        return mean if isinstance(loss, tuple) else mean.to(loss.dtype)

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the micro batch at hand is the last before an optimizer step. Local."""
        return self._micro.is_boundary

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Say whether the micro batch at hand is the last before an optimizer step, instead of counting.

        Call it before the `backward()` of the last micro batch; it holds until the next call. None counts
        again. Alike on all ranks. Mean losses are divided by `gradient_accumulation_steps` all the same.
        """
        self._micro.check_whole("set_gradient_accumulation_boundary")
        self._micro.boundary = is_boundary

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients on this rank alone; the next backward pass after it sums them. ZeRO 0 or 1."""
        return self._micro.no_sync()

    def step(self) -> None:
        """End a micro batch; at the accumulation boundary, take the optimizer step."""
        self._micro.check_whole("step")
        self._micro.check_no_strays()
        self._check_optimizer("step")
        boundary = self.is_gradient_accumulation_boundary()
        self._micro.end()
        self._stepper.applied = False
        if boundary:
            with self._guard.together("step", begun=True), self._observer.timed("step"):
                self._stepper.finish(self._micro.take(), self._micro.share)
            self._observer.tell()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and begin the step's accumulation anew, with a warning if that loses any."""
        if not set_to_none:
            raise ValueError(
                "an engine's gradients are dropped, not filled with zeros; leave out set_to_none"
            )
        self._micro.drop()

    # --- conditions ------------------------------------------------------------------------------------

    def _random_state(self, nth: int = 0) -> AbstractContextManager[None]:
        step, index = self._progress.global_steps, self._micro.index
        return random_state(self.model.topology, self.config.seed, step, index, nth)

    def _check_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ValueError(f"{call} needs an optimizer; name one in the config or give one to initialize")

    def _check_usable(self) -> None:
        self._guard.check()
        self._saver.check()
