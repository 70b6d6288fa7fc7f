"""Checking a whole checkpoint: that every object exists, and that every byte is the one that was saved.

A load verifies only the parts that its ranks read. `verify` reads everything: chunks to the last byte of
their files, and also the documents that only zarr's readers use. It continues after damage, and each thread
takes the memory of one window, whatever the size. `absent` compares only the sizes of the objects, and reads
nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from ckpt.box import Box, grid
from ckpt.checksums import CHECKSUM_BYTES, Blocks, crc32c
from ckpt.format import MANIFEST, ZARR, Json, chunk_key, itemsize
from ckpt.read import ArrayInfo, Checkpoint
from ckpt.threads import Scratch, cores, for_each


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with one object of a checkpoint."""

    atom: str = ""
    """Empty, as are the next two, if the object isn't part of one."""
    state: str = ""
    chunk: str = ""
    path: str
    """Full name of the object: a file or a URL."""
    what: str
    """Description of the problem, such as "is missing"."""

    def __str__(self) -> str:
        name = "/".join(filter(None, (self.atom, self.state)))
        name = f"{name} chunk {self.chunk}" if self.chunk else name
        return f"{name}: {self.path} {self.what}" if name else f"{self.path} {self.what}"


def verify(
    checkpoint: Checkpoint, *, progress: Callable[[int], None] = lambda n: None, threads: int | None = None
) -> list[Problem]:
    """Read and check every object of a checkpoint; return the problems.

    `progress` gets the bytes that were read, from one thread at a time. The manifest was checked when the
    checkpoint was opened; everything else is checked against it.
    """
    verifier = _Verifier(checkpoint, progress)
    root = verifier.root()
    jobs = [*verifier.documents(), *verifier.chunks()]
    found = for_each(lambda job: job(), jobs, threads or checkpoint.store.threads or cores())
    return [problem for problem in (root, *found) if problem is not None]


def absent(checkpoint: Checkpoint, *, threads: int | None = None) -> list[Problem]:
    """Return the objects that are missing or have another size, and chunks that the manifest doesn't list.

    Nothing is read, so this finds files that were deleted, left out of a copy, or cut short, but not bytes
    that changed.
    """
    expected = _sizes(checkpoint)

    def look(path: str) -> Problem | None:
        try:
            size = checkpoint.store.size(checkpoint.path(path))
        except OSError as error:
            return problem_at(checkpoint, path, unreadable(error))
        wanted = expected[path]
        return None if size == wanted else problem_at(checkpoint, path, other_size(size, wanted))

    found = for_each(look, expected, threads or checkpoint.store.threads or cores())
    return [*_unknown(checkpoint), *(problem for problem in found if problem is not None)]


def extent(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the number and the total bytes of the objects that the manifest names."""
    sizes = _sizes(checkpoint)
    return len(sizes), sum(sizes.values())


_Job = Callable[[], Problem | None]


class _Verifier:
    """Makes one job per object, to be run by a few threads."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._store = checkpoint.store
        self._manifest = checkpoint.manifest
        self._records: dict[str, Json] = self._manifest["documents"] | self._manifest.get("files", {})
        self._tell = progress
        self._lock = threading.Lock()
        self._scratch = Scratch()
        self._nodes: dict[str, Json] | None = None
        """Path of a group or an array -> its document in the consolidated one; None if that is damaged."""

    def root(self) -> Problem | None:
        """Read the consolidated `zarr.json` again and check it: the other documents are compared with it."""
        data, problem = self._document(ZARR)
        if data is not None:
            self._nodes = json.loads(data)["consolidated_metadata"]["metadata"]
        return problem

    def documents(self) -> Iterator[_Job]:
        """Yield the check of each other document and file, including any `zarr.json` that has no record."""
        recorded = self._records.keys() - {ZARR}
        for path in sorted(recorded | {f"{node}/{ZARR}" for node in self._nodes or ()}):
            if path in recorded:
                yield partial(self._check_document, path)
            else:
                yield partial(self._problem, path, f"has no record of {path}", at=MANIFEST)

    def chunks(self) -> Iterator[_Job]:
        """Yield the check of each chunk that is recorded or should be."""
        records, arrays = self._manifest["chunks"], {a.path: a for a in self._checkpoint.arrays.values()}
        for path in sorted(records.keys() - arrays.keys()):
            what = f"has records of chunks in {path}, which is no array of the checkpoint"
            yield partial(self._problem, path, what, at=MANIFEST)
        for info in arrays.values():
            wanted = [chunk_key(index) for index, _ in grid(info.shape, info.chunk_shape)]
            yield from (partial(self._check_chunk, info, key) for key in wanted)
            for key in sorted(info.chunks.keys() - set(wanted)):
                what = "has a record of it, but there is no such chunk in the array's grid"
                yield partial(self._problem, f"{info.path}/{key}", what, at=MANIFEST)

    def _problem(self, path: str, what: str, at: str | None = None) -> Problem:
        return problem_at(self._checkpoint, path, what, at)

    def _progress(self, n: int) -> None:
        with self._lock:
            self._tell(n)

    # --- documents -------------------------------------------------------------------------------------

    def _check_document(self, path: str) -> Problem | None:
        data, problem = self._document(path)
        node = path.removesuffix(f"/{ZARR}")
        if data is None or self._nodes is None or node == path:  # the last is another file
            return problem
        try:
            same = json.loads(data) == self._nodes.get(node)
        except ValueError:
            same = False
        return None if same else self._problem(path, f"isn't what the checkpoint's {ZARR} says of it")

    def _document(self, path: str) -> tuple[bytes | None, Problem | None]:
        """Return a document that has its recorded checksum, or None and the problem."""
        record = self._records[path]
        try:
            data = self._store.read(self._checkpoint.path(path))
        except OSError as error:
            return None, self._problem(path, unreadable(error))
        self._progress(len(data))
        if len(data) != record["size"]:
            return None, self._problem(path, other_size(len(data), record["size"]))
        if crc32c(data) != int(record["crc32c"], 16):
            return None, self._problem(path, "is damaged: its checksum isn't the manifest's")
        return data, None

    # --- chunks ----------------------------------------------------------------------------------------

    def _check_chunk(self, info: ArrayInfo, key: str) -> Problem | None:
        path, size = f"{info.path}/{key}", Box.whole(info.chunk_shape).size * itemsize(info.dtype)
        if key not in info.chunks:
            return self._problem(path, "has no record of it", at=MANIFEST)
        blocks = self._blocks(info.chunks[key], size)
        if blocks is None:
            return self._problem(path, "has a record of it that can't be followed", at=MANIFEST)
        faults = self._faults(path, blocks, size, int(info.chunks[key]["crc32c"], 16))
        return self._problem(path, ", and ".join(faults)) if faults else None

    def _blocks(self, record: Json, size: int) -> Blocks | None:
        """Return the chunk's checksums; None if its record doesn't fit a chunk of `size` bytes."""
        try:
            blocks, checksum = Blocks.of_record(record), int(record["crc32c"], 16)
            fits = record["size"] == size + CHECKSUM_BYTES and blocks.count == -(-size // blocks.size)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return None
        return blocks if fits and blocks.sum(blocks.count - 1) == checksum else None

    def _faults(self, path: str, blocks: Blocks, size: int, checksum: int) -> list[str]:
        """Read a chunk's file, in windows that fit the processor's cache, and describe its faults."""
        window = max(self._store.window // blocks.size, 1) * blocks.size
        faults: list[str] = []
        damaged: list[int] = []
        for begin in range(0, size, window):
            length = min(window, size - begin)
            tail = CHECKSUM_BYTES if begin + length == size else 0
            # Ask for one byte too many at the end, which finds a file that is too long without another call.
            buffer = self._scratch.take(length + tail + bool(tail)).data
            try:
                got = self._store.read_into(self._checkpoint.path(path), buffer, begin)
            except OSError as error:
                faults.append(unreadable(error))
                break
            self._progress(min(got, length + tail))
            data = buffer[: length if got >= length else got // blocks.size * blocks.size]  # whole blocks
            damaged += _damaged(blocks, data, begin // blocks.size)
            if got < length + tail:
                faults.append(f"is cut short at {begin + got} of {size + CHECKSUM_BYTES} bytes")
                break
            if tail and int.from_bytes(buffer[length : length + tail], "little") != checksum:
                faults.append("doesn't end with its checksum")
            if got > length + tail:
                faults.append(self._too_long(path, size + CHECKSUM_BYTES))
        if damaged:
            first = f"the first at byte {damaged[0] * blocks.size}"
            faults.insert(0, f"is damaged in {len(damaged)} of {blocks.count} blocks, {first}")
        return faults

    def _too_long(self, path: str, size: int) -> str:
        """Describe a file that has more than `size` bytes."""
        try:
            return other_size(self._store.size(self._checkpoint.path(path)), size)
        except OSError:
            return f"goes on after its {size} bytes"


def _damaged(blocks: Blocks, data: memoryview, first: int) -> Iterator[int]:
    """Yield the indices of all damaged blocks in `data`, which begins with block `first`."""
    begin = 0
    while begin < len(data):
        index = blocks.first_damaged(data[begin:], first + begin // blocks.size)
        if index is None:
            return
        yield index
        begin = (index + 1 - first) * blocks.size


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the size of every object that the manifest names."""
    manifest = checkpoint.manifest
    records = manifest["documents"] | manifest.get("files", {})
    for array, chunks in manifest["chunks"].items():
        records |= {f"{array}/{key}": record for key, record in chunks.items()}
    return {path: record.get("size", 0) for path, record in records.items()}


def _unknown(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Yield the chunks of the arrays' grids that have no record."""
    for info in checkpoint.arrays.values():
        for index, _ in grid(info.shape, info.chunk_shape):
            if chunk_key(index) not in info.chunks:
                path = f"{info.path}/{chunk_key(index)}"
                yield problem_at(checkpoint, path, "has no record of it", at=MANIFEST)


def problem_at(checkpoint: Checkpoint, path: str, what: str, at: str | None = None) -> Problem:
    """Make a problem with the object at `path`, or with the record of it in the document `at`."""
    parts = [*path.split("/")[1:], "", "", ""][:3]
    atom, state, chunk = ("" if part == ZARR else unquote(part) for part in parts)
    where = checkpoint.where(path if at is None else at)
    return Problem(atom=atom, state=state, chunk=chunk, path=where, what=what)


def unreadable(error: OSError) -> str:
    """Describe an object that can't be read."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"can't be read ({' '.join(str(error.strerror or error).split())})"


def other_size(found: int, expected: int) -> str:
    """Describe an object of another size than recorded."""
    return f"has {found} bytes instead of {expected}"
