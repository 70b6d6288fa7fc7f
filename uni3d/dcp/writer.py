"""DCP's storage writer on universal checkpoints.

DCP's planner decides which rank writes which part of which tensor; `ckpt` writes the parts and commits, once
all ranks have agreed. Ranks talk over connections of their own, which only meet at the process group's store:
a save in a thread disturbs no collective of the script.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import ckpt
from ckpt import CheckpointError
from ckpt.background import join_all
from parallel import HostComm
from uni3d.checkpoint.background import threads_per_rank
from uni3d.dcp.arrays import SavedArray, own_shards, saved_arrays
from uni3d.dcp.form import StateDictForm, flat_name, shared_kinds
from uni3d.dcp.live import LiveStateDict, OwnPart, own_part
from uni3d.importers.dcp import counted_steps, is_number, source_of
from uni3d.importers.dcp.names import SortedNames, sort_names
from uni3d.importers.source import Options
from uni3d.importers.write import manifest_of
from uni3d.manifest import SCRIPT, RunManifest

OWNER = "a script by uni3d.dcp"
"""Stands for the run's identifier, which DCP's saves lack: they replace no checkpoint of an engine's run."""
UNKNOWN = "unknown"
"""Class of an optimizer whose state doesn't show it."""


class _Seat(NamedTuple):
    """A rank's place in one save."""

    token: str
    rank: int
    size: int


class _Job(NamedTuple):
    """All that the ranks have to know before they write."""

    run: str | Path
    tag: str
    files: ckpt.Files
    arrays: list[SavedArray]
    document: dict[str, Any]
    """The manifest's, on rank 0 alone."""


class StorageWriter(storage.StorageWriter):
    """Storage writer for `torch.distributed.checkpoint.save` and `async_save`.

    A save is all or nothing on all ranks: if it fails, the error is raised everywhere, and what was there
    before stays. A committed tag stays readable until its replacement is committed.

    Attributes:
        report: report of the last save, or None.
    """

    def __init__(
        self,
        run: str | Path | None = None,
        tag: str | int | None = None,
        *,
        step: int | None = None,
        optimizer: str | None = None,
        buffers: Sequence[str] = (),
        durable: bool = True,
    ) -> None:
        """Save into the run at `run`, a folder or any fsspec URL.

        Args:
            run: may be left out if the save has a `checkpoint_id`, the path of `<run>/<tag>`.
            tag: name of the checkpoint; `global_step<step>` by default.
            step: number of steps taken. By default it is the script's counter in the state_dict (`step`,
                `global_step`, also in `train_state`), or else the optimizer's.
            optimizer: name of the optimizer's class, which a state_dict shows for Adam and AdamW only. An
                engine that resumes from the checkpoint compares it with its own.
            buffers: name patterns of buffers of floating point, which a state_dict doesn't tell from frozen
                parameters.
            durable: sync every file and folder to the disk before the commit.

        Raises:
            ValueError: the step isn't a number of steps.
        """
        if step is not None and not (type(step) is int and step >= 0):
            raise ValueError(f"step is {step!r}; expected the number of steps taken, an int of 0 or more")
        self._run, self._tag = run, tag
        self._step, self._optimizer, self._buffers = step, optimizer, tuple(buffers)
        self._durable = durable
        self._local: list[WriteItem] = []
        self._plans: list[SavePlan] = []
        self.report: ckpt.SaveReport | None = None

    # --- DCP's interface, in the order of its calls ------------------------------------------------------

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return whether `checkpoint_id` can be the path of a checkpoint."""
        return bool(Path(checkpoint_id).name)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save; `checkpoint_id` is the path of `<run>/<tag>`."""
        if checkpoint_id is not None:
            self._run, self._tag = split_id(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        """Return the description of the storage, for the planner."""
        return StorageMeta(checkpoint_id=None if self._run is None else str(self._run))

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take up the role of one rank."""
        if not kwargs.get("use_collectives", True):
            raise CheckpointError(
                "use_collectives=False isn't supported by uni3d.dcp, as ranks commit one checkpoint together"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Note what this rank has."""
        if not plan.usable:
            raise CheckpointError("uni3d.dcp doesn't support the planner's enable_plan_caching=True")
        self._local = plan.items
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Note what each rank writes; on the coordinator."""
        self._plans, token = plans, uuid.uuid4().hex
        return [replace(plan, storage_data=_Seat(token, rank, len(plans))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part and commit the checkpoint. Collective.

        Raises:
            CheckpointError: the same on all ranks; the checkpoint doesn't exist.
        """
        seat: _Seat = plan.storage_data
        many = seat.size > 1
        comm = HostComm.meeting(f"uni3d/dcp/{seat.token}", seat.rank, seat.size) if many else None
        try:
            self.report = self._save(plan, planner, comm or ckpt.Solo())
        finally:
            self._local, self._plans = [], []
            if comm is not None:
                comm.leave()
        sizes = [(item.index, item.tensor_storage_size() or 0) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(index, size, None) for index, size in sizes])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete DCP's own description, which isn't stored: the checkpoint is committed already."""
        metadata.storage_meta = self.storage_meta()

    # --- the save ----------------------------------------------------------------------------------------

    def _save(self, plan: SavePlan, planner: SavePlanner, comm: ckpt.Comm) -> ckpt.SaveReport:
        given = ckpt.distinct(comm, lambda: (str(self._run), str(self._tag), self._step))
        if len(given) > 1:
            (first, _), (other, ranks) = [*given.items()][:2]
            raise CheckpointError(
                f"StorageWriter has (run, tag, step) {first} on rank 0, but {other} on rank {ranks.first}; "
                "give all ranks the same"
            )
        own = ckpt.agreed(comm, lambda: own_part(plan, self._local, planner))
        owns = comm.gather(own)
        mine: list[_Job] = []

        def describe() -> _Job:
            join_all()  # an engine of this process may be saving into the same run
            mine.append(self._described(owns))
            return mine[0]._replace(document={})

        job = ckpt.from_rank_0(comm, describe)

        def planned() -> ckpt.Plan:
            layouts = [array.layout for array in job.arrays]
            return ckpt.plan_arrays(layouts, range(comm.size), files=job.files)

        ours = ckpt.agreed(comm, planned)
        wanted = ours.parts(comm.rank)
        shards = ckpt.agreed(comm, lambda: own_shards(job.arrays, plan, planner, wanted))
        return ckpt.save(
            job.run,
            job.tag,
            shards,
            plan=ours,
            comm=comm,
            document=mine[0].document if mine else {},
            files={SCRIPT.name: SCRIPT.read_bytes()},
            durable=self._durable,
            threads=threads_per_rank(comm.size),
        )

    def _described(self, owns: list[OwnPart]) -> _Job:
        """Return the whole checkpoint's description; on rank 0.

        Raises:
            CheckpointError: the state_dict's names have no meaning, or an entry can't be saved.
        """
        live = LiveStateDict(self._plans, owns)
        names = sort_names(live)
        apart = [key for key in names.beside if _is_array(live, key)]
        values = replace(names, beside=[key for key in names.beside if not _is_array(live, key)])
        source = source_of(live, values, Options(buffers=self._buffers))
        step = self._step if self._step is not None else counted_steps(source.client_state, source.optimizer)
        run, tag = self._place(step)
        ckpt.check_owner(run, tag, OWNER)
        writer = {"torch": str(torch.__version__), "world_size": len(owns)}
        manifest: RunManifest = replace(
            manifest_of(replace(source, step=step or 0, writer=writer), self._optimizer_of(source.optimizer)),
            dcp=_form(live, names).document(),
        )
        document = manifest.document()
        ckpt.check_json(document, "the checkpoint's document")
        arrays = saved_arrays(live, source.arrays, apart)
        return _Job(run, tag, ckpt.files_for(run), arrays, document)

    def _optimizer_of(self, state: Any) -> str:
        return self._optimizer or (None if state is None else state.type) or UNKNOWN

    def _place(self, step: int | None) -> tuple[str | Path, str]:
        if self._run is None:
            raise CheckpointError("StorageWriter has no run; give it one, or give the save a checkpoint_id")
        run = ckpt.check_run(self._run)
        if "://" not in str(run):
            run = Path(run).absolute()  # ranks may have other current folders
        if self._tag is not None:
            return run, ckpt.tag_text(self._tag)
        if step is None:
            raise CheckpointError(
                "StorageWriter has neither a tag nor a step, and the state_dict counts no steps; give one"
            )
        return run, f"global_step{step}"


def _is_array(live: LiveStateDict, key: str) -> bool:
    return key in live.sizes or (key in live.tensors and not is_number(live.tensors[key].shape))


def _form(live: LiveStateDict, names: SortedNames) -> StateDictForm:
    groups = [path for path in names.states.values() if flat_name(path).startswith("param_groups.")]
    numbers = [key for key in names.states if key not in live.tensors or not live.tensors[key].shape]
    of_optimizer = {key: live.kinds.get(key, {}) for key in numbers}
    beside = {key: live.kinds[key] for key in names.beside if live.kinds.get(key)}
    beside |= {key: {"": "bytes"} for key in names.beside if key in live.sizes}
    return StateDictForm(
        model=names.model,
        optimizer=names.optimizer,
        flat=bool(groups) and not any(isinstance(path[1], int) for path in groups if len(path) > 1),
        beside=[live.steps[key] for key in names.beside],
        kinds=beside | shared_kinds(of_optimizer),
    )


def split_id(checkpoint_id: str | os.PathLike[str]) -> tuple[str, str]:
    """Split the path of a checkpoint into its run and its tag.

    Raises:
        CheckpointError: it has no two parts.
    """
    run, _, tag = os.fspath(checkpoint_id).rstrip("/").rpartition("/")
    if not tag:
        raise CheckpointError(f"checkpoint_id is {checkpoint_id!r}; expected the path of <run>/<tag>")
    return run or ("/" if os.fspath(checkpoint_id).startswith("/") else "."), tag
