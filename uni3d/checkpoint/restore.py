"""From a checkpoint to an engine: what fits is agreed by all ranks, then everything is filled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
from parallel import HostComm
from parallel.tensors import whole_module
from uni3d import state
from uni3d.checkpoint.background import Background
from uni3d.checkpoint.optimizer_groups import check_optimizer, restore_optimizer
from uni3d.recovery import StoredWeights
from uni3d.state import Inventory
from uni3d.train_state import Progress, TrainState

CustomLoad = Callable[[Mapping[str, Tensor], nn.Module], Any]
"""A script's own way of loading the model's weights, called with the keywords `src` and `dst`."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What of a checkpoint is to be loaded."""

    strict: bool = True
    """Whether what the engine has and what the checkpoint has must be the same."""
    optimizer: bool = True
    scheduler: bool = True
    counters: bool = True
    """Steps, samples, the loss scale."""
    custom: CustomLoad | None = None
    """Loads parameters and buffers in our stead."""


class Restorer:
    """Loads checkpoints into one engine. Every call is collective."""

    def __init__(
        self, state: TrainState, *, seed: int, comm: HostComm, inventory: Inventory, threads: int
    ) -> None:
        self._state = state
        self._seed = seed
        self._comm = comm
        self._inventory = inventory
        self._threads = threads

    def load(
        self, run: str | Path, tag: str | None, wanted: Wanted
    ) -> tuple[ckpt.LoadReport, ckpt.Checkpoint]:
        """Fill the model, the optimizer, the schedule and the counters; see `Engine.load_checkpoint`.

        Raises:
            ckpt.CheckpointError: something doesn't fit; nothing has changed.
            ckpt.PartialLoadError: it failed half-way.
        """
        Background.join_all()  # another engine of this process may be writing what this one looks for
        checkpoint = self._open(run, tag)
        return self._fill(checkpoint, wanted), checkpoint

    def latest(self, run: str | Path) -> str | None:
        """Return the newest committed tag, the same on all ranks whatever their file systems show yet."""
        Background.join_all()
        return ckpt.from_rank_0(self._comm, lambda: ckpt.read_latest(run))

    def _open(self, run: str | Path, tag: str | None) -> ckpt.Checkpoint:
        def find() -> str:
            store, folder = ckpt.find_checkpoint(run, tag)
            return store.where(folder)

        chosen = ckpt.from_rank_0(self._comm, find)
        return ckpt.agreed(self._comm, lambda: ckpt.open_checkpoint(chosen))

    def _fill(self, checkpoint: ckpt.Checkpoint, wanted: Wanted) -> ckpt.LoadReport:
        manifest, progress = checkpoint.manifest, self._state.progress
        optimizer = self._state.optimizer if wanted.optimizer else None
        scheduler = self._state.lr_scheduler if wanted.scheduler else None
        ckpt.agreed(self._comm, lambda: self._check_fits(manifest, optimizer, scheduler))
        report = self._load_arrays(checkpoint, optimizer, wanted)
        try:
            if wanted.custom is not None:
                self._load_model(checkpoint, wanted.custom)
            differences = ckpt.agreed(self._comm, lambda: self._restore_rest(manifest, optimizer, scheduler))
        except ckpt.CheckpointError as error:  # the arrays have been loaded
            raise ckpt.PartialLoadError(str(error)) from error
        if wanted.counters:
            progress.global_steps = manifest["engine"]["global_steps"]
            progress.global_samples = manifest["engine"]["global_samples"]
            progress.skipped_steps = manifest["engine"].get("skipped_steps", 0)
            differences += self._restore_loss_scale(manifest["engine"].get("loss_scale"))
            differences += _other_order(self._seed, progress, manifest["engine"])
        if differences and self._comm.rank == 0:
            warnings.warn(f"{checkpoint.url}: {'; '.join(differences)}", stacklevel=4)
        return report

    def _load_model(self, checkpoint: ckpt.Checkpoint, load: CustomLoad) -> None:
        """Let the script fill whole parameters; each rank keeps its part of them."""
        with whole_module(self._state.model.module) as module:
            src = StoredWeights(checkpoint)
            ckpt.agreed(self._comm, lambda: load(src=src, dst=module))  # type: ignore[call-arg]

    def _restore_rest(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> list[str]:
        """Restore what isn't an array; returns a line for each value that this run was given another of."""
        differences = []
        if optimizer is not None:
            differences += restore_optimizer(self._state.model, optimizer, manifest["optimizer"])
        if scheduler is None and manifest["scheduler"] is not None and optimizer is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in optimizer.param_groups)
            differences.append(f"its schedule was not taken up: the learning rate stays at {rates}")
        if scheduler is not None:
            differences += _differences("the schedule's", manifest["scheduler"], _given(scheduler))
            scheduler.load_state_dict(manifest["scheduler"])
            if optimizer is None:  # its groups, which hold the rate of the next step, were left as they are
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = lr
        return differences

    def _restore_loss_scale(self, saved: dict[str, Any] | None) -> list[str]:
        """Take up fp16's loss scale; returns a line if only one of the two runs has one."""
        scaler = self._state.scaler
        if scaler is not None and saved is not None:
            scaler.load_state_dict(saved)
        elif saved is not None:
            return [f"its loss scale ({saved['scale']:g}) was not taken up: this run isn't in fp16"]
        elif scaler is not None:
            return [f"it has no loss scale, as it isn't of fp16: it begins at {scaler.scale:g}"]
        return []

    def _check_fits(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> None:
        """Check what isn't an array, before anything changes."""
        if optimizer is not None:
            check_optimizer(self._state.model, optimizer, manifest["optimizer"])
        saved = manifest["scheduler"]
        if scheduler is not None and (saved is None or saved.keys() != scheduler.state_dict().keys()):
            has = "no scheduler" if saved is None else f"another scheduler than {type(scheduler).__name__}"
            raise ckpt.CheckpointError(
                f"the checkpoint has {has}; load it with load_lr_scheduler_states=False"
            )

    def _load_arrays(
        self, checkpoint: ckpt.Checkpoint, optimizer: Optimizer | None, wanted: Wanted
    ) -> ckpt.LoadReport:
        def leave(key: ckpt.ArrayKey) -> str | None:
            if not _is_moment(key):
                return None if wanted.custom is None else "custom_load_fn loads the model"
            return "optimizer states were not asked for" if optimizer is None else None

        model = self._state.model
        fresh = optimizer is not None and not optimizer.state
        stored = {key.atom for key in checkpoint.arrays if _is_moment(key)}  # parameters that have states
        if optimizer is not None:
            stored |= checkpoint.manifest["optimizer"]["scalars"].keys()
        try:
            if optimizer is not None and stored:  # on all ranks or none; whether it is fresh may differ
                ckpt.agreed(self._comm, lambda: state.create_states(model, optimizer) if fresh else None)
            model_too = wanted.custom is None
            held, targets = ckpt.agreed(self._comm, lambda: self._targets(optimizer, stored, model_too))
            report = ckpt.load(
                checkpoint,
                targets,
                comm=self._comm,
                strict=wanted.strict,
                leave=leave,
                threads=self._threads,
            )
        except ckpt.CheckpointError:
            if optimizer is not None and fresh:
                optimizer.state.clear()
            raise
        state.finish_load(held, targets)
        if optimizer is not None:
            state.forget_states(model, optimizer, but=stored)
        return report

    def _targets(
        self, optimizer: Optimizer | None, stored: set[str], model_too: bool
    ) -> tuple[list[state.Held], list[ckpt.Shard]]:
        held = self._inventory.arrays(optimizer, with_states=stored)
        held = [array for array in held if model_too or _is_moment(array.spec.key)]
        return held, [state.on_host(array.spec, array.tensor.contiguous()) for array in held]


def what_fixes_the_order(seed: int, progress: Progress) -> dict[str, int]:
    """Return the numbers on which the order of samples depends."""
    return {"seed": seed, "train_batch_size": progress.train_batch}


def _other_order(seed: int, progress: Progress, saved: dict[str, Any]) -> list[str]:
    """A line for each thing by which samples come in another order than in the run that was saved."""
    given = what_fixes_the_order(seed, progress)
    lines = _differences("the run's", saved, {key: n for key, n in given.items() if key in saved})
    if "seed" not in saved:  # another framework's, imported
        lines.append(
            f"it doesn't say in which order its samples came: this run's own goes on at sample "
            f"{progress.global_samples}"
        )
    return lines


def _is_moment(key: ckpt.ArrayKey) -> bool:
    return key.state not in (state.PARAMETER, state.BUFFER)


def _given(scheduler: LRScheduler) -> dict[str, Any]:
    """What a schedule was made with, but for what moves with its steps."""
    moving = {"last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"}
    return {key: value for key, value in scheduler.state_dict().items() if key not in moving}


def _differences(whose: str, saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """A line for each value that was given to this run and is another in the checkpoint."""
    return [
        f"{whose} {key} is {value!r} here, and {saved.get(key)!r} in the checkpoint"
        for key, value in given.items()
        if value != saved.get(key)
    ]
