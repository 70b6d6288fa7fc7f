"""Writing a checkpoint: agree, write, agree, commit.

Each rank writes the chunks that the plan gave it, straight from the memory they lie in. Ragged and small
arrays are first gathered to their writers in a few flat exchanges. Then all ranks agree that everything is on
the disk, and rank 0 adds the metadata, the manifest last, and commits. If anything fails, on whichever rank
and in whichever phase, every rank raises the same error, nothing is committed, and no rank is left waiting.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType

from ckpt import gather
from ckpt.comm import Comm, agreed, agreed_by_all, from_rank_0
from ckpt.errors import CheckpointError
from ckpt.format import (
    DTYPES,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    ZARR,
    Json,
    check_json,
    check_same_tag,
    encode_document,
    encode_manifest,
    group_document,
    numpy_dtype,
    object_record,
)
from ckpt.plan import Plan
from ckpt.shards import ArrayKey, Shard, UnreadShard
from ckpt.stores import Store, open_store
from ckpt.tags import KEEP_ALL, Retention, prune, read_latest
from ckpt.threads import cores
from ckpt.write import Write, Writer, Written

NO_FILES: Mapping[str, bytes] = MappingProxyType({})

Held = Mapping[ArrayKey, Shard | UnreadShard]


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """Summary of a save, over all ranks."""

    tag: str
    url: str
    """Folder or URL of the checkpoint."""
    bytes_written: int
    """Bytes of the chunks that were written."""
    bytes_linked: int
    """Bytes of the chunks that were linked to those of the latest checkpoint instead of being written."""
    pruned: tuple[str, ...] = ()
    """Tags of checkpoints that the retention deleted."""


def save(
    run: str | Path,
    tag: str,
    shards: Sequence[Shard | UnreadShard],
    *,
    plan: Plan,
    comm: Comm,
    document: Json,
    files: Mapping[str, bytes] = NO_FILES,
    durable: bool = True,
    update_latest: bool = True,
    incremental: bool = True,
    retention: Retention = KEEP_ALL,
    threads: int | None = None,
) -> SaveReport:
    """Write and commit checkpoint `tag` of the run at `run`, a folder or any fsspec URL. Collective.

    Args:
        shards: at least the parts in `plan.parts(comm.rank)`.
        document: the manifest's content besides the arrays; rank 0's is written.
        files: name -> content of further files in the checkpoint's folder; rank 0's are written.
        durable: sync every file and folder to the disk before the commit.
        incremental: hard-link chunks that are byte for byte those of the latest checkpoint, if the store can.
        retention: checkpoints to keep; the others are deleted after the commit, if `latest` is updated.

    A committed tag stays readable until its replacement is committed. Stores that can't replace it in one
    step (all but file systems) refuse to.

    Raises:
        CheckpointError: the same on all ranks. The checkpoint then doesn't exist, and an older one of the
            same tag is untouched; or the message says that it is committed, but that `latest` could not be
            updated or older checkpoints could not be deleted.
    """
    held = {shard.spec.key: shard for shard in shards}
    rounds = list(gather.rounds(plan))
    checks = agreed_by_all(comm, lambda: (tag, *_check(held, plan, comm.rank, document), len(rounds)))
    check_same_tag([check[0] for check in checks])
    _check_same_plans([check[1:3] for check in checks])
    if retention.keep_last is not None and not durable:
        raise CheckpointError(
            "a save that isn't durable can't delete older checkpoints; save with durable=True"
        )
    store = agreed(comm, lambda: open_store(run))
    workers, own = store.threads or threads or cores(), uuid.uuid4().hex
    try:
        token, base = from_rank_0(comm, lambda: _begin(store, tag, own, incremental))
        writer = agreed(comm, lambda: _writer(store, tag, token, base, durable, workers))
        written = agreed(comm, lambda: _write_own(writer, plan, held, comm.rank))
        written.add(_write_gathered(rounds, max(check[3] for check in checks), writer, held, comm))
        if durable:
            agreed(comm, lambda: store.sync(tag))  # on every rank, as each machine has its own page cache
        everything = comm.gather(written)
        finish = partial(_finish, store, tag, token, everything, document, files)
        return from_rank_0(comm, lambda: finish(durable, update_latest, retention))
    except CheckpointError:
        if comm.rank == 0:
            store.abandon(tag, own)
        raise


def _check(held: Held, plan: Plan, rank: int, document: Json) -> tuple[tuple[int, ...], str]:
    """Check this rank's arguments; return the plan's ranks and digest, to be compared with the others'."""
    check_json(document, "the checkpoint's document")
    for array in plan.arrays:
        if array.dtype not in DTYPES:
            raise CheckpointError(
                f"{'/'.join(array.key)} has dtype {array.dtype}, which can't be stored; "
                f"use one of {', '.join(sorted(DTYPES))}"
            )
    for key, box in plan.parts(rank).items():
        shard = held.get(key)
        if shard is None or not box.within(shard.spec.box):
            raise CheckpointError(
                f"the plan expects {list(box.offset)}+{list(box.shape)} of {'/'.join(key)} from this rank, "
                "which doesn't hold it"
            )
        found = (shard.data.shape, shard.data.dtype)
        assert found == (shard.spec.box.shape, numpy_dtype(shard.spec.dtype)), f"{shard.spec} has {found}"
    return plan.ranks, plan.digest


def _check_same_plans(plans: list[tuple[tuple[int, ...], str]]) -> None:
    """Check that ranks that share arrays have the same plan for them, given each rank's `(ranks, digest)`."""
    for rank, (peers, digest) in enumerate(plans):
        for peer in peers:
            if plans[peer] != (peers, digest):
                raise CheckpointError(
                    f"ranks {rank} and {peer} have different plans for the arrays that they share; "
                    "their models or optimizers differ"
                )


def _begin(store: Store, tag: str, token: str, incremental: bool) -> tuple[str, str | None]:
    """Prepare the store, on rank 0; return the save's token and the tag whose chunks may be linked to."""
    base = None
    if incremental:
        with contextlib.suppress(CheckpointError):  # `latest` is damaged: write everything
            base = read_latest(store)
    store.begin(tag, token)
    return token, base


def _writer(store: Store, tag: str, token: str, base: str | None, durable: bool, threads: int) -> Writer:
    """Make this rank's writer, after checking that it sees the folder that rank 0 made.

    If each machine had a folder of its own, a checkpoint would be committed without the others' chunks.
    """
    if not store.begun(tag, token):
        raise CheckpointError(
            f"{store.where('')} is not the same folder as rank 0's; save to a shared file system"
        )
    return Writer(store, tag, durable=durable, base=base, threads=threads)


def _write_own(writer: Writer, plan: Plan, held: Held, rank: int) -> Written:
    """Write the chunks that this rank holds whole, and the metadata of the arrays that it owns."""
    written = writer.write_chunks(_in_place(plan, held, rank))
    written.add(writer.write_documents(plan, rank))
    return written


def _in_place(plan: Plan, held: Held, rank: int) -> Iterator[Write]:
    for array in plan.arrays:
        if array.sources:
            continue
        for chunk in array.chunks:
            if chunk.writer == rank:
                shard = held[array.key]
                part = chunk.box.relative_to(shard.spec.box).slices
                if isinstance(shard, Shard):
                    yield Write(array, chunk, shard.data[part])
                else:
                    yield Write(array, chunk, partial(shard.data.__getitem__, part))


def _write_gathered(
    rounds: list[list[gather.Gathering]], most: int, writer: Writer, held: Held, comm: Comm
) -> Written:
    """Gather chunks to their writers and write them. Collective.

    Plans may differ between pipeline stages, but an exchange is collective: every rank takes part in `most`
    rounds, as many as any plan has.
    """
    written = Written()
    for i in range(most):
        batch = rounds[i] if i < len(rounds) else []
        pieces = agreed(comm, lambda batch=batch: gather.outgoing(batch, held, comm))  # type: ignore[misc]
        received = comm.exchange(*pieces)
        writes = gather.arrived(batch, received, comm.rank)
        written.add(agreed(comm, lambda writes=writes: writer.write_chunks(writes)))  # type: ignore[misc]
    return written


def _finish(
    store: Store,
    tag: str,
    token: str,
    everything: list[Written],
    document: Json,
    files: Mapping[str, bytes],
    durable: bool,
    update_latest: bool,
    retention: Retention,
) -> SaveReport:
    """Write the consolidated metadata and the manifest, commit, and delete old checkpoints. Rank 0 only."""
    whole = Written()
    for written in everything:
        whole.add(written)
    _check_complete(everything, whole.documents)
    root = encode_document(group_document(dict(sorted(whole.documents.items()))))
    records = {
        f"{path}/{ZARR}": object_record(encode_document(d)) for path, d in sorted(whole.documents.items())
    }
    own = {"format", "version", "tag", "documents", "files", "chunks"}
    assert not own & document.keys(), f"the document has keys of the format's own: {own & document.keys()}"
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tag": tag,
        **document,
        "documents": {**records, ZARR: object_record(root)},
        "chunks": dict(sorted(whole.chunks.items())),
    }
    if files:
        manifest["files"] = {name: object_record(content) for name, content in files.items()}
    last = {**files, ZARR: root, MANIFEST: encode_manifest(manifest)}
    store.commit(tag, token, last, durable=durable, update_latest=update_latest)
    pruned: list[str] = []
    if update_latest and retention.keep_last is not None:
        try:
            pruned = prune(store, retention)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"{store.where(tag)} is committed, but: {error}") from error
    sizes = {"bytes_written": whole.bytes_written, "bytes_linked": whole.bytes_linked}
    return SaveReport(tag=tag, url=store.where(tag), pruned=tuple(pruned), **sizes)


def _check_complete(everything: list[Written], documents: dict[str, Json]) -> None:
    """Check that every chunk of every array was written exactly once.

    Each plan proves this for its own arrays; this is the last check before the commit, over all plans.
    """
    chunks: Counter[str] = Counter()
    for written in everything:
        chunks.update({path: len(records) for path, records in written.chunks.items()})
    for path, document in documents.items():
        if document["node_type"] == "array":
            grid = zip(document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"], strict=True)
            expected, found = prod(-(-n // c) for n, c in grid), chunks[path]
            assert found == expected, f"{path}: {found} chunks written of {expected}"
    assert chunks.keys() <= documents.keys(), "every array has its metadata"
