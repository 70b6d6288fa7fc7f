"""The engine: one optimizer step after another, on any topology."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import ckpt
from parallel import ParallelModel
from parallel.loss import Loss
from uni3d.checkpoint import live_weights
from uni3d.checkpoint.restore import CustomLoad, Restorer, Wanted, newest
from uni3d.checkpoint.save import Saver
from uni3d.config import BatchTriad, Config
from uni3d.engine.batches import loss_in, on_device, random_state
from uni3d.engine.data_loader import BatchSource, TrainingLoader, loading
from uni3d.engine.given_loader import GivenLoader
from uni3d.engine.guard import Guard
from uni3d.engine.micro_batches import MicroBatches, in_eval_mode
from uni3d.engine.step import Stepper
from uni3d.observe import Observer
from uni3d.state import Inventory
from uni3d.train_state import TrainState


class Engine:
    """Trains one model. Made by `uni3d.initialize`; every method is collective unless it says otherwise.

    A step's loss is the mean over the global batch: over its tokens where the loss is `(sum, count)` or, in
    `train_batch`, a Hugging Face model's own; over its micro batches where it is another single value.

    Attributes:
        config, triad: the config, and the three batch sizes that it comes to on this topology.
        model, module: this rank's part of the model, with and without what `parallel.build` adds.
        optimizer, lr_scheduler, training_dataloader: as `initialize` made them, or None.
        scaler: the loss scale of fp16, or None.
        device, global_rank, local_rank, world_size: of this process, as torchrun counts.
        last_load, client_state: the report of the last load and the checkpoint's client_state, or None.
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
        self.config = config
        self.triad = triad
        self.model: ParallelModel = state.model
        self.module: nn.Module = state.model.module
        topo = state.model.topology
        self.device, self.global_rank, self.world_size = topo.device, topo.rank, topo.world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # unset without torchrun
        self.optimizer, self.lr_scheduler = state.optimizer, state.lr_scheduler
        self.scaler = state.scaler
        self.last_load: ckpt.LoadReport | None = None
        self.client_state: dict[str, Any] | None = None
        self._progress = state.progress
        self._comm = topo.host
        inventory = Inventory(state.model)
        self._saver = Saver(state, config, comm=self._comm, inventory=inventory, model_spec=model_spec)
        self._restorer = Restorer(state, config, comm=self._comm, inventory=inventory)
        self._observer = Observer(config, triad, state, self._comm, self._saver.committed)
        self._stepper = Stepper(state, config, saver=self._saver, observer=self._observer)
        self._micro = MicroBatches(state.model, state.scaler, triad.accumulation, triad.micro_batch)
        self._guard = Guard(state.progress)
        data: Any = training_data
        if data is not None and not isinstance(data, GivenLoader):
            data = self.loader(data, collate_fn, lambda: self.global_samples, lambda: len(self._micro.losses))
        self.training_dataloader: TrainingLoader | GivenLoader | None = data
        self._source = BatchSource(self.training_dataloader, state.model, triad)
        state.model.zero.show_parameters()

    # --- whole batches ---------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """Take one optimizer step on one global batch; return its mean loss, the same on all ranks.

        Takes `gradient_accumulation_steps` micro batches from `data_iter`, by default from the engine's own
        loader: `(inputs, targets)`, or a tuple or dict of arguments for a model that computes its own loss.
        Such a model returns the loss, or an object that has it as `.loss`.

        Raises:
            FloatingPointError: the loss or a gradient isn't finite; no step was taken.
            StopIteration: `data_iter` ended before the step had all its micro batches.
            BatchError: some rank's micro batches don't fit, or are means of another size than the config's.
        """
        self._check_usable()
        self._micro.check_none("train_batch")
        self._check_optimizer("train_batch")
        with self._guard.together("train_batch"):
            with self._observer.timed("data"):
                batches = self._source.take(data_iter)
            self._guard.begun = True
            if self.scaler is not None and self.scaler.terms is None:  # before fp16's first backward pass
                self.scaler.set_terms(self._evaluate(batches)[1].item())
            if self._observer.profiles_next():
                self._evaluate(batches)  # the first time, torch's schedules compute something for its shapes
                self._observer.profile(lambda: self._evaluate(batches))
            if not self.module.training:  # else modules that the script put into eval mode stay in it
                self.module.train()
            with self._observer.timed("forward and backward"), self._random_state():
                loss = self._run(batches, train=True)
            with self._observer.timed("step"):
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
        with in_eval_mode(self.module), torch.no_grad(), self._random_state():
            loss = self._run(batches, train=False)
        self.model.zero.show_parameters()
        sums = self._micro.sum_evaluation(loss, alarm=self._saver.failed)
        return sums.loss, sums.terms, sums.alarms

    def _run(self, batches: list[Any], *, train: bool) -> Loss | None:
        """Run this rank's micro batches; return the summed loss, None where a later stage has it."""
        if self.model.pipeline is not None:
            factor, size = self.scaler.factor if train and self.scaler else 1.0, self.triad.micro_batch
            return self.model.pipeline.run(batches, train=train, size=size, factor=factor)
        run = self._micro.train if train else self._micro.evaluate
        return run(batches, sure=self._source.sure)

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

    __call__ = forward

    def backward(self, loss: Any, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor:
        """Accumulate gradients of one micro batch's loss: its mean, or its sum and the number of its terms.

        An output that has it as `.loss` or `["loss"]` will do. Returns the mean. It and the gradient are
        divided by the micro batches per step unless `scale_wrt_gas` is false. Inside `no_sync`, a mean isn't
        one more micro batch of the step.
        """
        self._micro.check_whole("backward")
        self._micro.check_one_backward()
        self._check_optimizer("backward")
        loss = loss_in(loss)
        value = Loss.of(loss)
        steps = self.triad.accumulation
        mean = value.total.detach() / value.tokens / (steps if scale_wrt_gas else 1)
        value = value if scale_wrt_gas else Loss(value.total * steps, value.tokens)
        with self._guard.together("backward", begun=True), self._observer.timed("backward"):
            self._micro.backward(value, retain_graph=retain_graph, is_mean=not isinstance(loss, tuple))
        return mean

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the micro batch at hand is the last before an optimizer step. Local."""
        return self._micro.is_boundary

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate gradients on this rank alone; the next backward pass after it sums them. ZeRO 0 or 1."""
        return self._micro.no_sync()

    def step(self) -> None:
        """End a micro batch; at the accumulation boundary, take the optimizer step."""
        self._micro.check_whole("step")
        self._check_optimizer("step")
        boundary = self.is_gradient_accumulation_boundary()
        self._micro.end()
        self._stepper.applied = False
        if boundary:
            with self._guard.together("step", begun=True), self._observer.timed("step"):
                self._stepper.finish(self._micro.take(), self._micro.share)
            self._observer.tell()

    def zero_grad(self) -> None:
        """Drop all gradients, and begin the step's accumulation anew, with a warning if that loses any."""
        self._micro.drop()

    # --- checkpoints -------------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | int | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint that any topology can load.

        Returns when everything has been copied; it is written and committed while training goes on. The next
        save or load, `wait_for_checkpoint` and the end of the process wait for it. If it fails, the engine's
        next call raises. With the config's `checkpoint.async_save` false it is committed on return.

        Args:
            save_dir, tag: the run's folder, seen by all ranks, or a URL that fsspec knows; the checkpoint's
                name in it, by default `global_step<N>`.
            client_state: the script's own state: dicts, lists, strings, numbers, booleans, None.
            save_latest: whether `latest` shall name it.
            exclude_frozen_parameters: leave them out; load with `load_module_strict=False` then.

        Raises:
            ckpt.CheckpointError: it failed, or the save before did; the same on all ranks. An older one of
                this tag is as it was, and training may go on.
        """
        self._check_ready("save_checkpoint")
        frozen = not exclude_frozen_parameters
        self._saver.save(save_dir, tag, client_state or {}, update_latest=save_latest, frozen=frozen)
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the last save is committed; raises CheckpointError, on all ranks, if it failed."""
        self._saver.wait()

    @property
    def last_save(self) -> ckpt.SaveReport | None:
        """Report of the last save that has ended."""
        return self._saver.report

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | int | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: CustomLoad | None = None,
    ) -> tuple[str, dict[str, Any]]:
        """Take up a checkpoint, whatever topology wrote it. Returns its folder and its client_state.

        Args:
            load_dir, tag: the run's folder or URL, and a checkpoint in it, by default the one `latest` names.
            load_module_strict: require the same arrays in both; else `last_load` lists the differences.
            load_optimizer_states, load_lr_scheduler_states, load_module_only: what else than weights and
                buffers is loaded; by default everything.
            custom_load_fn: called as `custom_load_fn(src=state_dict, dst=module)` to load the parameters.
                `src` reads each tensor when asked for it, whole and in fp32; `dst` has whole plain tensors in
                the host's memory, into which all ranks must write the same.

        Raises:
            ckpt.CheckpointError: nothing is there, or something doesn't fit; the engine is as it was.
            ckpt.PartialLoadError: data is damaged, and the engine of no more use.
        """
        self._check_ready("load_checkpoint")
        wanted = Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom=custom_load_fn,
        )
        self._saver.wait()
        try:
            loaded = self._restorer.load(load_dir, tag, wanted)
        except ckpt.PartialLoadError as error:
            self._guard.unusable = f"a load failed half-way ({error})"
            raise
        finally:
            self.model.zero.show_parameters()
        self._saver.forget_plan()
        self._source.moved()
        self.last_load, self.client_state = loaded.report, loaded.client_state
        return loaded.url, loaded.client_state

    def resume(self, run: str | Path) -> dict[str, Any] | None:
        """Load the newest checkpoint of the folder `run`: its client_state, or None if there is none."""
        self._saver.wait()
        return None if newest(self._comm, run) is None else self.load_checkpoint(run)[1]

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """Return this stage's part of the whole model's `state_dict`: fp32, in the host's memory."""
        self._check_ready("module_state_dict")
        return live_weights.state_dict_of(self.model, frozen=not exclude_frozen_parameters)

    def save_16bit_model(
        self,
        save_dir: str | Path,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the whole model's `state_dict` as one `torch.save` file, through the memory of rank 0's host.

        Parameters have the type that training computes in; for fp32 there is `uni3d export`. Raises
        CheckpointError, the same on all ranks, if it can't be written; the older file is as it was then.
        """
        self._check_ready("save_16bit_model")
        frozen = not exclude_frozen_parameters
        live_weights.save_16bit(self.model, self._comm, save_dir, save_filename, frozen=frozen)
        return True

    # --- by DeepSpeed's names; all of it is local ---------------------------------------------------------

    @property
    def global_steps(self) -> int:
        return self._progress.global_steps

    @property
    def global_samples(self) -> int:
        return self._progress.global_samples

    @property
    def skipped_steps(self) -> int:
        return self._progress.skipped_steps

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.module.named_parameters()

    def get_lr(self) -> list[float]:
        groups = self.optimizer.param_groups if self.optimizer else []
        return [float(group.get("lr", 0.0)) for group in groups]

    def get_global_grad_norm(self) -> float | None:
        return self._stepper.look().norm  # before clipping; None before the first step

    def get_loss_scale(self) -> float:
        return 1.0 if self.scaler is None else self.scaler.scale

    def was_step_applied(self) -> bool:
        """Return whether the last `step()` or `train_batch()` changed the parameters: it may be skipped."""
        return self._stepper.look().applied

    def train_batch_size(self) -> int:
        return self.triad.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.triad.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.triad.accumulation

    def zero_optimization_stage(self) -> int:
        return self.model.zero.stage

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)  # for forward(); train_batch and eval_batch set their own

    def eval(self) -> None:
        self.train(False)

    def _random_state(self, nth: int = 0) -> AbstractContextManager[None]:
        index = self._micro.index
        return random_state(self.model.topology, self.config.seed, self.global_steps, index, nth)

    def _check_optimizer(self, call: str) -> None:
        if self.optimizer is None:
            raise ValueError(f"{call} needs an optimizer; name one in the config or give one to initialize")

    def _check_ready(self, call: str) -> None:
        self._check_usable()
        self._micro.check_none(call)
        self._stepper.settle()

    def _check_usable(self) -> None:
        self._guard.check()
        self._saver.check()
