"""Saves of a run: `ckpt` writes the arrays, the manifest holds everything else."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ckpt
from ckpt.background import Background, join_all
from parallel import HostComm
from uni3d.argument_names import OF_ENGINE, ArgumentNames
from uni3d.checkpoint.background import Snapshot, threads_per_rank
from uni3d.checkpoint.copies import check_copies, digests_of
from uni3d.checkpoint.data_state import DataSaver
from uni3d.checkpoint.extra_state import (
    Digests,
    ExtraStates,
    check_alike,
    check_nothing_is_lost,
    extra_states,
)
from uni3d.checkpoint.flat_states import gather_flat
from uni3d.checkpoint.json_state import encoded
from uni3d.checkpoint.lost_ranks import told_in
from uni3d.checkpoint.optimizer_groups import describe
from uni3d.checkpoint.several import type_of
from uni3d.config.scheduler import describe_schedule
from uni3d.manifest import SAMPLE_ORDER, SCRIPT, EngineRecord, RunManifest, WriterRecord
from uni3d.state import FlatView, Held, Inventory, on_host, parts_to_save
from uni3d.train_state import RunState


class _Taken(NamedTuple):
    """All that a save writes, taken while training waits."""

    run: str | Path
    tag: str
    plan: ckpt.Plan
    parts: list[tuple[ckpt.ShardSpec, Tensor]]
    manifest: RunManifest


class Saver:
    """Saves a run. Calls are collective unless marked as local.

    Attributes:
        report: report of the last completed save, or None.
        asynchronous: whether `save` returns before the checkpoint is written.
    """

    def __init__(
        self,
        state: RunState,
        *,
        comm: HostComm,
        writing: HostComm,
        inventory: Inventory,
        model_spec: dict[str, Any],
        compare_copies: bool = False,
        arguments: ArgumentNames = OF_ENGINE,
    ) -> None:
        """Collective.

        Args:
            comm, writing: connections for the thread that trains, and for the one that writes meanwhile.
            model_spec: the model's own description for the manifest.
            compare_copies: compare the copies of a tensor on several ranks before each save.
            arguments: the caller's, for messages.

        Raises:
            ValueError: the scheduler's state can't be saved, or the ranks have training data of different
                lengths. Checked here, before any training is lost.
        """
        _check_data(comm, state, arguments)
        if state.lr_scheduler is not None:
            try:
                encoded(state.lr_scheduler.state_dict(), "its state")
            except ckpt.CheckpointError as error:
                kind = type_of(state.lr_scheduler)
                raise ValueError(f"{kind} can't be saved: {error}") from None
        self.report: ckpt.SaveReport | None = None
        self.asynchronous = state.settings.async_save
        self._state = state
        self._model_spec = model_spec
        comm.patience = writing.patience = state.settings.timeout_seconds
        self._comm = comm
        self._writing = writing
        self._compare_copies = compare_copies
        self._arguments = arguments
        self._inventory = inventory
        self._data = DataSaver(state.data, state.model.data_part, comm, arguments.data)
        self._held: list[Held] = []
        self._plan: ckpt.Plan | None = None
        self._wanted: dict[ckpt.ArrayKey, ckpt.Box] = {}
        self._snapshot = Snapshot(state.model.device)
        self._background: Background[ckpt.SaveReport] = Background(f"uni3d's last {arguments.save}")
        self._agreed_failure = False
        self._looked_for_others = False

    def save(
        self,
        run: str | Path,
        tag: str | int | None,
        client_state: dict[str, Any],
        *,
        update_latest: bool,
        frozen: bool = True,
    ) -> None:
        """Write a checkpoint, or start writing it with `async_save`; see `Engine.save_checkpoint`.

        With `frozen=False`, parameters that don't require a gradient are left out.
        """
        self.wait()
        join_all()  # another engine of this process may be saving into the same run
        step = self._state.progress.global_steps
        with told_in(self._comm, f"the save at step {step}, before it is written"):
            taken = self._take(run, tag, client_state, frozen)
        if self.asynchronous:
            self._background.start(lambda: self._write(taken, update_latest), run=taken.run)
        else:
            self.report = self._write(taken, update_latest)

    def _take(
        self, run: str | Path, tag: str | int | None, client_state: dict[str, Any], frozen: bool
    ) -> _Taken:
        """Return all that is to be written, once all ranks have it."""
        taken: list[_Taken] = []
        data, tensors = self._data.take()
        flat = gather_flat(self._state.model, self._state.optimizer, self._comm)

        def take() -> tuple[str, ckpt.Files, Digests]:
            where, name = self._place(run, tag)
            model, optimizer = self._state.model, self._state.optimizer
            extra, stage = extra_states(model, optimizer, self._state.objects), model.stage
            if not self._looked_for_others:  # once, as torch's own `state_dict` takes its time
                check_nothing_is_lost(model.module)
                self._looked_for_others = True
            files = self._state.settings.files
            chosen = ckpt.files_for(where) if files == "auto" else files
            arrays = extra.arrays(stage) | (tensors if stage == 0 else {})
            plan, parts = self._parts(arrays, flat, frozen, chosen)
            if self.asynchronous:  # training waits for this copy and nothing else
                copies = self._snapshot.take([tensor for _, tensor in parts])
                parts = [(spec, copy) for (spec, _), copy in zip(parts, copies, strict=True)]
            manifest = replace(self._manifest(client_state, extra, flat, frozen), data=data)
            taken.append(_Taken(where, name, plan, parts, manifest))
            digests = extra.digests(stage)
            if self._compare_copies:
                digests |= digests_of(manifest, stage)
            return name, chosen, tuple(sorted(digests.items()))

        # `take` may fail on one rank, for want of memory: all agree before any begins to write.
        found = ckpt.distinct(self._comm, take)
        ckpt.check_same_tag([name for name, _, _ in found])
        _check_same_place(
            {files: ranks.first for (_, files, _), ranks in reversed(found.items())}, self._arguments
        )
        check_alike({ranks.first: digests for (_, _, digests), ranks in found.items()})
        if self._compare_copies:
            check_copies(self._comm, self._held)
        return taken[0]

    def _place(self, run: Any, tag: Any) -> tuple[str | Path, str]:
        """Return the run's folder and the tag to save; on rank 0, check that the tag is this run's. Local."""
        where = ckpt.check_run(run)
        name = f"global_step{self._state.progress.global_steps}" if tag is None else ckpt.tag_text(tag)
        if "://" in str(where):
            return where, name  # checked by the write, as every request takes its time there
        where = Path(where).absolute()  # the script may change directory before the write
        if self._comm.rank == 0:
            ckpt.check_owner(where, name, self._state.progress.run_id)
        return where, name

    def wait(self) -> None:
        """Wait for the background save, if there is one, and raise its error if it failed."""
        self._agreed_failure = False
        report = self._background.wait()
        if report is not None:
            self.report = report

    def committed(self) -> str | None:
        """Return the tag of the last successful save, waited for or not. Local."""
        report = self._background.result or self.report
        return None if report is None else report.tag

    @property
    def failed(self) -> bool:
        """True if the background save has failed on this rank. Local."""
        return self._background.failed

    def agree(self, failed: bool) -> None:
        """Note that the save failed on some rank. All ranks note it in the same step. Local."""
        self._agreed_failure |= failed

    def check(self) -> None:
        """Raise the background save's error, once all ranks know that it failed."""
        if self._agreed_failure:
            self.wait()
            raise ckpt.CheckpointError("the background save failed on another rank; save again")

    def forget_plan(self) -> None:
        """Release the tensors of the last save, which a load may replace. Local."""
        self._held, self._plan = [], None

    def _parts(
        self, extra: dict[ckpt.ArrayKey, Tensor], flat: FlatView, frozen: bool, files: ckpt.Files
    ) -> tuple[ckpt.Plan, list[tuple[ckpt.ShardSpec, Tensor]]]:
        """Return the plan and this rank's parts by it; plan again only if the arrays have changed. Local."""
        held = self._inventory.arrays(self._state.optimizer, frozen=frozen, extra=extra, flat=flat)
        same = len(held) == len(self._held) and all(a is b for a, b in zip(held, self._held, strict=True))
        if self._plan is None or not same or self._plan.files != files:
            self._plan = self._inventory.plan(held, files)
            self._wanted = self._plan.parts(self._comm.rank)
            self._held = held
        return self._plan, parts_to_save(held, self._wanted)

    def _write(self, taken: _Taken, update_latest: bool) -> ckpt.SaveReport:
        """Write the checkpoint, in either thread. Torch's process groups may be destroyed by then."""
        with told_in(self._writing, f"the save of {taken.tag}"):
            return self._written(taken, update_latest)

    def _written(self, taken: _Taken, update_latest: bool) -> ckpt.SaveReport:
        settings, (run, tag, plan, parts, manifest) = self._state.settings, taken
        # Before the gather, so that a value that JSON can't hold is refused in all ranks' name.
        ckpt.agreed(self._writing, lambda: ckpt.check_json(manifest.document(), "the checkpoint's document"))
        gathered = self._writing.gather(manifest if self._state.model.speaks_for_stage else None)
        stages = [part for part in gathered if part is not None]  # rank 0 has all, and writes the manifest
        whole = ckpt.agreed(self._writing, lambda: stages[0].merged(stages[1:]) if stages else manifest)
        shards = ckpt.agreed(self._writing, lambda: [on_host(*part) for part in parts])
        return ckpt.save(
            run,
            tag,
            shards,
            plan=plan,
            comm=self._writing,
            document=whole.document(),
            files={SCRIPT.name: SCRIPT.read_bytes()},
            durable=settings.durable,
            update_latest=update_latest,
            retention=ckpt.Retention(keep_last=settings.keep_last, keep_every=settings.keep_every),
            threads=threads_per_rank(self._comm.size),
        )

    def _manifest(
        self, client_state: dict[str, Any], extra: ExtraStates, flat: FlatView, frozen: bool
    ) -> RunManifest:
        """Return the manifest of this rank's stage. Local.

        Values that training may change before the write are copied.
        """
        model, scheduler, progress = self._state.model, self._state.lr_scheduler, self._state.progress
        scaler, ranks = self._state.scaler, model.ranks
        model_record, optimizer = describe(
            model, self._state.optimizer, self._model_spec, extra, frozen=frozen, flat=flat.states
        )
        # Checked here so that the script's own call raises; everything else is checked by the write.
        ckpt.check_json(client_state, "the checkpoint's document['client_state']")
        return RunManifest(
            step=progress.global_steps,
            run_id=progress.run_id,
            writer=WriterRecord(
                torch=str(torch.__version__),
                topology={"pp": ranks.pp, "dp": ranks.dp, "tp": ranks.tp},
                zero_stage=ranks.zero,
                shard_group=model.shard_group,
                layers=model.layers,
            ),
            model=model_record,
            optimizer=optimizer,
            aliases=dict(model.ties),
            scheduler=None if scheduler is None else encoded(scheduler.state_dict(), "the scheduler's state"),
            schedule=None if scheduler is None else describe_schedule(self._state.schedule),
            engine=EngineRecord(
                global_steps=progress.global_steps,
                global_samples=progress.global_samples if progress.train_batch else None,
                skipped_steps=progress.skipped_steps,
                loss_scale=None if scaler is None else scaler.state_dict(),
                seed=self._state.seed,
                train_batch_size=progress.train_batch or None,
                dataset_length=progress.dataset_length,
                epoch_length=None
                if progress.epoch_length == progress.dataset_length
                else progress.epoch_length,
                sample_order=None if self._state.seed is None else SAMPLE_ORDER,
            ),
            client_state=copy.deepcopy(client_state),
        )


def _check_same_place(files: Mapping[ckpt.Files, int], arguments: ArgumentNames) -> None:
    """Check that all ranks chose the same kind of files for the run's folder; raises CheckpointError.

    `files` has the first rank of each choice.
    """
    if len(files) > 1:
        other = max(files.values())
        raise ckpt.CheckpointError(
            f"the run's folder is on another kind of file system on rank {other} than on rank 0; mount it "
            f'alike, or {arguments.setting.format("files")} to "array" or "writer"'
        )


def _check_data(comm: HostComm, state: RunState, arguments: ArgumentNames) -> None:
    """Check that all ranks have training data of one length: each draws its part of one order. Collective.

    Raises:
        ValueError: the lengths differ, or a rank can't use its loader; the same on all ranks.
    """
    data, length = state.data, state.progress.dataset_length
    kept = {True: "that resumes", False: "that begins anew"}
    kind, problem = ("dataset", None) if data is None else (f"{data.kind} {kept[data.resumes]}", data.problem)
    found = ckpt.distinct(comm, lambda: (length, kind, problem))
    for (_, _, wrong), ranks in found.items():
        if wrong is not None:
            raise ValueError(f"{wrong} (rank {ranks.first})")
    ((first, first_kind, _), _), *others = found.items()
    for (other, other_kind, _), ranks in others:
        if other != first:
            raise ValueError(
                f"{arguments.data} has {first} samples on rank 0, but {other} on rank {ranks.first}; pass "
                "the whole dataset on every rank: the engine gives each its part"
            )
        if other_kind != first_kind:
            raise ValueError(
                f"{arguments.data} is a {first_kind} on rank 0, but a {other_kind} on rank {ranks.first}"
            )
