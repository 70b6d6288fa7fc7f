"""What an engine saves and loads: shards through `ckpt`, everything else in the manifest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
import uni3d
from parallel import HostComm
from uni3d import state

if TYPE_CHECKING:
    from uni3d.engine import Engine

T = TypeVar("T")


class Checkpointer:
    """Saves and loads one engine. Every call is collective."""

    def __init__(self, engine: Engine) -> None:
        """Collective.

        Raises:
            ValueError: the engine has a scheduler whose state can't be saved; better now than at a save.
        """
        self._engine = engine
        if engine.lr_scheduler is not None:
            try:
                ckpt.check_json(engine.lr_scheduler.state_dict(), "its state")
            except ckpt.CheckpointError as error:
                kind = type(engine.lr_scheduler).__name__
                raise ValueError(f"{kind} can't be saved: {error}") from None
        self._comm = HostComm()
        self._specs: list[ckpt.ShardSpec] | None = None
        self._layout: list[list[ckpt.ShardSpec]] = []

    def save(self, run: str | Path, tag: str, client_state: dict[str, Any], *, update_latest: bool) -> Path:
        """Write checkpoint `tag`; see `Engine.save_checkpoint`."""
        engine = self._engine
        tag = self._same_everywhere(tag)
        held = self._together(lambda: state.held_arrays(engine.model, engine.optimizer))
        shards = [array.shard for array in held if array.saves]
        self._exchange_layout([shard.spec for shard in shards])
        document = self._document(client_state)
        return ckpt.save(
            run,
            tag,
            shards,
            layout=self._layout,
            comm=self._comm,
            document=document,
            update_latest=update_latest,
        )

    def load(
        self,
        run: str | Path,
        tag: str | None,
        *,
        strict: bool,
        optimizer_states: bool,
        scheduler_states: bool,
        counters: bool,
    ) -> tuple[ckpt.LoadReport, ckpt.Checkpoint]:
        """Fill the engine from a checkpoint; see `Engine.load_checkpoint`."""
        engine = self._engine
        checkpoint = self._open(run, tag)
        manifest = checkpoint.manifest
        optimizer = engine.optimizer if optimizer_states else None
        scheduler = engine.lr_scheduler if scheduler_states else None
        self._together(lambda: self._check_fits(manifest, optimizer, scheduler))
        report = self._load_arrays(checkpoint, optimizer, strict=strict)
        try:
            differences = self._together(lambda: self._restore_rest(manifest, optimizer, scheduler))
        except ckpt.CheckpointError as error:  # the arrays have been loaded
            raise ckpt.PartialLoadError(str(error)) from error
        if counters:
            engine.global_steps = manifest["engine"]["global_steps"]
            engine.global_samples = manifest["engine"]["global_samples"]
            order = self._what_fixes_the_order()
            differences += _differences("the run's", manifest["engine"], order)
        if differences and self._comm.rank == 0:
            warnings.warn(f"{checkpoint.folder}: {'; '.join(differences)}", stacklevel=3)
        return report, checkpoint

    def _restore_rest(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> list[str]:
        """Restore what isn't an array; returns a line for each value that this run was given another of."""
        differences = []
        if optimizer is not None:
            differences += state.restore_optimizer(self._engine.model, optimizer, manifest["optimizer"])
        if scheduler is not None:
            differences += _differences("the schedule's", manifest["scheduler"], _given(scheduler))
            scheduler.load_state_dict(manifest["scheduler"])
            if optimizer is None:  # its groups, which hold the rate of the next step, were left as they are
                for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = lr
        return differences

    def _what_fixes_the_order(self) -> dict[str, int]:
        """What the order of samples depends on."""
        engine = self._engine
        return {"seed": engine.config.seed, "train_batch_size": engine.triad.train_batch}

    def _check_fits(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> None:
        """Check what isn't an array, before anything changes."""
        if optimizer is not None:
            state.check_optimizer(self._engine.model, optimizer, manifest["optimizer"])
        saved = manifest["scheduler"]
        if scheduler is not None and (saved is None or saved.keys() != scheduler.state_dict().keys()):
            has = "no scheduler" if saved is None else f"another scheduler than {type(scheduler).__name__}"
            raise ckpt.CheckpointError(
                f"the checkpoint has {has}; load it with load_lr_scheduler_states=False"
            )

    def _load_arrays(
        self, checkpoint: ckpt.Checkpoint, optimizer: Optimizer | None, *, strict: bool
    ) -> ckpt.LoadReport:
        def leave(key: ckpt.ArrayKey) -> str | None:
            return "optimizer states were not asked for" if is_moment(key) and optimizer is None else None

        def is_moment(key: ckpt.ArrayKey) -> bool:
            return key.state not in (state.PARAMETER, state.BUFFER)

        model = self._engine.model
        fresh = optimizer is not None and not optimizer.state
        stored = {key.atom for key in checkpoint.arrays if is_moment(key)}  # parameters that have states
        if optimizer is not None:
            stored |= checkpoint.manifest["optimizer"]["scalars"].keys()
        try:
            if optimizer is not None and fresh and stored:
                self._together(lambda: state.create_states(model, optimizer))
            held = self._together(lambda: state.held_arrays(model, optimizer, with_states=stored))
            targets = [array.shard for array in held]
            report = ckpt.load(checkpoint, targets, comm=self._comm, strict=strict, leave=leave)
        except ckpt.CheckpointError:
            if optimizer is not None and fresh:
                optimizer.state.clear()
            raise
        state.finish_load(held)
        if optimizer is not None:
            state.forget_states(model, optimizer, but=stored)
        return report

    def latest(self, run: str | Path) -> str | None:
        """The newest committed tag, the same on all ranks whatever their file systems show them yet."""
        return self._from_first_rank(lambda: ckpt.read_latest(run))

    def _open(self, run: str | Path, tag: str | None) -> ckpt.Checkpoint:
        chosen = self._from_first_rank(lambda: ckpt.open_checkpoint(run, tag).folder)
        return self._together(lambda: ckpt.open_checkpoint(chosen))

    def _document(self, client_state: dict[str, Any]) -> dict[str, Any]:
        """Everything in the manifest but the arrays; the same on all ranks."""
        engine = self._engine
        topology = engine.model.topology
        speaks = topology.dp_rank == 0 and topology.tp_rank == 0  # one rank of each stage
        parts = self._gathered(lambda: state.describe(engine.model, engine.optimizer) if speaks else None)
        whole = self._together(lambda: state.merge([part for part in parts if part is not None]))
        scheduler = engine.lr_scheduler
        degrees = topology.degrees
        return {
            "step": engine.global_steps,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "writer": {
                "uni3d": uni3d.__version__,
                "torch": str(torch.__version__),
                "topology": {"pp": degrees.pp, "dp": degrees.dp, "tp": degrees.tp},
                "zero_stage": engine.model.zero.stage,
            },
            **whole,
            "aliases": engine.model.ties,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "engine": {
                "global_steps": engine.global_steps,
                "global_samples": engine.global_samples,
                **self._what_fixes_the_order(),
            },
            "client_state": client_state,
        }

    def _exchange_layout(self, specs: list[ckpt.ShardSpec]) -> None:
        """Learn what every rank holds; once, unless what some rank holds has changed."""
        if any(self._comm.all_gather(specs != self._specs)):
            self._layout = self._comm.all_gather(specs)
            self._specs = specs

    def _same_everywhere(self, tag: str) -> str:
        tags = self._comm.all_gather(tag)
        if len(set(tags)) > 1:
            raise ckpt.CheckpointError(
                f"the ranks were asked to save different tags: {', '.join(sorted(set(tags)))}; use one"
            )
        return tag

    def _together(self, work: Callable[[], T]) -> T:
        """Do `work`; if it fails on any rank, raise the same error on all."""
        error: Exception | None = None
        result: T | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        ckpt.raise_together(self._comm, error)
        return result  # type: ignore[return-value]

    def _gathered(self, work: Callable[[], T]) -> list[T]:
        return self._comm.all_gather(self._together(work))

    def _from_first_rank(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, the only rank that does it."""
        return self._gathered(lambda: work() if self._comm.rank == 0 else None)[0]  # type: ignore[return-value]


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
