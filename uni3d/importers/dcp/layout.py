"""Layout of a folder of torch's distributed checkpoint (DCP), read without torch.

`.metadata` is a pickled `torch.distributed.checkpoint.metadata.Metadata`. It has the shape and the chunks of
each tensor, the file and the byte range of each chunk and each other object, and the path of each name in the
nested dict that was saved. Each byte range is a complete file of `torch.save`, so each chunk has checksums of
its own.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.dcp.names import Steps
from uni3d.importers.pickles import Function, StandIn, TypeName, read_pickle
from uni3d.importers.source import Array, Options
from uni3d.importers.torch_files import TorchFile
from uni3d.importers.torch_tensors import NAMES, StoredTensor

METADATA = ".metadata"
_SAMPLE = 64
_METADATA_NAMES = {**NAMES, "torch.serialization._get_layout": Function(TypeName)}


@dataclass(frozen=True, kw_only=True)
class FileRange:
    """Range of bytes in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredChunk:
    """Box of a tensor, and its place."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: FileRange


@dataclass(frozen=True, kw_only=True)
class ChunkedTensor:
    """A tensor as chunks that cover each element once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


class Layout:
    """Content of the folder.

    Attributes:
        tensors: by name.
        objects: places of the values that aren't tensors, by name.
        steps: path in the nested dict, by name, in the dict's order.
        where: the folder, for messages.
        left_out: a line for everything that isn't taken, or that the user should know.
    """

    def __init__(self, path: Path, options: Options) -> None:
        """Read `.metadata`, and check that every file exists and is long enough."""
        self.path, self._options = path, options
        self.where = str(path)
        self.left_out: list[str] = []
        self._sizes: dict[str, int] = {}
        self._maps: dict[str, memoryview] = {}
        self._verified: dict[FileRange, StoredTensor] = {}
        content = self._metadata()
        self.tensors: dict[str, ChunkedTensor] = {}
        self.objects: dict[str, FileRange] = {}
        try:
            self._take(content)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise CheckpointError(
                f"{path / METADATA} isn't the metadata of a distributed checkpoint of torch: "
                f"{type(error).__name__}: {error}"
            ) from None
        found = content.field("planner_data")
        paths: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        names = {**self.tensors, **self.objects}
        order = [*(name for name in paths if name in names), *(name for name in names if name not in paths)]
        self.steps: dict[str, Steps] = {name: _steps(paths.get(name, (name,))) for name in order}

    @property
    def without(self) -> str:
        """Advice on how to do without the optimizer's states."""
        return "; or import with --weights-only"

    @property
    def files(self) -> frozenset[Path]:
        """Files that the checkpoint consists of."""
        return frozenset(self.path / name for name in (METADATA, *self._sizes))

    def read(self, name: str, first: int | None = None) -> Array:
        """Return a verified tensor, or only its row `first`.

        Raises:
            CheckpointError: a chunk is damaged, or doesn't match the metadata.
        """
        tensor = self.tensors[name]
        if first is not None:  # each chunk has only one row
            rows = [chunk for chunk in tensor.chunks if chunk.offsets[0] == first]
            part = [replace(chunk, offsets=(0, *chunk.offsets[1:])) for chunk in rows]
            row: Array = self._read(tensor, (1, *tensor.shape[1:]), part)[0]
            return row
        return self._read(tensor, tensor.shape, tensor.chunks)

    def read_part(self, name: str, part: tuple[slice, ...], *, verify: bool = True) -> Array:
        """Return a part of a tensor, given a slice for each dim; only chunks that it meets are read.

        Raises:
            CheckpointError: one of these is damaged, or doesn't match the metadata.
        """
        tensor = self.tensors[name]
        values = np.empty([each.stop - each.start for each in part], numpy_dtype(tensor.dtype))
        for chunk in tensor.chunks:
            cuts = [
                (max(want.start, begin), min(want.stop, begin + size))
                for want, begin, size in zip(part, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(low < high for low, high in cuts):
                there = tuple(slice(a - o, b - o) for (a, b), o in zip(cuts, chunk.offsets, strict=True))
                here = tuple(slice(a - w.start, b - w.start) for (a, b), w in zip(cuts, part, strict=True))
                values[here or ...] = self.chunk(tensor, chunk, verify=verify)[there or ...]
        return values

    def _read(self, tensor: ChunkedTensor, shape: tuple[int, ...], chunks: Sequence[StoredChunk]) -> Array:
        if len(chunks) == 1:
            return self.chunk(tensor, chunks[0])
        values = np.empty(shape, numpy_dtype(tensor.dtype))
        for chunk in chunks:
            values[_slices(chunk)] = self.chunk(tensor, chunk)
        return values

    def tied(self, name: str, owner: str) -> bool:
        """Return whether two tensors have the same bits; False for constants, often equal but not tied."""
        if self._sample(name) != self._sample(owner):
            return False
        mine, theirs = (np.ascontiguousarray(self.read(key)).reshape(-1) for key in (owner, name))
        if mine.size and (mine == mine[0]).all():
            return False
        return np.array_equal(mine.view(np.uint8), theirs.view(np.uint8))

    def leave_out(self, name: str, reason: str) -> None:
        """Leave out an entry, with a line for the user."""
        self.left_out.append(f"{name}: {reason}")

    def note(self, line: str) -> None:
        """Take a line for the user."""
        self.left_out.append(line)

    def _sample(self, name: str) -> bytes:
        """Return a tensor's first values, unverified; they tell most tensors of one shape apart."""
        tensor = self.tensors[name]
        first = next((c for c in tensor.chunks if not any(c.offsets)), None)
        if first is None or not prod(first.sizes):
            return b""
        return self.chunk(tensor, first, verify=False).ravel()[:_SAMPLE].tobytes()

    def number(self, name: str) -> Any:
        """Return the number in a tensor of one element."""
        return self.read(name).reshape(()).item()

    def object(self, name: str) -> Any:
        """Return a value that isn't a tensor, unpickled by `pickles`."""
        return self._open(self.objects[name], name).load()

    def _metadata(self) -> StandIn:
        file = self.path / METADATA
        if not file.is_file():
            ranks = sorted(each.name for each in self.path.glob(f"__*{METADATA}"))
            why = ": it isn't a distributed checkpoint, or its save didn't finish"
            if ranks:
                why = (
                    f" but one per rank ({ranks[0]}, ...), as with use_collectives=False, which isn't "
                    "supported; load it with torch and save it again"
                )
            raise CheckpointError(f"{self.path} has no {METADATA}{why}")
        found = read_pickle(
            file.read_bytes(),
            str(file),
            stand_ins=self._options.stand_ins,
            names=_METADATA_NAMES,
            trust=self._options.trust,
        )
        if not isinstance(found, StandIn) or not found.name.endswith(".Metadata"):
            raise CheckpointError(f"{file} holds {found!r}, expected torch's Metadata")
        return found

    def _take(self, content: StandIn) -> None:
        """Fill `tensors` and `objects` from the metadata."""
        places: dict[tuple[str, Any], FileRange] = {}
        for index, info in content.field("storage_data").items():
            name, offset = index.field("fqn"), index.field("offset")
            key = (str(name), None if offset is None else tuple(offset))
            if key in places:
                raise CheckpointError(f"{self.path / METADATA} gives two places for {name} at {offset}")
            places[key] = self._place(str(name), info)
        for name, entry in content.field("state_dict_metadata").items():
            if not entry.name.endswith(".TensorStorageMetadata"):
                self.objects[name] = self._found(places, name, None)
                continue
            shape = tuple(entry.field("size"))
            chunks = [
                StoredChunk(
                    offsets=tuple(each.field("offsets")),
                    sizes=tuple(each.field("sizes")),
                    place=self._found(places, name, tuple(each.field("offsets"))),
                )
                for each in entry.field("chunks")
                if prod(each.field("sizes")) or not prod(shape)
            ]
            dtype = _dtype(entry.field("properties"))
            tensor = ChunkedTensor(name=name, dtype=dtype, shape=shape, chunks=tuple(chunks))
            check_cover(f"{self.path}: {name}", tensor)
            self.tensors[name] = tensor

    def _found(self, places: Mapping[Any, FileRange], name: str, offset: Any) -> FileRange:
        if (name, offset) not in places:
            at = "" if offset is None else f" at {list(offset)}"
            raise CheckpointError(f"{self.path / METADATA} gives no place for {name}{at}")
        return places[name, offset]

    def _place(self, name: str, info: StandIn) -> FileRange:
        if transforms := info.field("transform_descriptors"):
            raise CheckpointError(
                f"{self.path}: {name} was written through {', '.join(map(str, transforms))}, which isn't "
                "supported; save it without writer extensions"
            )
        file = info.field("relative_path")
        offset, length = info.field("offset"), info.field("length")
        if not (isinstance(file, str) and type(offset) is int and type(length) is int):
            raise CheckpointError(
                f"{self.path / METADATA} has an invalid place for {name}: {file!r}, {offset!r}, {length!r}"
            )
        parts = PurePosixPath(file).parts
        if not parts or PurePosixPath(file).is_absolute() or {"..", ""} & set(parts) or "\\" in file:
            raise CheckpointError(f"{self.path / METADATA} names a file outside its folder: {file!r}")
        if file not in self._sizes:
            try:
                self._sizes[file] = (self.path / file).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(f"{self.path / file} is missing; {METADATA} refers to it") from None
        size = self._sizes[file]
        if not 0 <= offset <= offset + length <= size:
            raise CheckpointError(
                f"{self.path / file} is truncated: it has {size} bytes, and {name} is at {offset} to "
                f"{offset + length}"
            )
        return FileRange(file=file, offset=offset, length=length)

    def chunk(self, tensor: ChunkedTensor, chunk: StoredChunk, *, verify: bool = True) -> Array:
        if verify and chunk.place in self._verified:  # a tensor may be read in many parts
            return self._verified[chunk.place].read()
        stored = self._open(chunk.place, tensor.name, verify=verify).load()
        what = f"{self.path / chunk.place.file}: {tensor.name} at {list(chunk.offsets)}"
        if not isinstance(stored, StoredTensor):
            raise CheckpointError(f"{what} is a {type(stored).__name__}, not a tensor")
        if (stored.dtype, stored.shape) != (tensor.dtype, chunk.sizes):
            raise CheckpointError(
                f"{what} is {stored.dtype}{list(stored.shape)}, expected {tensor.dtype}{list(chunk.sizes)} "
                f"from {METADATA}"
            )
        values = stored.read()
        if verify:
            self._verified[chunk.place] = stored
        return values

    def _open(self, place: FileRange, name: str, *, verify: bool = True) -> TorchFile:
        if place.file not in self._maps:
            with (self.path / place.file).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[place.file] = memoryview(mapped)
        whole = self._maps[place.file]
        data = whole[place.offset : place.offset + place.length]
        # A safetensors file begins with the length, in eight bytes, of the JSON that follows.
        if bytes(data[:2]) != b"PK" and bytes(whole[8:9]) == b"{":
            raise CheckpointError(
                f"{self.path / place.file} holds {name} as safetensors, written by torch's "
                "HuggingFaceStorageWriter; consolidate its files and import the result"
            )
        options = self._options if verify else replace(self._options, verify=False)
        return TorchFile(self.path / place.file, options, data)


def check_cover(what: str, tensor: ChunkedTensor) -> None:
    """Check that the chunks cover every element once.

    The tensor is cut wherever any chunk begins or ends, so each chunk is a whole number of the pieces.

    Raises:
        CheckpointError: they leave a gap, overlap, or reach beyond the tensor.
    """
    for chunk in tensor.chunks:
        box = list(zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True))
        if not all(0 <= begin <= begin + size <= whole for begin, size, whole in box):
            raise CheckpointError(f"{what} has a chunk {_box(chunk)} beyond its shape {list(tensor.shape)}")
    cuts = [{0, whole} for whole in tensor.shape]
    for chunk in tensor.chunks:
        for edges, begin, size in zip(cuts, chunk.offsets, chunk.sizes, strict=True):
            edges |= {begin, begin + size}
    places = [sorted(edges) for edges in cuts]
    count = np.zeros([len(each) - 1 for each in places], np.uint8)
    index = [{edge: i for i, edge in enumerate(each)} for each in places]
    for chunk in tensor.chunks:
        part = tuple(
            slice(at[begin], at[begin + size])
            for at, begin, size in zip(index, chunk.offsets, chunk.sizes, strict=True)
        )
        if count[part].any():
            raise CheckpointError(f"{what} has a chunk {_box(chunk)} that overlaps another")
        count[part] = 1
    if not count.all():
        gap = [each[i] for each, i in zip(places, np.argwhere(count == 0)[0], strict=True)]
        raise CheckpointError(f"{what} has no chunk that covers {gap}")


def _steps(path: Any) -> Steps:
    steps = tuple(path) if isinstance(path, tuple | list) else ()
    if not steps or not all(isinstance(step, str | int) for step in steps):
        raise CheckpointError(f"{METADATA} has an invalid path in planner_data: {path!r}")
    return steps


def _slices(chunk: StoredChunk) -> tuple[slice, ...]:
    return tuple(map(slice, chunk.offsets, map(sum, zip(chunk.offsets, chunk.sizes, strict=True))))


def _box(chunk: StoredChunk) -> str:
    return f"{list(chunk.sizes)} at {list(chunk.offsets)}"


def _dtype(properties: StandIn) -> str:
    state = properties.state
    found = state[0] if isinstance(state, tuple) else properties.field("dtype")
    return str(found.name).removeprefix("torch.")
