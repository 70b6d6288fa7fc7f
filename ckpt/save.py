"""Writing a checkpoint: agree, write, agree, commit.

Each rank writes the chunks that the plan gave it, straight from the memory they lie in; ragged and small
arrays are first gathered to their writers in a few flat exchanges. Then all ranks agree that everything
is on the disk, and rank 0 adds the metadata, the manifest last, and commits. Whatever fails, on whichever
rank and in whichever phase, every rank raises the same error, nothing is committed, and no rank waits.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
    check_tag,
    encode_document,
    encode_manifest,
    group_document,
    numpy_dtype,
    object_record,
)
from ckpt.plan import Plan
from ckpt.shards import Shard, UnreadShard
from ckpt.stores import Store, open_store
from ckpt.tags import KEEP_ALL, Retention, prune, read_latest
from ckpt.threads import cores
from ckpt.write import Write, Writer, Written

NO_FILES: Mapping[str, bytes] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save did, over all ranks."""

    tag: str
    url: str
    """Of the checkpoint."""
    bytes_written: int
    """In chunks."""
    bytes_linked: int
    """In chunks that were the same in the checkpoint before, and so were not written again."""
    pruned: tuple[str, ...] = ()
    """Tags that were deleted, as the retention asked."""


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
    """Collective: write and commit checkpoint `tag` of the run at `run`, a folder or any URL of fsspec.

    `shards` hold at least `plan.parts(comm.rank)`; `document` is what the manifest says beside the arrays,
    `files` the contents of what else shall lie there, by name (rank 0's count of both). With `durable`, every
    file and folder is synced to the disk before the commit. With `incremental`, chunks that are byte for byte
    those of the checkpoint that `latest` names are linked to these, where the store can. Replacing a
    committed tag leaves it readable until the new one is committed; where that can't be (any store but a
    file system), it is refused. Then the checkpoints that `retention` doesn't keep are deleted, if `latest`
    is updated.

    Raises:
        CheckpointError: the same on all ranks; the checkpoint does not exist then, and an older one of
            the same tag is untouched. The one exception says so: the checkpoint is committed, but
            `latest` could not be made to name it, or older ones could not be deleted.
    """
    held = {shard.spec.key: shard for shard in shards}
    rounds = list(gather.rounds(plan))
    if retention.keep_last is not None and not durable:
        raise CheckpointError(  # on all ranks, which are given the same
            "a save that isn't durable can't delete older checkpoints: a power cut could leave none"
        )
    checks = agreed_by_all(comm, lambda: (*_check(tag, held, plan, comm.rank, document), len(rounds)))
    _check_agreed([check[0] for check in checks], [check[1] for check in checks])
    store = agreed(comm, lambda: open_store(run))
    workers = store.threads or threads or cores()
    own = uuid.uuid4().hex
    try:
        token, base = from_rank_0(comm, lambda: _begin(store, tag, own, incremental))
        writer = agreed(comm, lambda: _writer(store, tag, token, base, durable, workers))

        def write_in_place() -> Written:
            written = writer.write_chunks(_in_place(plan, held, comm.rank))
            written.add(writer.write_documents(plan, comm.rank))
            return written

        written = agreed(comm, write_in_place)
        written.add(_write_gathered(rounds, max(check[2] for check in checks), writer, held, comm))
        if durable:
            agreed(comm, lambda: store.sync(tag))  # every rank: each machine has its own cache
        everything = comm.gather(written)
        return from_rank_0(
            comm,
            lambda: _finish(
                store, tag, token, everything, document, files, durable, update_latest, retention
            ),
        )
    except CheckpointError:
        if comm.rank == 0:
            store.abandon(tag, own)
        raise


def _check(
    tag: str, held: dict[Any, Shard | UnreadShard], plan: Plan, rank: int, document: Json
) -> tuple[str, tuple[tuple[int, ...], str]]:
    """Check what this rank was given; returns what all ranks, or all of one plan, must have alike."""
    check_tag(tag)
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
                f"the plan wants {list(box.offset)}+{list(box.shape)} of {'/'.join(key)} from this rank, "
                "which doesn't hold it"
            )
        found = (shard.data.shape, shard.data.dtype)
        assert found == (shard.spec.box.shape, numpy_dtype(shard.spec.dtype)), f"{shard.spec} has {found}"
    return tag, (plan.ranks, plan.digest)


def _check_agreed(tags: list[str], plans: list[tuple[tuple[int, ...], str]]) -> None:
    """The same values on all ranks, so all raise or none."""
    if len(set(tags)) > 1:
        raise CheckpointError(
            f"the ranks were asked to save different tags: {', '.join(sorted(set(tags)))}; use one"
        )
    for rank, (peers, digest) in enumerate(plans):
        for peer in peers:
            if plans[peer] != (peers, digest):
                raise CheckpointError(
                    f"ranks {rank} and {peer} have different plans for the arrays that they share; "
                    "their models or optimizers differ"
                )


def _begin(store: Store, tag: str, token: str, incremental: bool) -> tuple[str, str | None]:
    """On rank 0: prepare the store; returns the token by which others know it, and the tag to link to."""
    base = None
    if incremental:
        try:
            base = read_latest(store)
        except CheckpointError:  # there is no telling which; all is written anew
            base = None
    store.begin(tag, token)
    return token, base


def _writer(store: Store, tag: str, token: str, base: str | None, durable: bool, threads: int) -> Writer:
    """Check that all ranks write into the same folder: with a folder of its own on each machine, a
    checkpoint would be committed without the other machines' chunks."""
    if not store.begun(tag, token):
        raise CheckpointError(
            f"{store.where('')} is not the same folder as rank 0's; save to a shared file system"
        )
    return Writer(store, tag, durable=durable, base=base, threads=threads)


def _in_place(plan: Plan, held: dict[Any, Shard | UnreadShard], rank: int) -> Iterator[Write]:
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
    rounds: list[list[gather.Gathering]],
    most: int,
    writer: Writer,
    held: dict[Any, Shard | UnreadShard],
    comm: Comm,
) -> Written:
    """Bring gathered chunks to their writers; all ranks take part in as many rounds as any plan has."""
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
    """Rank 0: the consolidated metadata, the manifest, the commit; then what retention asks."""
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
    return SaveReport(
        tag=tag,
        url=store.where(tag),
        bytes_written=whole.bytes_written,
        bytes_linked=whole.bytes_linked,
        pruned=tuple(pruned),
    )


def _check_complete(everything: list[Written], documents: dict[str, Json]) -> None:
    """Each plan proves it of itself; this is the last look before the commit, at all of them together."""
    chunks: Counter[str] = Counter()
    for written in everything:
        chunks.update({path: len(records) for path, records in written.chunks.items()})
    for path, document in documents.items():
        if document["node_type"] == "array":
            grid = zip(document["shape"], document["chunk_grid"]["configuration"]["chunk_shape"], strict=True)
            expected, found = prod(-(-n // c) for n, c in grid), chunks[path]
            assert found == expected, f"{path}: {found} chunks written of {expected}"
    assert chunks.keys() <= documents.keys(), "every array has its metadata"
