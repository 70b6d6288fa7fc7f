"""Commit of a save, on rank 0: collect the ranks' records, write the documents, the manifest last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt.array_files import FileGrid
from ckpt.begin import Begun, Wish
from ckpt.errors import CheckpointError
from ckpt.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    NAMED_LATEST,
    PART,
    ZARR,
    Json,
    encode_document,
    encode_manifest,
    object_record,
)
from ckpt.order import note_commit
from ckpt.parts import ArrayInfo, Sums, consolidated, encode_part
from ckpt.plan import Plan
from ckpt.shards import ArrayKey
from ckpt.stores import Store
from ckpt.stores.writer_lock import say_once
from ckpt.tags import Retention, check_owner, delete_old
from ckpt.write import Writer


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


class Planned(NamedTuple):
    """Array of a plan, as the plan's first rank describes it to rank 0."""

    key: ArrayKey
    dtype: str
    grid: FileGrid
    writers: npt.NDArray[np.int32]
    """Writer of each chunk, in C order."""


class Record(NamedTuple):
    """Record of a rank's part of a save, for rank 0."""

    sums: Sums
    """Checksums of its chunks, in the plan's order."""
    bytes_written: int
    bytes_linked: int
    arrays: list[Planned] | None
    """All arrays of the plan, from its first rank."""


def record(writer: Writer, plan: Plan, rank: int) -> Record:
    """Return the record of what this rank has written."""
    written = writer.written
    first = rank == plan.ranks[0]
    arrays = [Planned(a.key, a.dtype, a.grid, a.chunk_plan.writers) for a in plan.arrays] if first else None
    return Record(written.in_order(plan, rank), written.bytes_written, written.bytes_linked, arrays)


def commit(
    store: Store,
    asked: Wish,
    begun: Begun,
    everything: list[Record],
    document: Json,
    files: Mapping[str, bytes],
    retention: Retention,
) -> SaveReport:
    """Write the consolidated metadata and the manifest, commit, and delete old checkpoints. Rank 0 only."""
    tag, groups = asked.tag, described(everything)
    parts = {PART.format(i): encode_part(group) for i, group in enumerate(groups)}
    files = {**files, ZARR: encode_document(consolidated(groups))}
    own = {"format", "version", "tag", "commit", "durable", "parts", "files"}
    assert not own & document.keys(), f"the document has keys of the format's own: {own & document.keys()}"
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "tag": tag,
        "commit": begun.commit,
        "durable": begun.durable,
        **document,
        "parts": {
            name: object_record(parts[name]) | {"arrays": _names(group)}
            for name, group in zip(parts, groups, strict=True)
        },
        "files": {name: object_record(content) for name, content in files.items()},
    }
    mark = {NAMED_LATEST: b""} if begun.first else {}
    last = {**files, **parts, **mark, MANIFEST: encode_manifest(manifest)}
    check_owner(store, tag, asked.run_id)
    store.commit(tag, begun.token, last, durable=begun.durable, update_latest=asked.update_latest)
    note_commit(store, tag, begun.commit)
    pruned: list[str] = []
    if asked.update_latest and retention.keep_last is not None:
        try:
            pruned, kept = delete_old(store, retention, run_id=asked.run_id)
        except CheckpointError as error:
            raise CheckpointError(f"{store.where(tag)} is committed, but: {error}") from error
        for problem in kept:
            say_once(problem)
    return SaveReport(
        tag=tag,
        url=store.where(tag),
        pruned=tuple(pruned),
        bytes_written=sum(record.bytes_written for record in everything),
        bytes_linked=sum(record.bytes_linked for record in everything),
    )


def described(everything: list[Record]) -> list[list[ArrayInfo]]:
    """Return the arrays of each plan with the checksums of their chunks.

    Each plan proves that each chunk has one writer; this checks, before the commit, that it was written.
    """
    cursor = [0] * len(everything)
    groups = []
    for record in everything:
        if record.arrays is None:
            continue
        group = []
        for key, dtype, grid, writers in record.arrays:
            sums = np.empty(len(writers), np.uint32)
            for rank in sorted(set(writers.tolist())):  # np.unique takes longer for few chunks
                chunks = writers == rank
                end = cursor[rank] + int(chunks.sum())
                sums[chunks] = everything[rank].sums[cursor[rank] : end]
                cursor[rank] = end
            group.append(ArrayInfo(key, dtype, grid, sums))
        groups.append(group)
    assert cursor == [len(record.sums) for record in everything], "chunks were left out, or written twice"
    times = Counter("/".join(info.key) for group in groups for info in group)
    twice = [name for name, n in times.items() if n > 1]
    assert not twice, f"{twice[0]} is in the plans of ranks that don't know each other"
    return groups


def _names(group: list[ArrayInfo]) -> dict[str, list[str]]:
    """Return the states of each atom."""
    names: dict[str, list[str]] = {}
    for info in group:
        names.setdefault(info.key.atom, []).append(info.key.state)
    return names
