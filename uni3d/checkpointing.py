"""What an engine saves and loads: shards through `ckpt`, everything else in the manifest."""

from __future__ import annotations

import copy
import os
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ckpt
import uni3d
from ckpt.threads import cores
from parallel import HostComm
from uni3d import state
from uni3d.background import Background
from uni3d.description import check_optimizer, describe, merge, restore_optimizer
from uni3d.snapshot import Snapshot

if TYPE_CHECKING:
    from uni3d.engine import Engine


class Checkpointer:
    """Saves and loads one engine. Every call is collective, but for `failed`."""

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
        self._inventory = state.Inventory(engine.model)
        self._held: list[state.Held] = []
        self._plan: ckpt.Plan | None = None
        self._wanted: dict[ckpt.ArrayKey, ckpt.Box] = {}
        self._snapshot = Snapshot(engine.model.topology.device)
        self._background: Background[ckpt.SaveReport] = Background("uni3d's last save_checkpoint")
        self._agreed_failure = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", self._comm.size))
        self._threads = max(1, cores() // local_ranks)

    # --- saving ----------------------------------------------------------------------------------------

    def save(
        self,
        run: str | Path,
        tag: str,
        client_state: dict[str, Any],
        *,
        update_latest: bool,
        frozen: bool = True,
    ) -> None:
        """Write checkpoint `tag`, or with `async_save` begin to; see `Engine.save_checkpoint`.

        Without `frozen`, parameters that don't require a gradient are left out.
        """
        self.wait()
        Background.join_all()  # at most one save may be going on in a run's folder
        asynchronous = self._engine.config.checkpoint.async_save
        if "://" not in str(run):
            run = Path(run).absolute()  # the script may change its folder meanwhile
        taken: list[tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]], dict[str, Any]]] = []

        def take() -> str:
            ckpt.check_tag(tag)
            plan, parts = self._parts(frozen)
            if asynchronous:  # the one thing that training waits for
                copies = self._snapshot.take([tensor for _, tensor in parts])
                parts = [(spec, copy) for (spec, _), copy in zip(parts, copies, strict=True)]
            taken.append((plan, parts, self._document(client_state, frozen)))
            return tag

        tags = set(ckpt.gathered(self._comm, take))
        if len(tags) > 1:
            raise ckpt.CheckpointError(
                f"the ranks were asked to save different tags: {', '.join(sorted(tags))}; use one"
            )
        if asynchronous:
            self._background.start(lambda: self._write(run, tag, *taken[0], update_latest))
        else:
            self._engine.last_save = self._write(run, tag, *taken[0], update_latest)

    def wait(self) -> None:
        """Wait for the save that goes on in the background, if any; raises what it raised."""
        self._agreed_failure = False
        report = self._background.wait()
        if report is not None:
            self._engine.last_save = report

    @property
    def failed(self) -> bool:
        """Whether the save in the background has failed, as far as this rank knows. Local."""
        return self._background.failed

    def agree(self, failed: bool) -> None:
        """All ranks have learnt that the save failed on some; so the next `check` raises on all."""
        self._agreed_failure |= failed

    def check(self) -> None:
        """Raise what the save in the background raised, if all ranks know that it failed."""
        if self._agreed_failure:
            self.wait()
            raise ckpt.CheckpointError("the save in the background failed on another rank; save again")

    def _parts(self, frozen: bool) -> tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]]]:
        """The plan, made anew only if what is saved has changed, and this rank's parts by it. Local."""
        held = self._inventory.arrays(self._engine.optimizer, frozen=frozen)
        same = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held, strict=True))
        if self._plan is None or not same:
            self._plan = ckpt.make_plan(self._inventory.layout(held))
            self._wanted = self._plan.parts(self._comm.rank)
            self._held = held
        return self._plan, state.parts_to_save(held, self._wanted)

    def _write(
        self,
        run: str | Path,
        tag: str,
        plan: ckpt.Plan,
        parts: list[tuple[ckpt.ShardSpec, Tensor]],
        document: dict[str, Any],
        update_latest: bool,
    ) -> ckpt.SaveReport:
        """The save itself, in whichever thread. Torch's process groups may be gone by then."""
        settings = self._engine.config.checkpoint
        ckpt.together(self._comm, lambda: ckpt.check_json(document, "the checkpoint's document"))
        described = self._comm.gather(document if self._inventory.speaks else None)
        stages = [part for part in described if part is not None]  # on rank 0, whose word counts
        whole = ckpt.together(self._comm, lambda: merge(stages) if stages else {})
        shards = ckpt.together(self._comm, lambda: [state.on_host(*part) for part in parts])
        return ckpt.save(
            run,
            tag,
            shards,
            plan=plan,
            comm=self._comm,
            document=whole,
            durable=settings.durable,
            update_latest=update_latest,
            retention=ckpt.Retention(keep_last=settings.keep_last, keep_every=settings.keep_every),
            threads=self._threads,
        )

    def _document(self, client_state: dict[str, Any], frozen: bool) -> dict[str, Any]:
        """Everything in the manifest but the arrays, as this rank's stage has it. Local."""
        engine = self._engine
        degrees, scheduler = engine.model.topology.degrees, engine.lr_scheduler
        ckpt.check_json(client_state, "the checkpoint's document['client_state']")
        return {
            "step": engine.global_steps,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "writer": {
                "uni3d": uni3d.__version__,
                "torch": str(torch.__version__),
                "topology": {"pp": degrees.pp, "dp": degrees.dp, "tp": degrees.tp},
                "zero_stage": engine.model.zero.stage,
            },
            **describe(engine.model, engine.optimizer, frozen=frozen),
            "aliases": engine.model.ties,
            "scheduler": None if scheduler is None else copy.deepcopy(scheduler.state_dict()),
            "engine": {
                "global_steps": engine.global_steps,
                "global_samples": engine.global_samples,
                "skipped_steps": engine.skipped_steps,
                "loss_scale": None if engine.scaler is None else engine.scaler.state_dict(),
                **self._what_fixes_the_order(),
            },
            "client_state": copy.deepcopy(client_state),
        }

    # --- loading ---------------------------------------------------------------------------------------

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
        self.wait()
        Background.join_all()  # another engine of this process may be writing what this one looks for
        engine = self._engine
        checkpoint = self._open(run, tag)
        manifest = checkpoint.manifest
        optimizer = engine.optimizer if optimizer_states else None
        scheduler = engine.lr_scheduler if scheduler_states else None
        ckpt.together(self._comm, lambda: self._check_fits(manifest, optimizer, scheduler))
        report = self._load_arrays(checkpoint, optimizer, strict=strict)
        try:
            differences = ckpt.together(
                self._comm, lambda: self._restore_rest(manifest, optimizer, scheduler)
            )
        except ckpt.CheckpointError as error:  # the arrays have been loaded
            raise ckpt.PartialLoadError(str(error)) from error
        if counters:
            engine.global_steps = manifest["engine"]["global_steps"]
            engine.global_samples = manifest["engine"]["global_samples"]
            engine.skipped_steps = manifest["engine"].get("skipped_steps", 0)
            differences += self._restore_loss_scale(manifest["engine"].get("loss_scale"))
            order = self._what_fixes_the_order()
            differences += _differences("the run's", manifest["engine"], order)
        if differences and self._comm.rank == 0:
            warnings.warn(f"{checkpoint.url}: {'; '.join(differences)}", stacklevel=3)
        return report, checkpoint

    def _restore_rest(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> list[str]:
        """Restore what isn't an array; returns a line for each value that this run was given another of."""
        differences = []
        if optimizer is not None:
            differences += restore_optimizer(self._engine.model, optimizer, manifest["optimizer"])
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
        scaler = self._engine.scaler
        if scaler is not None and saved is not None:
            scaler.load_state_dict(saved)
        elif saved is not None:
            return [f"its loss scale ({saved['scale']:g}) was not taken up: this run isn't in fp16"]
        elif scaler is not None:
            return [f"it has no loss scale, as it isn't of fp16: it begins at {scaler.scale:g}"]
        return []

    def _what_fixes_the_order(self) -> dict[str, int]:
        """What the order of samples depends on."""
        engine = self._engine
        return {"seed": engine.config.seed, "train_batch_size": engine.triad.train_batch}

    def _check_fits(
        self, manifest: dict[str, Any], optimizer: Optimizer | None, scheduler: LRScheduler | None
    ) -> None:
        """Check what isn't an array, before anything changes."""
        if optimizer is not None:
            check_optimizer(self._engine.model, optimizer, manifest["optimizer"])
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
            if optimizer is not None and stored:  # on all ranks or none; whether it is fresh may differ
                ckpt.together(self._comm, lambda: state.create_states(model, optimizer) if fresh else None)
            held, targets = ckpt.together(self._comm, lambda: self._targets(optimizer, stored))
            report = ckpt.load(
                checkpoint, targets, comm=self._comm, strict=strict, leave=leave, threads=self._threads
            )
        except ckpt.CheckpointError:
            if optimizer is not None and fresh:
                optimizer.state.clear()
            raise
        state.finish_load(held, targets)
        self._held, self._plan = [], None  # don't keep alive what a load may replace
        if optimizer is not None:
            state.forget_states(model, optimizer, but=stored)
        return report

    def _targets(
        self, optimizer: Optimizer | None, stored: set[str]
    ) -> tuple[list[state.Held], list[ckpt.Shard]]:
        held = self._inventory.arrays(optimizer, with_states=stored)
        return held, [state.on_host(array.spec, array.tensor.contiguous()) for array in held]

    def latest(self, run: str | Path) -> str | None:
        """The newest committed tag, the same on all ranks whatever their file systems show them yet."""
        self.wait()
        Background.join_all()
        return ckpt.from_first(self._comm, lambda: ckpt.read_latest(run))

    def _open(self, run: str | Path, tag: str | None) -> ckpt.Checkpoint:
        def find() -> str:
            store, folder = ckpt.find_checkpoint(run, tag)
            return store.where(folder)

        chosen = ckpt.from_first(self._comm, find)
        return ckpt.together(self._comm, lambda: ckpt.open_checkpoint(chosen))


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
