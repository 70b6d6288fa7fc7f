"""From a checkpoint to an engine: what fits is agreed by all ranks, then everything is filled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
from parallel import HostComm
from parallel.whole import whole_module
from uni3d import state
from uni3d.checkpoint.optimizer_groups import given_optimizer, restore_optimizer
from uni3d.manifest import EngineRecord, RunManifest
from uni3d.recovery import StoredWeights
from uni3d.resume_rules import Given, GivenScheduler, compare

if TYPE_CHECKING:
    from uni3d.engine.engine import Engine

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

    def __init__(self, engine: Engine, comm: HostComm, inventory: state.Inventory, threads: int) -> None:
        self._engine = engine
        self._comm = comm
        self._inventory = inventory
        self._threads = threads

    def load(self, checkpoint: ckpt.Checkpoint, wanted: Wanted) -> ckpt.LoadReport:
        """Fill the engine.

        Raises:
            ckpt.CheckpointError: something doesn't fit; the engine is as it was.
            ckpt.PartialLoadError: it failed half-way.
        """
        engine = self._engine
        optimizer = engine.optimizer if wanted.optimizer else None
        scheduler = engine.lr_scheduler if wanted.scheduler else None
        saved = ckpt.together(self._comm, lambda: RunManifest.of(checkpoint))
        # Before anything changes, and by all ranks or none.
        changes = ckpt.together(
            self._comm, lambda: self._check_fits(saved, optimizer, scheduler, counters=wanted.counters)
        )
        report = self._load_arrays(checkpoint, saved, optimizer, wanted)
        try:
            if wanted.custom is not None:
                self._load_model(checkpoint, wanted.custom)
            ckpt.together(self._comm, lambda: self._restore_rest(saved, optimizer, scheduler))
        except ckpt.CheckpointError as error:  # the arrays have been loaded
            raise ckpt.PartialLoadError(str(error)) from error
        if wanted.counters:
            self._restore_counters(saved.engine)
        if changes and self._comm.rank == 0:
            warnings.warn(f"{checkpoint.url}: {'; '.join(changes)}", stacklevel=4)
        return report

    def _load_model(self, checkpoint: ckpt.Checkpoint, load: CustomLoad) -> None:
        """Let the script fill whole parameters; each rank keeps its part of them."""
        with whole_module(self._engine.module) as module:
            src = StoredWeights(checkpoint)
            ckpt.together(self._comm, lambda: load(src=src, dst=module))  # type: ignore[call-arg]

    def _restore_rest(
        self, saved: RunManifest, optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> None:
        """Restore the optimizer's hyperparameters and scalars, and the scheduler."""
        if optimizer is not None and saved.optimizer is not None:
            restore_optimizer(self._engine.model, optimizer, saved.optimizer)
        if scheduler is not None and saved.scheduler is not None:
            scheduler.load_state_dict(saved.scheduler)
            if optimizer is None:  # its groups, which hold the rate of the next step, were left as they are
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = lr

    def _restore_counters(self, saved: EngineRecord) -> None:
        """Take up the counters and, if both runs are in fp16, the loss scale."""
        engine = self._engine
        assert saved.global_steps is not None, "compared before"
        assert saved.global_samples is not None, "compared before"
        engine.global_steps = saved.global_steps
        engine.global_samples = saved.global_samples
        engine.skipped_steps = saved.skipped_steps
        if engine.scaler is not None and saved.loss_scale is not None:
            engine.scaler.load_state_dict(saved.loss_scale)

    def _check_fits(
        self,
        saved: RunManifest,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | None,
        *,
        counters: bool,
    ) -> list[str]:
        """Compare everything but the arrays; return the changes to be reported.

        Raises:
            ckpt.CheckpointError: with every reason why the checkpoint can't be loaded.
        """
        engine = self._engine
        given = Given(
            whose="this run",
            optimizer=None
            if optimizer is None
            else given_optimizer(engine.model, optimizer, saved.optimizer),
            scheduler=None if scheduler is None else _given(scheduler),
            counters=counters,
            order={"seed": engine.config.seed, "train_batch_size": engine.triad.train_batch},
            loss_scale=None if engine.scaler is None else engine.scaler.scale,
            precision=engine.config.precision,
        )
        refusals, changes = compare(saved, given)
        if refusals:
            raise ckpt.CheckpointError("; ".join(refusals))
        return changes

    def _load_arrays(
        self,
        checkpoint: ckpt.Checkpoint,
        saved: RunManifest,
        optimizer: Optimizer | None,
        wanted: Wanted,
    ) -> ckpt.LoadReport:
        def leave(key: ckpt.ArrayKey) -> str | None:
            if not _is_moment(key):
                return None if wanted.custom is None else "custom_load_fn loads the model"
            return "optimizer states were not asked for" if optimizer is None else None

        model = self._engine.model
        fresh = optimizer is not None and not optimizer.state
        stored = {key.atom for key in checkpoint.arrays if _is_moment(key)}  # parameters that have states
        if optimizer is not None and saved.optimizer is not None:
            stored |= saved.optimizer.scalars.keys()
        try:
            if optimizer is not None and stored:  # on all ranks or none; whether it is fresh may differ
                ckpt.together(self._comm, lambda: state.create_states(model, optimizer) if fresh else None)
            model_too = wanted.custom is None
            held, targets = ckpt.together(self._comm, lambda: self._targets(optimizer, stored, model_too))
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


def _is_moment(key: ckpt.ArrayKey) -> bool:
    return key.state not in (state.PARAMETER, state.BUFFER)


def _given(scheduler: LRScheduler) -> GivenScheduler:
    """Describe a scheduler, to be compared with the saved one."""
    moving = {"last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step"}
    state = scheduler.state_dict()
    return GivenScheduler(
        type=type(scheduler).__name__,
        keys=state.keys(),
        state={key: value for key, value in state.items() if key not in moving},
    )
