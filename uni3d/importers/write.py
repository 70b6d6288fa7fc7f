"""Conversion of a source to a checkpoint, one array at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

import ckpt
from ckpt import ArrayKey, Box, CheckpointError, ShardSpec, UnreadShard
from ckpt.format import WRITER
from ckpt.threads import cores
from uni3d.importers.source import BUFFER, PARAMETER, Array, ForeignArray, Read, Source
from uni3d.manifest import SCRIPT, EngineRecord, ModelRecord, OptimizerRecord, RunManifest, WriterRecord
from uni3d.resume_rules import UNKNOWN


def write(
    source: Source,
    run: str | Path,
    tag: str,
    *,
    optimizer: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> ckpt.SaveReport:
    """Write and commit `source` as the checkpoint `tag` of the run at `run`, and make it the latest.

    Each array is read whole when its first chunk is written, so a few of the largest arrays are in memory at
    a time. `optimizer` is the optimizer's class if the source doesn't record it. `progress` is called with
    the bytes written.

    Raises:
        CheckpointError: the source is damaged, or `run` can't take the checkpoint; nothing is committed.
    """
    if str(run).startswith("memory:"):
        raise CheckpointError(f"{run} would be lost when this process ends; import into a folder")
    target = ckpt.open_store(run)
    if set(target.names()) - {WRITER, *target.leftovers()} and not ckpt.committed_tags(target):
        raise CheckpointError(f"{target.where('')} isn't a run, but isn't empty; import into a new folder")
    if tag in ckpt.committed_tags(target):
        raise CheckpointError(f"{target.where(tag)} exists; delete it, or choose another tag with --as")
    threads = min(cores(), 8)  # each holds a whole array
    read = lru_cache(threads + 1)(read_whole)  # the chunks of an array are written one after the other
    shards = [
        UnreadShard(_spec(array), _Unread(array, partial(read, array), progress)) for array in source.arrays
    ]
    return ckpt.save(
        run,
        tag,
        shards,
        plan=plan_of(source, ckpt.files_for(run)),
        comm=ckpt.Solo(),
        document=manifest_of(source, optimizer).document(),
        files={SCRIPT.name: SCRIPT.read_bytes()},
        incremental=False,
        threads=threads,
    )


def plan_of(source: Source, files: ckpt.Files) -> ckpt.Plan:
    """Plan the chunks of an imported checkpoint."""
    return ckpt.make_plan({0: [_spec(array) for array in source.arrays]}, files=files)


def _spec(array: ForeignArray) -> ShardSpec:
    return ShardSpec(ArrayKey(*array.key), array.dtype, array.shape, Box.whole(array.shape))


def manifest_of(source: Source, optimizer: str | None) -> RunManifest:
    """Return the manifest of an imported checkpoint; `optimizer` is as for `write`."""
    state = source.optimizer
    parameters = [array.name for array in source.arrays if array.state == PARAMETER]
    return RunManifest(
        step=source.step,
        writer=WriterRecord(
            topology={"pp": 1, "dp": 1, "tp": 1},
            zero_stage=0,
            imported={"from": source.kind, **source.writer},
        ),
        model=ModelRecord(
            requires_grad={name: name not in source.frozen for name in parameters},
            buffers=[array.name for array in source.arrays if array.state == BUFFER],
            declared=source.declared,
        ),
        optimizer=None
        if state is None
        else OptimizerRecord(
            type=optimizer or state.type or UNKNOWN,
            groups=state.groups,
            scalars=state.scalars,
        ),
        aliases=source.aliases,
        scheduler=source.scheduler,
        engine=EngineRecord(
            global_steps=source.step,
            global_samples=source.samples,
            skipped_steps=source.skipped,
            loss_scale=source.loss_scale,
            train_batch_size=source.batch,
        ),
        client_state=source.client_state,
    )


class _Unread:
    """An array of the source that `ckpt` reads part by part, in the stored type."""

    def __init__(self, array: ForeignArray, read: Read, progress: Callable[[int], None]) -> None:
        self._read, self._progress = read, progress
        self._lock = threading.Lock()
        self.shape = array.shape
        self.dtype = ckpt.numpy_dtype(array.dtype)

    def __getitem__(self, part: tuple[slice, ...]) -> Array:
        with self._lock:  # threads that write other chunks of it wait for the one reading it
            values = self._read()[part or ...]
        self._progress(values.nbytes)
        return values


def read_whole(array: ForeignArray) -> Array:
    """Return an array's values in the stored type; raises as `converted`."""
    values = array.read()
    if values.shape != array.shape:
        raise CheckpointError(f"{array.origin} has shape {list(values.shape)}, expected {list(array.shape)}")
    return converted(array, values)


def converted(array: ForeignArray, values: Array) -> Array:
    """Return values of an array, or of a part of it, in the stored type.

    Raises:
        CheckpointError: one isn't exact in that type.
    """
    dtype = ckpt.numpy_dtype(array.dtype)
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        out = values.astype(dtype)
    if values.dtype.itemsize >= dtype.itemsize:  # narrower floats are always exact
        same = (out.astype(values.dtype) == values) | (np.isnan(values) & np.isnan(out))
        if not same.all():
            value = values[~same].flat[0]
            raise CheckpointError(
                f"{array.origin} is {values.dtype} and has {value!r}, which {array.dtype} can't represent; "
                f"round {array.name} to {array.dtype} before"
            )
    return out
