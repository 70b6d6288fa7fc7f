"""The engine: one optimizer step after another, on whatever topology."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

import ckpt
from parallel import ParallelModel
from parallel.gradients import local_gradients, sum_over_ranks
from parallel.pipeline import Loss, split_logits
from uni3d.batches import run_batches
from uni3d.checkpointing import Checkpointer
from uni3d.config import BatchTriad, Config
from uni3d.data import TrainingLoader
from uni3d.random_state import random_state


class Engine:
    """Trains one model. Made by `uni3d.initialize`; every method is collective unless it says otherwise.

    A step's loss is the mean over the global batch: over its tokens where the model's `loss_fn` returns
    `(sum, count)`, over its micro batches where the loss is a single value.

    Attributes:
        module: this rank's part of the model.
        optimizer, lr_scheduler, training_dataloader: as `initialize` made them, or None.
        global_steps: optimizer steps taken, over all resumes.
        global_samples: samples consumed, over all ranks and resumes.
        last_load: what the last load restored, defaulted and dropped.
        last_save: what the last save that has ended wrote.
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
        self.last_load: ckpt.LoadReport | None = None
        self.last_save: ckpt.SaveReport | None = None
        self._checkpointer = Checkpointer(self)
        self._own_iterator: Iterator[Any] | None = None
        self._micro_steps = 0  # micro batches since the last boundary
        self._pending: list[Loss] = []  # their losses, from the forward/backward/step calls
        self._gradient_norm: float | None = None
        self._unusable: str | None = None

    @property
    def module(self) -> nn.Module:
        return self.model.module

    # --- whole batches ---------------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> Tensor:
        """One optimizer step on one global batch, under any topology.

        Takes `gradient_accumulation_steps` micro batches `(inputs, targets)` from `data_iter`, by default
        from the engine's own loader. Returns the batch's mean loss, the same on all ranks.

        Raises:
            FloatingPointError: the loss or a gradient isn't finite; no step was taken.
            ValueError: micro batches of another size than the config's.
        """
        self._check_usable()
        self._check_between_steps("train_batch")
        if self.optimizer is None:
            raise ValueError(
                "train_batch needs an optimizer; name one in the config or give one to initialize"
            )
        batches = self._take(data_iter)
        self.module.train()
        with self._random_state():
            loss = run_batches(self.model, batches, self.triad, train=True)
        return self._finish_step(loss)

    def eval_batch(self, data_iter: Iterator[Any]) -> Tensor:
        """Mean loss of one global batch from `data_iter`, without learning from it."""
        self._check_usable()
        batches = self._take(data_iter)
        self.module.eval()
        with torch.no_grad(), self._random_state():
            loss = run_batches(self.model, batches, self.triad, train=False)
        self.module.train()
        self.model.zero.reshard()
        total, tokens, _, alarms = sum_over_ranks(
            loss, [], self.model.topology, alarm=self._checkpointer.failed
        )
        self._checkpointer.agree(alarms.item() > 0)
        return total / tokens

    def _take(self, data_iter: Iterator[Any] | None) -> list[Any]:
        """This rank's micro batches of the next global batch, on its device."""
        if data_iter is None:
            if self.training_dataloader is None:
                raise ValueError("give a data iterator, or training_data to initialize")
            if self._own_iterator is None:
                self._own_iterator = iter(self.training_dataloader)
            data_iter = self._own_iterator
        device = self.model.topology.device
        return [
            tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, next(data_iter))
            for _ in range(self.triad.accumulation)
        ]

    # --- micro batches, one by one (no pipeline stages) ------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for one micro batch; needs pp = 1, where a rank sees the whole model."""
        self._check_usable()
        self._check_no_stages("forward")
        device = self.model.topology.device
        args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))
        with self._random_state(), split_logits(self.model.topology):
            output = self.module(*args, **kwargs)
        return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, output)

    def backward(self, loss: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Add up gradients of one micro batch's loss: its mean, or its sum and the number of its terms."""
        self._check_no_stages("backward")
        value = Loss.of(loss)
        self.model.zero.before_backward(last=self.is_gradient_accumulation_boundary())
        with split_logits(self.model.topology):
            value.total.backward()  # type: ignore[no-untyped-call]
        self._pending.append(Loss(value.total.detach(), value.tokens))
        return value.total.detach() / value.tokens

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the micro batch at hand is the last before an optimizer step. Local."""
        return self._micro_steps + 1 == self.triad.accumulation

    def step(self) -> None:
        """End a micro batch; at the accumulation boundary, take the optimizer step."""
        self._check_no_stages("step")
        if self.optimizer is None:
            raise ValueError("step needs an optimizer; name one in the config or give one to initialize")
        if len(self._pending) != self._micro_steps + 1:
            raise RuntimeError("step() comes after one backward() of each micro batch")
        boundary = self.is_gradient_accumulation_boundary()
        self._micro_steps += 1
        if boundary:
            losses, self._pending, self._micro_steps = self._pending, [], 0
            self._finish_step(Loss.sum(losses))

    # --- the step itself -------------------------------------------------------------------------------

    def _finish_step(self, loss: Loss | None) -> Tensor:
        """From summed gradients to updated parameters."""
        assert self.optimizer is not None, "checked before the batch was taken"
        self.model.zero.reshard()  # a forward pass after the backward one has brought whole copies back
        # 1. One number for the loss and one for the gradients' norm, over all ranks in one collective.
        self.model.tied.sum()
        #    A save that failed in the background is told along; the next call raises it, on all ranks.
        total, tokens, square, alarms = sum_over_ranks(
            loss, self._counted_parameters(), self.model.topology, alarm=self._checkpointer.failed
        )
        mean_loss, norm = total / tokens, square.sqrt() / tokens
        self._gradient_norm = norm.item()
        self._checkpointer.agree(alarms.item() > 0)
        if not (mean_loss + norm).isfinite().item():  # the same numbers on all ranks, so all raise
            self.module.zero_grad()
            self.global_samples += self.triad.train_batch  # consumed all the same, as the data iterator has
            raise FloatingPointError(
                f"step {self.global_steps + 1}: the loss is {mean_loss.item():g} and the gradients' norm "
                f"{self._gradient_norm:g}; no step was taken"
            )
        # 2. Gradients are of the sum over the global batch: divide, and clip, in one multiplication.
        scale = 1.0 / tokens
        if self.config.gradient_clipping > 0:
            scale = scale * (self.config.gradient_clipping / (norm + 1e-6)).clamp(max=1.0)
        gradients = local_gradients(self._trained_parameters())
        if gradients:
            torch._foreach_mul_(gradients, scale.float())
        # 3. The step.
        self.optimizer.step()
        self.module.zero_grad()  # those too that the optimizer doesn't have
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.global_steps += 1
        self.global_samples += self.triad.train_batch
        return mean_loss.float()

    def _trained_parameters(self) -> list[nn.Parameter]:
        """This stage's parameters that the optimizer has."""
        assert self.optimizer is not None, "checked before the batch was taken"
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _counted_parameters(self) -> list[nn.Parameter]:
        """Those, but for copies of tied ones, which their first stage counts."""
        copies = {id(p) for n, p in self.module.named_parameters() if n in self.model.tied.copies}
        return [p for p in self._trained_parameters() if id(p) not in copies]

    def _random_state(self) -> AbstractContextManager[None]:
        return random_state(
            self.model.topology, seed=self.config.seed, step=self.global_steps, micro_step=self._micro_steps
        )

    # --- what it knows of itself (local) ---------------------------------------------------------------

    def train(self, mode: bool = True) -> None:
        """Set the module's mode for forward(); train_batch and eval_batch set their own."""
        self.module.train(mode)

    def eval(self) -> None:
        self.train(False)

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group, for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups] if self.optimizer else []

    def get_global_grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; None before the first."""
        return self._gradient_norm

    def train_batch_size(self) -> int:
        return self.triad.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.triad.micro_batch

    def gradient_accumulation_steps(self) -> int:
        return self.triad.accumulation

    def _check_no_stages(self, call: str) -> None:
        if self.model.topology.degrees.pp > 1:
            raise RuntimeError(
                f"{call}() needs the whole model on a rank, but pp is {self.model.topology.degrees.pp}; "
                "use train_batch() or eval_batch()"
            )

    def _check_between_steps(self, call: str) -> None:
        if self._pending:
            raise RuntimeError(f"{call}() comes after step(), not between micro batches of a step")

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"this engine can't be used any more: {self._unusable}; initialize a new one")
        self._checkpointer.check()

    # --- checkpoints -----------------------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Write a checkpoint that any topology can load.

        Returns when everything has been copied, and training can go on; it is written, made durable and
        committed in the background. The next save or load, `wait_for_checkpoint` and the end of the process
        wait for it. If it fails, the next call of the engine raises the error. With `"async_save": false`
        in the config's section `checkpoint`, it is committed on return.

        Args:
            save_dir: the run's folder, on a file system that all ranks see, or a URL that fsspec knows.
            tag: its name; `global_step<N>` by default.
            client_state: what the script wants to keep: dicts, lists, strings, numbers, booleans, None.
            save_latest: whether `latest` shall name it.

        Raises:
            ckpt.CheckpointError: the same on all ranks; there is no such checkpoint then, an older one of
                this tag is as it was, and training may go on. It may be the save before that failed.
        """
        self._check_usable()
        self._check_between_steps("save_checkpoint")
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        self._checkpointer.save(save_dir, name, client_state or {}, update_latest=save_latest)
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is committed, if it is still being written.

        Raises:
            ckpt.CheckpointError: it failed; the same on all ranks.
        """
        self._checkpointer.wait()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Take up a checkpoint, whatever topology wrote it. Returns its folder and its client_state.

        `tag` None is the one that `latest` names. With `load_module_strict`, everything that the model and
        the optimizer have must be there, and nothing else; without, the report in `last_load` says what
        was defaulted and dropped. With `load_module_only`, weights and buffers are loaded and nothing
        else. One line of what was done is printed on rank 0.

        Raises:
            ckpt.CheckpointError: nothing is there, or something doesn't fit; the same on all ranks, and the
                engine is as it was.
            ckpt.PartialLoadError: data is damaged; the same on all ranks, which refuse to go on from there.
        """
        self._check_usable()
        self._check_between_steps("load_checkpoint")
        try:
            report, checkpoint = self._checkpointer.load(
                load_dir,
                tag,
                strict=load_module_strict,
                optimizer_states=load_optimizer_states and not load_module_only,
                scheduler_states=load_lr_scheduler_states and not load_module_only,
                counters=not load_module_only,
            )
        except ckpt.PartialLoadError as error:
            self._unusable = f"a load failed half-way ({error})"
            raise
        self._own_iterator = None
        if self.training_dataloader is not None:
            self.training_dataloader.moved()
        self.last_load = report
        if self.model.topology.rank == 0:
            print(f"uni3d: loaded {checkpoint.url}: {report}", file=sys.stderr, flush=True)
        return checkpoint.url, checkpoint.manifest["client_state"]

    def resume(self, run: str | Path) -> dict[str, Any] | None:
        """Load the newest checkpoint of the folder `run`: its client_state, or None if there is none."""
        if self._checkpointer.latest(run) is None:
            return None
        return self.load_checkpoint(run)[1]
