"""Reading a checkpoint: two documents to open it, then any box of any array, verified."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from ckpt.box import Box, Shape, grid
from ckpt.checksums import Blocks, crc32c
from ckpt.errors import CheckpointError
from ckpt.format import (
    MANIFEST,
    ZARR,
    Json,
    chunk_key,
    decode_manifest,
    document_dtype,
    is_tag,
    itemsize,
    numpy_dtype,
)
from ckpt.shards import Array, ArrayKey
from ckpt.stores import Store, open_store
from ckpt.tags import read_latest, there_are
from ckpt.threads import Scratch

WEIGHT_STATES = PARAMETER, BUFFER = "fp32", "value"
"""States that are a tensor's own value: a parameter in fp32, a buffer in its own type."""


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One array of a checkpoint, as described by its documents."""

    key: ArrayKey
    dtype: str
    shape: Shape
    chunk_shape: Shape
    path: str
    """Folder of the array, relative to the checkpoint."""
    chunks: Mapping[str, Json]
    """Chunk key -> the manifest's record; see `ckpt.checksums`."""

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).size * itemsize(self.dtype)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable the garbage collector while large documents are parsed.

    None of their hundreds of thousands of objects is garbage, but the collector would traverse them again and
    again (30,000 arrays: 1.0 s with it, 0.3 s without).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Checkpoint:
    """A committed checkpoint, opened for reading. Opening reads its two documents and nothing else."""

    def __init__(self, store: Store, folder: str) -> None:
        """Open the checkpoint in `folder` of the store ("" if the store is the checkpoint's own folder)."""
        self.store = store
        self.folder = folder
        with _uncollected():
            self.manifest = decode_manifest(self._read_document(MANIFEST), self.where(MANIFEST))
            self.tag: str = folder or self.manifest["tag"]
            self.arrays: dict[ArrayKey, ArrayInfo] = {a.key: a for a in self._arrays()}
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

    def _read_document(self, path: str) -> bytes:
        try:
            return self.store.read(self.path(path))
        except OSError as error:
            raise CheckpointError(f"{self.where(path)} can't be read: {error.strerror or error}") from None

    def _arrays(self) -> Iterator[ArrayInfo]:
        data = self._read_document(ZARR)
        record = self.manifest["documents"][ZARR]
        if len(data) != record["size"] or crc32c(data) != int(record["crc32c"], 16):
            raise CheckpointError(f"{self.where(ZARR)} is damaged: its checksum isn't the manifest's")
        for path, document in json.loads(data)["consolidated_metadata"]["metadata"].items():
            if document["node_type"] == "array":
                _, atom, state = path.split("/")
                yield ArrayInfo(
                    key=ArrayKey(unquote(atom), unquote(state)),
                    dtype=document_dtype(document),
                    shape=tuple(document["shape"]),
                    chunk_shape=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
                    path=path,
                    chunks=self.manifest["chunks"].get(path, {}),
                )

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
        out = np.empty(target.shape, numpy_dtype(info.dtype))
        for piece in pieces(info, target):
            self.read_piece(piece, out)
        return out

    def read_piece(self, piece: Piece, out: Array) -> int:
        """Copy one piece of a box into its place in `out`, of the box's shape; return the bytes read.

        Whole blocks that are contiguous in `out` are read straight into it.
        """
        place = out[piece.target.slices or ...]  # `...` is a view of a scalar, where `()` is a copy
        first, last = piece.inside.span(piece.info.chunk_shape)
        if place.flags.c_contiguous and last - first == place.size:
            return self._read_stretch(piece, first * place.itemsize, place.reshape(-1).view(np.uint8))
        return self._read_strided(piece, place, first, last)

    def _read_stretch(self, piece: Piece, begin: int, place: npt.NDArray[np.uint8]) -> int:
        """Fill `place` from byte `begin` of the chunk; partly needed blocks go through scratch memory."""
        blocks, payload = self._blocks(piece), _payload(piece)
        done = read = 0
        while done < len(place):
            at = begin + done
            start = at - at % blocks.size
            block_end = min(start + blocks.size, payload)
            whole = (len(place) - done) // blocks.size * blocks.size  # a last block may be shorter
            if start == at and (whole or block_end - at <= len(place) - done):
                length = min(max(whole, block_end - at), self._window(blocks), payload - at)
                self._read_verified(piece, blocks, start, place[done : done + length].data)
                read += length
            else:
                scratch = self._scratch.take(block_end - start)
                self._read_verified(piece, blocks, start, scratch.data)
                length = min(block_end - at, len(place) - done)
                place[done : done + length] = scratch[at - start : at - start + length]
                read += len(scratch)
            done += length
        return read

    def _read_strided(self, piece: Piece, place: Array, first: int, last: int) -> int:
        """Read the blocks around elements `first` to `last` of the chunk, and pick the piece's elements."""
        blocks = self._blocks(piece)
        begin, end = self._around(piece, blocks, first, last)
        buffer = self._scratch.take(end - begin)
        step = self._window(blocks)
        for at in range(0, len(buffer), step):
            self._read_verified(piece, blocks, begin + at, buffer[at : at + step].data)
        # The piece's elements inside the buffer, which begins `begin` bytes into the chunk.
        elements = buffer.view(place.dtype)[first - begin // place.itemsize :]
        steps = [place.itemsize * Box.whole(piece.info.chunk_shape[d + 1 :]).size for d in range(place.ndim)]
        place[...] = np.lib.stride_tricks.as_strided(elements, piece.inside.shape, steps, writeable=False)
        return end - begin

    def cost(self, piece: Piece) -> int:
        """Return the bytes that `read_piece` reads: the blocks that the piece lies in. Reads nothing."""
        begin, end = self._around(piece, self._blocks(piece), *piece.inside.span(piece.info.chunk_shape))
        return end - begin

    def _around(self, piece: Piece, blocks: Blocks, first: int, last: int) -> tuple[int, int]:
        """Return the byte range of the blocks that hold elements `first` to `last` of the chunk."""
        size = itemsize(piece.info.dtype)
        end = min(-(-last * size // blocks.size) * blocks.size, _payload(piece))
        return first * size // blocks.size * blocks.size, end

    def _window(self, blocks: Blocks) -> int:
        """Return how many bytes to read at a time, a multiple of the block size."""
        return max(self.store.window // blocks.size, 1) * blocks.size

    def _blocks(self, piece: Piece) -> Blocks:
        record = piece.info.chunks.get(piece.chunk)
        if record is None:
            raise CheckpointError(
                f"{self.where(MANIFEST)} has no record of {piece.name}; the tag can't be trusted"
            )
        return Blocks.of_record(record)

    def _read_verified(self, piece: Piece, blocks: Blocks, begin: int, buffer: memoryview) -> None:
        """Fill `buffer` with whole blocks from `begin` of the chunk's file, and verify their checksums."""
        path = f"{piece.info.path}/{piece.chunk}"
        try:
            got = self.store.read_into(self.path(path), buffer, begin)
        except OSError as error:
            fault = f"can't be read ({error.strerror or error})"
        else:
            if got == len(buffer):
                damaged = blocks.first_damaged(buffer, begin // blocks.size)
                if damaged is None:
                    return
                fault = f"is damaged (checksum of block {damaged})"
            else:
                fault = f"is cut short at {begin + got} bytes"
        raise CheckpointError(f"{piece.name}: {self.where(path)} {fault}; use another tag")


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a requested box that lies in one chunk."""

    info: ArrayInfo
    chunk: str
    inside: Box
    """The part, with offsets from the chunk's beginning."""
    target: Box
    """The part, with offsets from the requested box's beginning."""

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{'/'.join(self.info.key)} chunk {self.chunk}"


def _payload(piece: Piece) -> int:
    """Return the bytes of a chunk's elements, without its checksum."""
    return Box.whole(piece.info.chunk_shape).size * itemsize(piece.info.dtype)


def pieces(info: ArrayInfo, box: Box) -> Iterator[Piece]:
    """Yield the part of `box` in each chunk that it intersects.

    Raises:
        CheckpointError: the box reaches beyond the array.
    """
    if len(box.shape) != len(info.shape) or not box.within(Box.whole(info.shape)):
        raise CheckpointError(
            f"{'/'.join(info.key)} has shape {list(info.shape)}; "
            f"the box {list(box.offset)}+{list(box.shape)} reaches beyond it"
        )
    for index, chunk in grid(info.shape, info.chunk_shape, box):
        part = chunk.intersect(box)
        assert part is not None, "the grid yields only chunks that meet the box"
        yield Piece(info, chunk_key(index), part.relative_to(chunk), part.relative_to(box))


def open_checkpoint(run: str | Path, tag: str | None = None) -> Checkpoint:
    """Open checkpoint `tag` of the run at `run`, a folder or any fsspec URL, or the one that `latest` names.

    `run` may also be a checkpoint's own folder.

    Raises:
        CheckpointError: nothing is committed there, there is no such tag (the message lists the tags), or the
            documents are damaged.
    """
    return Checkpoint(*find_checkpoint(run, tag))


def find_checkpoint(run: str | Path, tag: str | None = None) -> tuple[Store, str]:
    """Return the store and the folder of the checkpoint that `open_checkpoint` would open.

    Raises:
        CheckpointError: nothing is committed there, or there is no such tag.
    """
    store = open_store(run)
    if tag is None and store.exists(MANIFEST):
        return store, ""
    if tag is None:
        tag = read_latest(store)
        if tag is None:
            exists = "holds no committed checkpoint" if store.exists("") else "is not a folder"
            raise CheckpointError(f"{store.where('')} {exists}; give the folder that a run was saved to")
    elif not is_tag(tag) or not store.exists(f"{tag}/{MANIFEST}"):
        raise CheckpointError(f"{store.where('')} has no committed checkpoint {tag!r}; {there_are(store)}")
    return store, tag
