"""Writing a checkpoint: plan, write, agree, commit.

Each rank writes the chunks that the plan gave it, straight from the memory they lie in; ragged and small
arrays are first gathered to their writers in a few flat exchanges. Then all ranks agree that everything
is on the disk, and rank 0 adds the metadata, the manifest last, and commits. Whatever fails, on whichever
rank and in whichever phase, every rank raises the same error, nothing is committed, and no rank waits.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ckpt import commit, files
from ckpt.box import Box
from ckpt.checksum import BLOCK_BYTES, block_checksums, combine, crc32c
from ckpt.comm import Comm, raise_together
from ckpt.errors import CheckpointError
from ckpt.format import (
    DTYPES,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    ZARR,
    Json,
    array_document,
    array_path,
    atom_path,
    check_json,
    check_tag,
    chunk_key,
    encode_document,
    encode_manifest,
    fill_value,
    group_document,
)
from ckpt.plan import ArrayKey, ArrayPlan, Chunk, Layout, ShardSpec, make_plan

GATHER_ROUND_BYTES = 64 << 20
"""About how much one flat exchange moves; it bounds the memory that gathering takes."""

Array = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of an array, with its data."""

    spec: ShardSpec
    data: Array
    """Of `spec.box.shape`, C-contiguous."""


@dataclass(frozen=True, slots=True)
class _Write:
    """One chunk to write."""

    key: ArrayKey
    plan: ArrayPlan
    chunk: Chunk
    data: Array
    """The part of the array inside `chunk.box`."""


Records = dict[str, dict[str, Json]]
"""`{array path: {chunk key: {"size", "crc32c", "blocks"}}}`."""


def save(
    run: str | Path,
    tag: str,
    shards: Sequence[Shard],
    *,
    layout: Layout,
    comm: Comm,
    document: Json,
    durable: bool = True,
    update_latest: bool = True,
) -> Path:
    """Collective: write and commit checkpoint `tag` of the folder `run`; returns its folder.

    `shards` are this rank's, in the order of `layout[comm.rank]`; `document` is what the manifest says
    beside the arrays (the same on all ranks). With `durable`, every file and folder is synced to the disk
    before the commit. Replacing a committed tag leaves it readable until the new one is committed.

    Raises:
        CheckpointError: the same on all ranks; the checkpoint does not exist then, and an older one of
            the same tag is untouched. The one exception says so: the checkpoint is committed, but
            `latest` could not be made to name it.
    """
    folder = commit.local_folder(run)
    staging = commit.staging_folder(folder, tag)
    job = _Job(folder, tag, staging, comm, durable)
    plans = job.together(lambda: _check_and_plan(tag, shards, layout, comm, document))
    job.together(lambda: commit.begin(folder, tag) if comm.rank == 0 else None)
    try:
        _check_shared(job)
        records = job.together(lambda: _write_all(job, _in_place_writes(plans, shards, comm.rank)))
        for batch in _rounds([plan for plan in plans if plan.sources]):
            pieces = job.together(lambda batch=batch: _outgoing(batch, shards, comm))  # type: ignore[misc]
            received = comm.exchange(*pieces)
            writes = _gathered_writes(batch, received, comm.rank)
            records |= job.together(lambda writes=writes: _write_all(job, writes))  # type: ignore[misc]
        if durable:
            job.together(lambda: files.sync_tree(staging))  # every rank: each machine has its own cache
        everything = comm.all_gather(records)
        job.together(
            lambda: _finish(job, plans, everything, document, update_latest) if comm.rank == 0 else None
        )
    except CheckpointError:
        if comm.rank == 0:
            commit.abandon(folder, tag)
        raise
    return folder / tag


@dataclass(frozen=True)
class _Job:
    run: Path
    tag: str
    staging: Path
    comm: Comm
    durable: bool

    def together(self, work: Callable[[], T]) -> T:
        """Do a phase of the save; if it fails on any rank, raise the same error on all."""
        error: BaseException | None = None
        result: T | None = None
        try:
            result = work()
        except BaseException as caught:  # interrupts too: the other ranks wait in the agreement below
            error = caught
        raise_together(self.comm, error)
        return result  # type: ignore[return-value]


def _check_shared(job: _Job) -> None:
    """Check that all ranks write into the same folder: with a folder of its own on each machine, a
    checkpoint would be committed without the other machines' chunks."""
    token = job.staging / f"token-{job.comm.all_gather(uuid.uuid4().hex)[0]}"
    job.together(lambda: token.touch() if job.comm.rank == 0 else None)

    def see() -> None:
        if not token.exists():
            raise CheckpointError(
                f"{job.run} is not the same folder as rank 0's; save to a shared file system"
            )

    job.together(see)
    job.together(lambda: token.unlink() if job.comm.rank == 0 else None)


def _check_and_plan(
    tag: str, shards: Sequence[Shard], layout: Layout, comm: Comm, document: Json
) -> list[ArrayPlan]:
    check_tag(tag)
    check_json(document, "the checkpoint's document")
    if [s.spec for s in shards] != list(layout[comm.rank]):
        raise CheckpointError("this rank's shards are not those that the layout announced for it")
    for shard in shards:
        if shard.spec.dtype not in DTYPES:
            raise CheckpointError(
                f"{'/'.join(shard.spec.key)} has dtype {shard.spec.dtype}, which can't be stored; "
                f"use one of {', '.join(sorted(DTYPES))}"
            )
        found = (shard.data.shape, shard.data.dtype)
        assert found == (shard.spec.box.shape, np.dtype(shard.spec.dtype)), f"{shard.spec} has data {found}"
    return make_plan(layout)


def _in_place_writes(plans: list[ArrayPlan], shards: Sequence[Shard], rank: int) -> Iterator[_Write]:
    held = {shard.spec.key: shard for shard in shards}
    for plan in plans:
        if plan.sources:
            continue
        for chunk in plan.chunks:
            if chunk.writer == rank:
                shard = held[plan.key]
                yield _Write(plan.key, plan, chunk, shard.data[chunk.box.relative_to(shard.spec.box).slices])


def _rounds(plans: Iterable[ArrayPlan]) -> Iterator[list[ArrayPlan]]:
    """The gathered arrays in batches of about `GATHER_ROUND_BYTES`."""
    batch: list[ArrayPlan] = []
    size = 0
    for plan in plans:
        batch.append(plan)
        size += math.prod(plan.shape) * np.dtype(plan.dtype).itemsize
        if size >= GATHER_ROUND_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _writer(plan: ArrayPlan) -> int:
    return plan.chunks[0].writer


def _outgoing(
    batch: list[ArrayPlan], shards: Sequence[Shard], comm: Comm
) -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
    """This rank's bytes for each writer, in the plan's order, and how many it gets from each rank."""
    held = {shard.spec.key: shard for shard in shards}
    parts: list[list[npt.NDArray[np.uint8]]] = [[] for _ in range(comm.size)]
    incoming = [0] * comm.size
    for plan in batch:
        for source, box in plan.sources:
            if source == comm.rank:
                parts[_writer(plan)].append(held[plan.key].data.reshape(-1).view(np.uint8))
            if _writer(plan) == comm.rank:
                incoming[source] += box.size * np.dtype(plan.dtype).itemsize
    return [np.concatenate(p) if p else np.empty(0, np.uint8) for p in parts], incoming


def _gathered_writes(
    batch: list[ArrayPlan], received: list[npt.NDArray[np.uint8]], rank: int
) -> Iterator[_Write]:
    """Put the pieces that arrived together, in the order in which the plan made their ranks send them."""
    cursor = [0] * len(received)
    for plan in batch:
        if _writer(plan) != rank:
            continue
        whole = np.empty(plan.shape, plan.dtype)
        for source, box in plan.sources:
            size = box.size * whole.itemsize
            piece = received[source][cursor[source] : cursor[source] + size]
            cursor[source] += size
            whole[box.slices] = piece.view(plan.dtype).reshape(box.shape)
        for chunk in plan.chunks:
            yield _Write(plan.key, plan, chunk, whole[chunk.box.slices])


def _write_all(job: _Job, writes: Iterable[_Write]) -> Records:
    """Write chunks with a few threads (system calls and checksums release the interpreter's lock)."""
    records: Records = {}
    todo = list(writes)
    for folder in dict.fromkeys(array_path(*w.key) for w in todo):
        (job.staging / folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for write, record in zip(todo, pool.map(lambda w: _write_chunk(job, w), todo), strict=True):
            records.setdefault(array_path(*write.key), {})[chunk_key(write.chunk.index)] = record
    return records


def _write_chunk(job: _Job, write: _Write) -> Json:
    """One file: the chunk's elements, C order, little endian, then their crc32c."""
    payload = write.data
    if payload.shape != write.plan.chunk_shape:  # at the array's end zarr stores whole chunks all the same
        payload = np.full(write.plan.chunk_shape, fill_value(write.plan.dtype), write.plan.dtype)
        payload[Box.whole(write.data.shape).slices] = write.data
    flat = np.ascontiguousarray(payload).reshape(-1).view(np.uint8)
    blocks = block_checksums(flat.data)
    checksum = combine(blocks, flat.nbytes)
    path = job.staging / array_path(*write.key) / chunk_key(write.chunk.index)
    files.write_file(path, [flat.data, checksum.to_bytes(4, "little")], durable=False)
    record: Json = {"size": flat.nbytes + 4, "crc32c": f"{checksum:08x}"}
    if len(blocks) > 1:
        record["blocks"] = [f"{b:08x}" for b in blocks]
    return record


def _finish(
    job: _Job, plans: list[ArrayPlan], everything: list[Records], document: Json, update_latest: bool
) -> None:
    """Rank 0: metadata documents, folders, manifest, commit; in this order, each durable before the next."""
    documents, members = _write_documents(job, plans)
    chunks: Records = {}
    for records in everything:
        for path, record in records.items():
            chunks.setdefault(path, {}).update(record)
    for plan in plans:
        written = len(chunks.get(array_path(*plan.key), {}))
        assert written == len(plan.chunks), f"{plan.key}: {written} chunks written of {len(plan.chunks)}"
    root = encode_document(group_document(members))
    files.write_file(job.staging / ZARR, [root], durable=False)
    documents[ZARR] = {"size": len(root), "crc32c": f"{crc32c(root):08x}"}
    if job.durable:
        files.sync_tree(job.staging)
    own = {"format", "version", "tag", "block_bytes", "documents", "chunks"}
    assert not own & document.keys(), f"the document has keys of the format's own: {own & document.keys()}"
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tag": job.tag,
        **document,
        "block_bytes": BLOCK_BYTES,
        "documents": documents,
        "chunks": chunks,
    }
    files.write_file(job.staging / MANIFEST, [encode_manifest(manifest)], durable=job.durable)
    if job.durable:
        files.sync_folder(job.staging)
    commit.commit(job.run, job.tag, durable=job.durable, update_latest=update_latest)


def _write_documents(job: _Job, plans: list[ArrayPlan]) -> tuple[dict[str, Json], dict[str, Json]]:
    """A `zarr.json` in each array's folder and in the groups above it; what was written, and its content."""
    members: dict[str, Json] = {}
    for plan in plans:
        members.setdefault("atoms", group_document())
        members.setdefault(atom_path(plan.key.atom), group_document())
        members[array_path(*plan.key)] = array_document(plan.dtype, plan.shape, plan.chunk_shape)
    records: dict[str, Json] = {}
    for path, content in members.items():
        data = encode_document(content)
        (job.staging / path).mkdir(parents=True, exist_ok=True)
        files.write_file(job.staging / path / ZARR, [data], durable=False)
        records[f"{path}/{ZARR}"] = {"size": len(data), "crc32c": f"{crc32c(data):08x}"}
    return records, members
