"""Writing one rank's chunks and metadata documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ckpt.begin import Begun
from ckpt.box import Box, Shape
from ckpt.checksums import CHECKSUM_BYTES, Buffer, Summing
from ckpt.format import (
    ZARR,
    array_path,
    atom_path,
    encode_document,
    encoded_array_document,
    file_name,
    fill_value,
    group_document,
    numpy_dtype,
)
from ckpt.links import Links, Run
from ckpt.parts import Sums
from ckpt.plan import ArrayPlan, Chunk, Plan
from ckpt.shards import Array, ArrayKey
from ckpt.stores import Store
from ckpt.threads import cores, for_each

JOB_BYTES = 32 << 20
"""Approximate number of bytes that a thread writes at a time into a file that it can share."""


@dataclass(slots=True)
class Write:
    """One chunk to write."""

    plan: ArrayPlan
    chunk: Chunk
    data: Array | Callable[[], Array]
    """Part of the array inside `chunk.box`, or a function that reads it when it is written."""
    sum: int | None = None
    """Its checksum, once all of it has been written or compared."""

    def parts(self) -> Iterator[Buffer]:
        """Yield the chunk as it stands in the file: its elements in C order, little endian, their crc32c."""
        grid, dtype = self.plan.grid, self.plan.dtype
        payload = part = self.data() if callable(self.data) else self.data
        if part.shape != grid.chunk_shape:  # zarr stores whole chunks even at the array's end
            payload = np.full(grid.chunk_shape, fill_value(dtype), numpy_dtype(dtype))
            payload[Box.whole(part.shape).slices] = part
        summing = Summing(np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data)
        yield from summing.parts()
        self.sum = summing.sum


@dataclass
class Written:
    """Record of everything that one rank has written."""

    sums: dict[ArrayKey, dict[Shape, int | None]] = field(default_factory=lambda: defaultdict(dict))
    """Array -> index of a chunk -> its checksum."""
    bytes_written: int = 0
    bytes_linked: int = 0

    def in_order(self, plan: Plan, rank: int) -> Sums:
        """Return the checksums of the chunks that the plan gives this rank, in the plan's order."""
        return np.array(
            [
                self.sums[array.key][chunk.index]
                for array in plan.arrays
                for chunk in array.chunk_plan.by_writer.get(rank, ())
            ],
            np.uint32,
        )


@dataclass(slots=True)
class _File:
    """Chunks of one file that this rank writes."""

    plan: ArrayPlan
    index: Shape
    path: str
    """Relative to the checkpoint."""
    writes: list[tuple[int, Write]] = field(default_factory=list)
    """Offset of each chunk in the file, rising."""

    @property
    def whole(self) -> bool:
        """True if these are all of the file's chunks."""
        return self.writes[-1][0] == (len(self.writes) - 1) * self.plan.grid.stride and self.ends

    @property
    def ends(self) -> bool:
        """True if the file's last chunk is among these; its writer adds the index."""
        grid = self.plan.grid
        return self.writes[-1][0] + grid.stride >= grid.index_offset(self.index)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.plan.grid.file_bytes(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of these chunks."""
        return len(self.writes) * (self.plan.grid.payload + CHECKSUM_BYTES)

    def cut(self, nbytes: int) -> Iterator[_File]:
        """Yield files with up to about `nbytes` of the chunks each."""
        step = max(1, nbytes // self.plan.grid.stride)
        for i in range(0, len(self.writes), step):
            yield _File(self.plan, self.index, self.path, self.writes[i : i + step])

    def runs(self) -> Iterator[Run]:
        """Yield these chunks, each with the zeros behind it, and the index."""
        stride = self.plan.grid.stride
        first = 0
        for i in range(1, len(self.writes) + 1):
            if i == len(self.writes) or self.writes[i][0] != self.writes[i - 1][0] + stride:
                yield self.writes[first][0], self._parts(self.writes[first:i])
                first = i

    def _parts(self, writes: Sequence[tuple[int, Write]]) -> Iterator[Buffer]:
        grid = self.plan.grid
        end = grid.index_offset(self.index)
        for offset, write in writes:
            yield from write.parts()
            gap = min(offset + grid.stride, end) - offset - grid.payload - CHECKSUM_BYTES
            if gap > 0:  # zeros anyway in a new file, but to be compared in an old one
                yield bytes(gap)
        if writes[-1][0] + grid.stride >= end:
            yield grid.index(self.index)


class Writer:
    """Writes one rank's part of one save."""

    def __init__(
        self,
        store: Store,
        tag: str,
        plan: Plan,
        rank: int,
        *,
        begun: Begun,
        threads: int | None,
    ) -> None:
        """Prepare to write; files that the committed tag `begun.base` has too are linked to it."""
        self._store = store
        self._staging = store.staging(tag, begun.token)
        self._plan = plan
        self._rank = rank
        self._in_parts = plan.files == "array" and store.shares_files
        self._durable = begun.durable
        self._threads = store.threads or threads or cores()
        # Ranks begin at different places of their lists, so that they don't wait for each other's locks.
        self._turn = plan.ranks.index(rank) / len(plan.ranks)
        self._made: set[str] = set()
        self._links = None if begun.base is None else Links(store, begun.base, self._staging)
        self.written = Written()

    def unchanged(self, writes: Iterable[Write], among: Collection[ArrayKey] | None) -> set[ArrayKey]:
        """Return the arrays whose bytes that this rank would write are those of the base.

        With `among=None`, only the first page of each array's first chunk is compared.
        """
        links = self._links
        assert links is not None, "arrays are unchanged only compared with a base"
        files: dict[ArrayKey, list[_File]] = defaultdict(list)
        for file in _files(write for write in writes if among is None or write.plan.key in among):
            files[file.plan.key].append(file)

        def same(key: ArrayKey) -> bool:
            if among is None:
                first = files[key][0]
                return links.may_be_same(first.path, first.size, next(first.runs()))
            return all(links.same(file.path, file.size, file.runs()) for file in files[key])

        results = for_each(same, files, self._threads)
        return {key for key, is_same in zip(files, results, strict=True) if is_same}

    def write_chunks(self, writes: Iterable[Write], linked: Collection[ArrayKey] = ()) -> None:
        """Write chunks on a few threads; system calls and checksums release the interpreter's lock.

        Arrays in `linked` are the base's: their owner links their files.
        """
        files = _files(writes)
        here = [file for file in files if file.plan.key not in linked]
        begin = int(self._turn * len(here))
        here = [*here[begin:], *here[:begin]]
        self._make_folders(array_path(*file.plan.key) for file in files)
        changed = [
            file
            for file, same in zip(here, for_each(self._link, here, self._threads), strict=True)
            if not same
        ]
        jobs = [job for file in changed for job in self._jobs(file)]
        for_each(self._write, jobs, self._threads)
        for file in files:
            self.written.sums[file.plan.key].update({w.chunk.index: w.sum for _, w in file.writes})
        written = sum(file.nbytes for file in changed)
        self.written.bytes_written += written
        self.written.bytes_linked += sum(file.nbytes for file in files) - written

    def link(self, arrays: Iterable[ArrayPlan]) -> None:
        """Link all files of these arrays to the base's."""
        for array in arrays:
            assert self._links is not None, "arrays are unchanged only compared with a base"
            folder = array_path(*array.key)
            self._make_folders([folder])
            for index, _ in array.grid.files():
                self._links.link(f"{folder}/{file_name(index)}")

    def write_documents(self) -> None:
        """Write the `zarr.json` of each array that this rank owns, and of atoms whose first array it owns."""
        group = encode_document(group_document())
        documents: dict[str, bytes] = {} if self._rank else {"atoms": group}
        first: dict[str, int] = {}
        for array in self._plan.arrays:
            if first.setdefault(array.key.atom, array.owner) == self._rank:
                documents[atom_path(array.key.atom)] = group
            if array.owner == self._rank:
                documents[array_path(*array.key)] = encoded_array_document(array.dtype, array.grid)
        self._make_folders(documents)

        def write(path: str) -> None:
            self._store.write(f"{self._staging}/{path}/{ZARR}", [documents[path]], durable=False)

        for_each(write, documents, self._threads)

    def _make_folders(self, paths: Iterable[str]) -> None:
        new = dict.fromkeys(path for path in paths if path not in self._made)
        self._store.make_folders(f"{self._staging}/{path}" for path in new)
        self._made.update(new)
        self._made.update(path.rpartition("/")[0] for path in new)  # those of atoms come with their arrays

    def _link(self, file: _File) -> bool:
        """Link a file that only this rank writes, if the base has the same; return whether it has."""
        if self._links is None or not file.whole:
            return False
        if not self._links.may_be_same(file.path, file.size, next(file.runs())):
            return False
        if not self._links.same(file.path, file.size, file.runs()):
            return False
        self._links.link(file.path)
        return True

    def _jobs(self, file: _File) -> Iterable[_File]:
        return file.cut(JOB_BYTES) if self._in_parts else [file]

    def _write(self, file: _File) -> None:
        path = f"{self._staging}/{file.path}"
        if file.whole:
            ((_, parts),) = file.runs()
            self._store.write(path, parts, durable=self._durable)
        else:
            self._store.write_into(path, file.runs(), durable=self._durable)


def _files(writes: Iterable[Write]) -> list[_File]:
    """Group chunks by file."""
    files: dict[str, _File] = {}
    for write in writes:
        index, offset = write.plan.grid.place(write.chunk.index)
        path = f"{array_path(*write.plan.key)}/{file_name(index)}"
        files.setdefault(path, _File(write.plan, index, path)).writes.append((offset, write))
    for file in files.values():
        file.writes.sort(key=lambda item: item[0])
    return list(files.values())
