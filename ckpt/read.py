"""Reading a checkpoint: one document to open it, then any box of any array, verified."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ckpt.background import check_last_save
from ckpt.box import Box, Shape
from ckpt.checksums import crc32c
from ckpt.comm import Comm, agreed, from_rank_0
from ckpt.errors import CheckpointError, as_checkpoint_error
from ckpt.format import (
    MANIFEST,
    MOST_DOCUMENT_BYTES,
    SLACK,
    decode_manifest,
    file_name,
    is_tag,
    numpy_dtype,
    tag_text,
)
from ckpt.parts import ArrayInfo, decode_part, uncollected
from ckpt.shards import Array, ArrayKey, Unfilled
from ckpt.stores import Store, open_store
from ckpt.tags import read_latest, there_are
from ckpt.threads import Scratch

WEIGHT_STATES = PARAMETER, BUFFER = "fp32", "value"
"""States that are a tensor's own value: a parameter in fp32, a buffer in its own type."""


class Checkpoint:
    """A committed checkpoint, opened for reading. Opening reads its manifest and nothing else."""

    def __init__(self, store: Store, folder: str, manifest: bytes | None = None) -> None:
        """Open the checkpoint in `folder` of the store ("" if the store is the checkpoint's own folder).

        `manifest` is the content of the manifest, if it has been read already.
        """
        self.store = store
        self.folder = folder
        with uncollected():
            data = self.document(MANIFEST) if manifest is None else manifest
            self.manifest = decode_manifest(data, self.where(MANIFEST))
        self.tag: str = folder or self.manifest["tag"]
        self.saved_as: str = self.manifest["tag"]
        """Tag under which it was saved; another one than that of a copy's folder."""
        self.arrays = Arrays(self)
        self._scratch = Scratch()

    @property
    def url(self) -> str:
        """URL of the checkpoint's own folder."""
        return self.where("")

    def path(self, path: str) -> str:
        """Convert a path relative to the checkpoint to one relative to its store."""
        return f"{self.folder}/{path}" if self.folder and path else self.folder or path

    def where(self, path: str) -> str:
        """Return the full name of an object of the checkpoint, for messages."""
        return self.store.where(self.path(path))

    def document(self, path: str) -> bytes:
        """Read a small object of the checkpoint; if the manifest has its checksum, verify it.

        Raises:
            CheckpointError: it can't be read, or is damaged.
        """
        most = MOST_DOCUMENT_BYTES
        if path != MANIFEST:
            record = (self.manifest["parts"] | self.manifest["files"])[path]
            most = min(most, record["size"] + SLACK)
        try:
            data = self.store.read(self.path(path), most)
        except OSError as error:
            raise CheckpointError(f"{self.where(path)} can't be read: {error.strerror or error}") from None
        if path != MANIFEST and (len(data), crc32c(data)) != (record["size"], int(record["crc32c"], 16)):
            raise CheckpointError(
                f"{self.where(path)} is damaged: its checksum isn't the manifest's; use another tag"
            )
        return data

    @property
    def atoms(self) -> dict[str, list[str]]:
        """Name of each atom -> its states."""
        names: dict[str, list[str]] = {}
        for key in self.arrays:
            names.setdefault(key.atom, []).append(key.state)
        return names

    def info(self, atom: str, state: str) -> ArrayInfo:
        """Return the array of a state of an atom; `atom` may be another name of a tied weight.

        Raises:
            CheckpointError: there is none; the message lists the states of the atom.
        """
        atom = self.manifest.get("aliases", {}).get(atom, atom)
        try:
            return self.arrays[ArrayKey(atom, state)]
        except KeyError:
            states = self.atoms.get(atom)
            known = f"its states are {', '.join(states)}" if states else "there is no such atom"
            raise CheckpointError(f"{self.url} has no {state!r} of {atom!r}: {known}") from None

    def read(self, atom: str, state: str = "fp32", box: Box | None = None) -> Array:
        """Read the array, or the part of it in `box`. Every byte that is returned has been verified.

        Raises:
            CheckpointError: there is no such array or box, or a chunk is missing or damaged.
        """
        info = self.info(atom, state)
        target = Box.whole(info.shape) if box is None else box
        try:
            out = np.empty(target.shape, numpy_dtype(info.dtype))
        except MemoryError as error:
            raise CheckpointError(f"{atom}/{state} of {self.url} can't be read: {error}") from None
        for piece in pieces(info, target):
            self.read_piece(piece, out)
        return out

    def read_piece(self, piece: Piece, out: Array | Unfilled) -> int:
        """Copy one piece of a box into its place in `out`, of the box's shape; return the bytes read.

        The whole chunk is read and verified. What is contiguous in both goes straight into an array's memory.
        """
        grid = piece.info.grid
        at = piece.target.slices or ...  # `...` is a view of a scalar, where `()` is a copy
        place = out[at] if isinstance(out, np.ndarray) else None
        first, last = piece.inside.span(grid.chunk_shape)
        if place is not None and place.flags.c_contiguous and last - first == place.size:
            begin, end = first * place.itemsize, last * place.itemsize
            spare = self._memory(piece, max(begin, grid.payload - end))  # for what is only verified
            stretch = place.reshape(-1).view(np.uint8)
            self._read_verified(piece, [spare[:begin], stretch, spare[: grid.payload - end]])
        else:
            memory = self._memory(piece, grid.payload)
            self._read_verified(piece, [memory])
            chunk = memory.view(numpy_dtype(piece.info.dtype)).reshape(grid.chunk_shape)
            out[at] = chunk[piece.inside.slices or ...]
        return grid.payload

    def _memory(self, piece: Piece, size: int) -> npt.NDArray[np.uint8]:
        try:
            return self._scratch.take(size)
        except MemoryError as error:
            raise CheckpointError(f"{piece.name} of {self.url} can't be read: {error}") from None

    def _read_verified(self, piece: Piece, memory: list[npt.NDArray[np.uint8]]) -> None:
        """Fill `memory`, one behind the other, with a chunk, and verify its checksum.

        A window at a time is read and summed, so that the sum finds it in the processor's cache.
        """
        grid, done, checksum = piece.info.grid, 0, 0
        file, begin = grid.place(piece.chunk)
        path = f"{piece.info.path}/{file_name(file)}"
        fault = None
        for part in memory:
            for at in range(0, len(part), self.store.window):
                window = part[at : at + self.store.window].data
                try:
                    got = self.store.read_into(self.path(path), window, begin + done)
                    if got < len(window):
                        fault = f"is cut short at {self.store.size(self.path(path))} bytes"
                except OSError as error:
                    fault = f"can't be read ({error.strerror or error})"
                if fault:
                    break
                done += got
                checksum = crc32c(window, checksum)
            if fault:
                break
        if fault is None and checksum != piece.info.sums[grid.number(piece.chunk)]:
            fault = "is damaged (checksum)"
        if fault:
            raise CheckpointError(f"{piece.name}: {self.where(path)} {fault}; use another tag")


class Arrays(Mapping[ArrayKey, ArrayInfo]):
    """The arrays of a checkpoint by name. A part of the manifest is read when one of its arrays is used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._part_of = {
            ArrayKey(atom, state): name
            for name, record in checkpoint.manifest["parts"].items()
            for atom, states in record["arrays"].items()
            for state in states
        }
        self._found: dict[str, dict[ArrayKey, ArrayInfo]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, key: ArrayKey) -> ArrayInfo:
        return self.part(self._part_of[key])[key]

    def __iter__(self) -> Iterator[ArrayKey]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)

    def __contains__(self, key: object) -> bool:
        return key in self._part_of

    def part(self, name: str) -> Mapping[ArrayKey, ArrayInfo]:
        """Return the arrays of a part of the manifest.

        Raises:
            CheckpointError: it can't be read or followed.
        """
        with self._lock:
            if name not in self._found:
                checkpoint = self._checkpoint
                listed = checkpoint.manifest["parts"][name]["arrays"]
                self._found[name] = decode_part(checkpoint.document(name), checkpoint.where(name), listed)
            return self._found[name]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a requested box that lies in one chunk."""

    info: ArrayInfo
    chunk: Shape
    """Index of the chunk."""
    inside: Box
    """The part, with offsets from the chunk's beginning."""
    target: Box
    """The part, with offsets from the requested box's beginning."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{'/'.join(self.info.key)} chunk {list(self.chunk)}"


def pieces(info: ArrayInfo, box: Box) -> Iterator[Piece]:
    """Yield the part of `box` in each chunk that it intersects.

    Raises:
        CheckpointError: the box reaches beyond the array.
    """
    shape = info.shape
    if len(box.shape) != len(shape) or not box.within(Box.whole(shape)):
        raise CheckpointError(
            f"{'/'.join(info.key)} has shape {list(shape)}; "
            f"the box {list(box.offset)}+{list(box.shape)} reaches beyond it"
        )
    if box.size == 0:
        return
    # Dim by dim rather than by boxes, as a load makes tens of thousands.
    for cuts in product(*map(_cuts, box.offset, box.shape, info.grid.chunk_shape)):
        chunk, inside, target, length = zip(*cuts, strict=True) if cuts else ((), (), (), ())
        yield Piece(info, chunk, Box(inside, length), Box(target, length))


def _cuts(offset: int, length: int, chunk: int) -> list[tuple[int, int, int, int]]:
    """Cut a box along one dim.

    Returns:
        For each chunk that it meets: the chunk's index, the part's offsets from the chunk's and from the
        box's beginning, and the part's length.
    """
    end, cuts = offset + length, []
    for i in range(offset // chunk, (end - 1) // chunk + 1):
        low, high = max(offset, i * chunk), min(end, (i + 1) * chunk)
        cuts.append((i, low - i * chunk, low - offset, high - low))
    return cuts


def open_checkpoint(run: str | Path, tag: str | int | None = None, *, renamed: bool = False) -> Checkpoint:
    """Open checkpoint `tag` of the run at `run`, a folder or any fsspec URL, or the one that `latest` names.

    `run` may also be a checkpoint's own folder, whatever it is called. With `renamed`, so may the tag's
    folder: a copy keeps the tag under which it was saved.

    Raises:
        CheckpointError: nothing is committed there, there is no such tag (the message lists the tags), the
            folder holds a checkpoint that was saved under another tag, or the documents are damaged.
    """
    checkpoint = Checkpoint(*find_checkpoint(run, tag))
    if not renamed and checkpoint.tag != checkpoint.saved_as:
        raise CheckpointError(
            f"{checkpoint.where(MANIFEST)} has the tag {checkpoint.saved_as!r}, not "
            f"{checkpoint.tag!r}: the checkpoint was copied, renamed or mixed up; if you want this one, "
            f"name its own folder, {checkpoint.url}, instead of run and tag"
        )
    return checkpoint


def open_together(comm: Comm, run: str | Path, tag: str | int | None = None) -> Checkpoint:
    """Open the same checkpoint on every rank; rank 0 finds it and reads the manifest for all. Collective.

    Raises:
        CheckpointError: as `open_checkpoint`, the same on all ranks.
    """

    def find() -> tuple[str, bytes]:
        found = open_checkpoint(run, tag)
        return found.url, found.document(MANIFEST)

    url, manifest = from_rank_0(comm, find)
    return agreed(comm, lambda: Checkpoint(open_store(url), "", manifest))


def find_checkpoint(run: str | Path, tag: str | int | None = None) -> tuple[Store, str]:
    """Return the store and the folder of the checkpoint that `open_checkpoint` would open.

    Raises:
        CheckpointError: nothing is committed there, or there is no such tag.
    """
    store = open_store(run)
    with as_checkpoint_error(f"{store.where('')} can't be read"):
        return _found(store, None if tag is None else tag_text(tag))


def _found(store: Store, tag: str | None) -> tuple[Store, str]:
    if tag is None and store.exists(MANIFEST):
        return store, ""
    if tag is None:
        check_last_save(store.url)
        tag = read_latest(store)
        if tag is None:
            exists = "holds no committed checkpoint" if store.exists("") else "is not a folder"
            raise CheckpointError(f"{store.where('')} {exists}; give the folder that a run was saved to")
    elif not is_tag(tag) or not store.exists(f"{tag}/{MANIFEST}"):
        raise CheckpointError(f"{store.where('')} has no committed checkpoint {tag!r}; {there_are(store)}")
    return store, tag
