"""Checking a whole checkpoint: that every object exists, and that every byte is the one that was saved.

A load verifies only the parts that its ranks read. `verify` reads everything: files to their last byte, and
also the documents that only zarr's readers use. It continues after damage, and each thread takes the memory
of one window, whatever the size. `absent` compares only the sizes of the files, and reads nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

from ckpt.box import Shape
from ckpt.checksums import CHECKSUM_BYTES, crc32c
from ckpt.errors import CheckpointError
from ckpt.format import MOST_DOCUMENT_BYTES, SLACK, ZARR, Json, file_name
from ckpt.parts import ArrayInfo, consolidated
from ckpt.read import Checkpoint
from ckpt.shards import Array
from ckpt.threads import Scratch, cores, for_each


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with one object of a checkpoint."""

    atom: str = ""
    """Empty, as is the next, if the object isn't part of one."""
    state: str = ""
    path: str
    """Full name of the object: a file or a URL."""
    what: str
    """Description of the problem, such as "is missing"."""

    def __str__(self) -> str:
        name = "/".join(filter(None, (self.atom, self.state)))
        return f"{name}: {self.path} {self.what}" if name else f"{self.path} {self.what}"


def verify(
    checkpoint: Checkpoint, *, progress: Callable[[int], None] = lambda n: None, threads: int | None = None
) -> list[Problem]:
    """Read and check every object of a checkpoint; return the problems.

    `progress` gets the bytes that were read, from one thread at a time. The manifest was checked when the
    checkpoint was opened; everything else is checked against it.
    """
    verifier = _Verifier(checkpoint, progress)
    jobs = [*verifier.documents(), *verifier.nodes(), *verifier.files()]
    found = for_each(lambda job: job(), jobs, threads or checkpoint.store.threads or cores())
    return [problem for problem in found if problem is not None]


def absent(checkpoint: Checkpoint, *, threads: int | None = None) -> list[Problem]:
    """Return the objects that are missing or have another size.

    Only the parts of the manifest are read, so this finds files that were deleted, left out of a copy, or cut
    short, but not bytes that changed.
    """
    expected, unread = _sizes(checkpoint)

    def look(path: str) -> Problem | None:
        wanted = expected[path]
        try:
            size = checkpoint.store.size(checkpoint.path(path))
        except OSError as error:
            return problem_at(checkpoint, path, unreadable(error))
        if wanted not in (None, size):
            return problem_at(checkpoint, path, other_size(size, wanted))
        return unread.get(path)

    found = for_each(look, expected, threads or checkpoint.store.threads or cores())
    return [problem for problem in found if problem is not None]


def extent(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return the number of a checkpoint's objects besides the manifest, and the bytes of those that `verify`
    reports to `progress`: all but the documents of single groups and arrays."""
    sizes = _sizes(checkpoint)[0].values()
    return len(sizes), sum(size for size in sizes if size is not None)


def _sizes(checkpoint: Checkpoint) -> tuple[dict[str, int | None], dict[str, Problem]]:
    """Return the size of every object, None where it isn't recorded, and what `_parts` says of bad parts."""
    manifest = checkpoint.manifest
    sizes: dict[str, int | None] = {
        path: record["size"] for path, record in (manifest["parts"] | manifest["files"]).items()
    }
    groups, unread = _parts(checkpoint)
    sizes |= dict.fromkeys(map(_document_of, consolidated(groups)["consolidated_metadata"]["metadata"]))
    for info in (info for group in groups for info in group):
        for index, _ in info.grid.files():
            sizes[f"{info.path}/{file_name(index)}"] = info.grid.file_bytes(index)
    return sizes, unread


def _parts(checkpoint: Checkpoint) -> tuple[list[list[ArrayInfo]], dict[str, Problem]]:
    """Return the arrays of each part of the manifest, and a problem for each part that can't be followed."""
    groups, unread = [], {}
    for name in checkpoint.manifest["parts"]:
        try:
            groups.append([*checkpoint.arrays.part(name).values()])
        except CheckpointError as error:
            what = str(error).removeprefix(f"{checkpoint.where(name)} ").removesuffix("; use another tag")
            unread[name] = problem_at(checkpoint, name, what)
    return groups, unread


def _document_of(node: str) -> str:
    return f"{node}/{ZARR}"


_Job = Callable[[], Problem | None]


class _Verifier:
    """Makes one job per object, to be run by a few threads."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._store = checkpoint.store
        self._tell = progress
        self._lock = threading.Lock()
        self._scratch = Scratch()
        self._groups, self._unread = _parts(checkpoint)
        self._root = consolidated(self._groups)

    def documents(self) -> Iterator[_Job]:
        """Yield the check of each object whose checksum the manifest has."""
        manifest = self._checkpoint.manifest
        for path in manifest["parts"] | manifest["files"]:
            yield partial(self._check_document, path)

    def nodes(self) -> Iterator[_Job]:
        """Yield the check of each document of a single group or array."""
        for node, document in self._root["consolidated_metadata"]["metadata"].items():
            yield partial(self._check_node, _document_of(node), document)

    def files(self) -> Iterator[_Job]:
        """Yield the check of each file with data."""
        for info in (info for group in self._groups for info in group):
            for index, _ in info.grid.files():
                yield partial(self._check_file, info, index)

    def _problem(self, path: str, what: str) -> Problem:
        return problem_at(self._checkpoint, path, what)

    def _progress(self, n: int) -> None:
        with self._lock:
            self._tell(n)

    # --- documents -------------------------------------------------------------------------------------

    def _check_document(self, path: str) -> Problem | None:
        manifest = self._checkpoint.manifest
        record = (manifest["parts"] | manifest["files"])[path]
        try:
            most = min(record["size"] + SLACK, MOST_DOCUMENT_BYTES)
            data = self._store.read(self._checkpoint.path(path), most)
        except OSError as error:
            return self._problem(path, unreadable(error))
        self._progress(len(data))
        if len(data) != record["size"]:
            return self._problem(path, other_size(len(data), record["size"]))
        if crc32c(data) != int(record["crc32c"], 16):
            return self._problem(path, "is damaged: its checksum isn't the manifest's")
        if path == ZARR and not self._unread:
            return self._compared(path, data, self._root)
        return self._unread.get(path)

    def _check_node(self, path: str, expected: Json) -> Problem | None:
        try:
            data = self._store.read(self._checkpoint.path(path), SLACK)
        except OSError as error:
            return self._problem(path, unreadable(error))
        return self._compared(path, data, expected)

    def _compared(self, path: str, data: bytes, expected: Json) -> Problem | None:
        try:
            same = json.loads(data) == expected
        except (ValueError, RecursionError):
            same = False
        return None if same else self._problem(path, "isn't what the manifest says of it")

    # --- files -----------------------------------------------------------------------------------------

    def _check_file(self, info: ArrayInfo, file: Shape) -> Problem | None:
        """Read a file to its end, in windows that fit the processor's cache, and describe its faults."""
        grid, path = info.grid, f"{info.path}/{file_name(file)}"
        size, chunks = grid.file_bytes(file), grid.chunks(file)
        stream = _Stream(partial(self._read, path), self._scratch.take(self._store.window), size)
        damaged: list[str] = []
        outside = False  # True if something other than a chunk is damaged
        for i, index in enumerate(chunks):
            begin = i * grid.stride
            end = begin + grid.stride if i + 1 < len(chunks) else grid.index_offset(file)
            checksum = 0
            for part in stream.parts(grid.payload):
                checksum = crc32c(part, checksum)
            tail = stream.take(end - begin - grid.payload)
            if stream.done < end:
                break
            wanted = int(info.sums[grid.number(index)])
            if checksum != wanted or tail[:CHECKSUM_BYTES] != wanted.to_bytes(CHECKSUM_BYTES, "little"):
                damaged.append(f"chunk {list(index)} at byte {begin}")
            outside |= tail[CHECKSUM_BYTES:].strip(b"\0") != b""
        else:
            index_bytes = stream.take(size - stream.done)
            outside |= stream.done == size and index_bytes != grid.index(file)
        faults = []
        if damaged:
            faults.append(f"is damaged in {len(damaged)} of {len(chunks)} chunks, the first is {damaged[0]}")
        if outside:
            faults.append("is damaged between or behind its chunks")
        if stream.error is not None:
            faults.append(unreadable(stream.error))
        elif stream.done < size:
            faults.append(f"is cut short at {stream.done} of {size} bytes")
        elif stream.goes_on:
            faults.append(self._too_long(path, size))
        return self._problem(path, ", and ".join(faults)) if faults else None

    def _read(self, path: str, buffer: memoryview, offset: int) -> int:
        got = self._store.read_into(self._checkpoint.path(path), buffer, offset)
        self._progress(got)
        return got

    def _too_long(self, path: str, size: int) -> str:
        """Describe a file that has more than `size` bytes."""
        try:
            return other_size(self._store.size(self._checkpoint.path(path)), size)
        except OSError:
            return f"goes on after its {size} bytes"


class _Stream:
    """Reads a file from its beginning, a window at a time.

    Attributes:
        done: the bytes handed out so far.
        goes_on: True if the file has more than its size, once all of it was handed out.
        error: the error that ended it early, or None.
    """

    def __init__(self, read: Callable[[memoryview, int], int], window: Array, size: int) -> None:
        self.done = 0
        self.goes_on = False
        self.error: OSError | None = None
        self._read = read
        self._window = window
        self._size = size
        self._held = memoryview(b"")  # read, but not handed out
        self._ended = False

    def parts(self, length: int) -> Iterator[memoryview]:
        """Yield the next `length` bytes in parts, each valid until the next; fewer at the file's end."""
        while length > 0:
            if not self._held:
                self._fill()
            if not self._held:
                return
            part, self._held = self._held[:length], self._held[length:]
            length -= len(part)
            self.done += len(part)
            yield part

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes; fewer at the file's end."""
        return b"".join([bytes(part) for part in self.parts(length)])

    def _fill(self) -> None:
        """Read the next window, with one byte too many at the end: this finds a file that is too long."""
        left = self._size - self.done
        length = min(left + 1, len(self._window))
        buffer = self._window[: length - (length == left)].data  # the last window is the one with that byte
        try:
            got = 0 if self._ended else self._read(buffer, self.done)
        except OSError as error:
            self.error, got = error, 0
        self._ended |= got < len(buffer)
        self.goes_on = got > left
        self._held = buffer[: min(got, left)]


def problem_at(checkpoint: Checkpoint, path: str, what: str) -> Problem:
    """Make a problem with the object at `path`."""
    folder, *names = path.split("/")[:-1] or [""]
    atom, state = (*map(unquote, names), "", "")[:2] if folder == "atoms" else ("", "")
    return Problem(atom=atom, state=state, path=checkpoint.where(path), what=what)


def unreadable(error: OSError) -> str:
    """Describe an object that can't be read."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"can't be read ({' '.join(str(error.strerror or error).split())})"


def other_size(found: int, expected: int) -> str:
    """Describe an object of another size than recorded."""
    return f"has {found} bytes instead of {expected}"
