"""Writing one rank's chunks and metadata documents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ckpt.box import Box
from ckpt.checksums import CHECKSUM_BYTES, Summing, crc32c
from ckpt.errors import CheckpointError
from ckpt.format import (
    ZARR,
    Json,
    array_document,
    array_path,
    atom_path,
    chunk_key,
    encode_document,
    fill_value,
    group_document,
    numpy_dtype,
)
from ckpt.plan import ArrayPlan, Chunk, Plan
from ckpt.read import Checkpoint
from ckpt.shards import Array
from ckpt.stores import Store
from ckpt.threads import for_each


@dataclass(frozen=True, slots=True)
class Write:
    """One chunk to write."""

    plan: ArrayPlan
    chunk: Chunk
    data: Array | Callable[[], Array]
    """Part of the array inside `chunk.box`, or a function that reads it when it is written."""


@dataclass
class Written:
    """Records of everything that one rank has written."""

    chunks: dict[str, dict[str, Json]] = field(default_factory=dict)
    """Path of an array -> chunk key -> the manifest's record."""
    documents: dict[str, Json] = field(default_factory=dict)
    """Path of a group or an array -> its `zarr.json`."""
    bytes_written: int = 0
    bytes_linked: int = 0

    def add(self, other: Written) -> None:
        """Add another rank's, or a later, record."""
        for path, records in other.chunks.items():
            self.chunks.setdefault(path, {}).update(records)
        self.documents |= other.documents
        self.bytes_written += other.bytes_written
        self.bytes_linked += other.bytes_linked


class Writer:
    """Writes one rank's part of one save."""

    def __init__(self, store: Store, tag: str, *, durable: bool, base: str | None, threads: int) -> None:
        """Prepare to write; chunks that the committed tag `base` has too are linked to it."""
        self._store = store
        self._staging = store.staging(tag)
        self._durable = durable
        self._threads = threads
        self._made: set[str] = set()
        self._base: Checkpoint | None = None
        if base is not None:
            with contextlib.suppress(CheckpointError):  # a damaged base is of no use: write everything
                self._base = Checkpoint(store, base)

    def write_chunks(self, writes: Iterable[Write]) -> Written:
        """Write chunks on a few threads; system calls and checksums release the interpreter's lock."""
        todo = list(writes)
        written = Written()
        self._make_folders(array_path(*w.plan.key) for w in todo)
        results = for_each(self._write_chunk, todo, self._threads)
        for write, (record, linked) in zip(todo, results, strict=True):
            path = array_path(*write.plan.key)
            written.chunks.setdefault(path, {})[chunk_key(write.chunk.index)] = record
            written.bytes_linked += linked * record["size"]
            written.bytes_written += (not linked) * record["size"]
        return written

    def write_documents(self, plan: Plan, rank: int) -> Written:
        """Write the `zarr.json` of each array that this rank owns, and of atoms whose first array it owns."""
        documents: dict[str, Json] = {} if rank else {"atoms": group_document()}
        first: dict[str, int] = {}
        for array in plan.arrays:
            if first.setdefault(array.key.atom, array.owner) == rank:
                documents[atom_path(array.key.atom)] = group_document()
            if array.owner == rank:
                content = array_document(array.dtype, array.shape, array.chunk_shape)
                documents[array_path(*array.key)] = content
        self._make_folders(documents)

        def write(path: str) -> None:
            content = encode_document(documents[path])
            self._store.write(f"{self._staging}/{path}/{ZARR}", [content], durable=False)

        for_each(write, documents, self._threads)
        return Written(documents=documents)

    def _make_folders(self, paths: Iterable[str]) -> None:
        new = dict.fromkeys(path for path in paths if path not in self._made)
        self._store.make_folders(f"{self._staging}/{path}" for path in new)
        self._made.update(new)

    def _write_chunk(self, write: Write) -> tuple[Json, bool]:
        """Write one object: the chunk's elements in C order, little endian, then their crc32c.

        Returns its record, and whether it was linked to the base's instead of being written.
        """
        plan, given = write.plan, write.data
        payload = part = given() if callable(given) else given
        if part.shape != plan.chunk_shape:  # zarr stores whole chunks even at the array's end
            payload = np.full(plan.chunk_shape, fill_value(plan.dtype), numpy_dtype(plan.dtype))
            payload[Box.whole(part.shape).slices] = part
        data = np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data
        summing = Summing(data)
        path = f"{array_path(*plan.key)}/{chunk_key(write.chunk.index)}"
        old = self._unchanged(write, summing, data)
        if old is not None and self._link(path, summing, data, old):
            return old, True
        self._store.write(f"{self._staging}/{path}", summing.blocks(), durable=self._durable)
        return summing.record(), False

    def _unchanged(self, write: Write, summing: Summing, data: memoryview) -> Json | None:
        """Return the base's record of the chunk if it may be the same, by the checksum of its first block.

        Most changed chunks differ in their first block, so they are summed once, while they are written.
        """
        if self._base is None:
            return None
        plan, info = write.plan, self._base.arrays.get(write.plan.key)
        kind = plan.dtype, plan.shape, plan.chunk_shape
        if info is None or (info.dtype, info.shape, info.chunk_shape) != kind:
            return None
        record = info.chunks.get(chunk_key(write.chunk.index))
        if record is None or record["size"] != len(data) + CHECKSUM_BYTES:
            return None
        first: str = (record["running"] if "running" in record else record["crc32c"])[:8]
        return record if crc32c(data[: summing.block]) == int(first, 16) else None

    def _link(self, path: str, summing: Summing, data: memoryview, old: Json) -> bool:
        """Link the base's object to this chunk's name if it has the same bytes; return whether it did.

        All bytes are compared: equal checksums are no proof, and the disk may have lost what was once
        written.
        """
        assert self._base is not None, "a record exists only with a base"
        *_, checksum = summing.blocks()
        if summing.record() != old:
            return False
        try:
            same = self._store.same(self._base.path(path), [data, checksum])
        except OSError:
            return False
        return same and self._store.link(self._base.path(path), f"{self._staging}/{path}")
