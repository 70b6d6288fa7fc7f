"""Reading a checkpoint: two documents to open it, then any box of any array, verified."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from ckpt import files
from ckpt.box import Box, Shape, grid
from ckpt.checksum import block_checksums, crc32c
from ckpt.commit import committed_tags, local_folder, read_latest
from ckpt.errors import CheckpointError
from ckpt.format import MANIFEST, ZARR, Json, check_tag, chunk_key, decode_manifest
from ckpt.plan import ArrayKey

WEIGHT_STATES = ("fp32", "value")
"""The states that are a tensor's own value: fp32 weights, and buffers in their own type."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """One array of a checkpoint, as its documents describe it."""

    key: ArrayKey
    dtype: str
    shape: Shape
    chunk_shape: Shape
    path: Path
    chunks: Mapping[str, Json]
    """What the manifest says of each chunk: `size`, `crc32c`, and `blocks` where there are several."""

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).size * np.dtype(self.dtype).itemsize


class Checkpoint:
    """A committed checkpoint, opened for reading. Nothing but its two documents has been read yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_document(folder / MANIFEST)
        self.manifest = decode_manifest(manifest, str(folder / MANIFEST))
        self.tag: str = self.manifest["tag"]
        self.block_bytes: int = self.manifest["block_bytes"]
        self.arrays: dict[ArrayKey, ArrayInfo] = {a.key: a for a in self._arrays()}

    def _arrays(self) -> Iterator[ArrayInfo]:
        data = _read_document(self.folder / ZARR)
        record = self.manifest["documents"][ZARR]
        if len(data) != record["size"] or crc32c(data) != int(record["crc32c"], 16):
            raise CheckpointError(f"{self.folder / ZARR} is damaged: its checksum isn't the manifest's")
        for path, document in json.loads(data)["consolidated_metadata"]["metadata"].items():
            if document["node_type"] == "array":
                _, atom, state = path.split("/")
                yield ArrayInfo(
                    key=ArrayKey(unquote(atom), unquote(state)),
                    dtype=document["data_type"],
                    shape=tuple(document["shape"]),
                    chunk_shape=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
                    path=self.folder / path,
                    chunks=self.manifest["chunks"].get(path, {}),
                )

    @property
    def atoms(self) -> dict[str, list[str]]:
        """Names of the atoms, each with its states."""
        names: dict[str, list[str]] = {}
        for key in self.arrays:
            names.setdefault(key.atom, []).append(key.state)
        return names

    def info(self, atom: str, state: str) -> ArrayInfo:
        """The array of a state of an atom; `atom` may be another name of a tied weight."""
        atom = self.manifest.get("aliases", {}).get(atom, atom)
        try:
            return self.arrays[ArrayKey(atom, state)]
        except KeyError:
            states = self.atoms.get(atom)
            known = f"its states are {', '.join(states)}" if states else "there is no such atom"
            raise CheckpointError(f"{self.folder} has no {state!r} of {atom!r}: {known}") from None

    def read(self, atom: str, state: str = "fp32", box: Box | None = None) -> Array:
        """The array, or the part of it in `box`. Every byte that is returned has been verified."""
        info = self.info(atom, state)
        target = Box.whole(info.shape) if box is None else box
        out = np.empty(target.shape, info.dtype)
        for piece in pieces(info, target):
            self.read_piece(piece, out)
        return out

    def read_piece(self, piece: Piece, out: Array) -> int:
        """Copy one piece of a box into its place in `out` (of the box's shape); returns the bytes read.

        A piece that is a whole chunk and lies in one stretch of `out` is read straight into it.
        """
        place = out[piece.target.slices or ...]  # `...` is a view of a scalar, where `()` is a copy
        payload = Box.whole(piece.info.chunk_shape).size * place.itemsize
        if piece.inside.shape == piece.info.chunk_shape and place.flags.c_contiguous:
            self._read_verified(piece, place.reshape(-1).view(np.uint8).data, 0)
            return payload
        first, last = piece.inside.span(piece.info.chunk_shape)
        begin = first * place.itemsize // self.block_bytes * self.block_bytes
        end = min(-(-last * place.itemsize // self.block_bytes) * self.block_bytes, payload)
        buffer = np.empty(end - begin, np.uint8)
        self._read_verified(piece, buffer.data, begin)
        # The piece's elements inside the buffer, which begins `begin` bytes into the chunk.
        elements = buffer.view(place.dtype)[first - begin // place.itemsize :]
        steps = [place.itemsize * Box.whole(piece.info.chunk_shape[d + 1 :]).size for d in range(place.ndim)]
        place[...] = np.lib.stride_tricks.as_strided(elements, piece.inside.shape, steps, writeable=False)
        return end - begin

    def _read_verified(self, piece: Piece, buffer: memoryview, begin: int) -> None:
        """Fill `buffer` from `begin` of the chunk's file, whole blocks, and compare their checksums."""
        record = piece.info.chunks.get(piece.chunk)
        name = f"{'/'.join(piece.info.key)} chunk {piece.chunk}"
        if record is None:
            raise CheckpointError(
                f"{self.folder / MANIFEST} has no record of {name}; the tag can't be trusted"
            )
        path = piece.info.path / piece.chunk
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                got = files.read_into(fd, buffer, begin)
            finally:
                os.close(fd)
        except OSError as error:
            raise CheckpointError(
                f"{name}: {path} can't be read ({error.strerror}); use another tag"
            ) from None
        if got != len(buffer):
            raise CheckpointError(f"{name}: {path} is cut short at {begin + got} bytes; use another tag")
        expected = [int(c, 16) for c in record.get("blocks", [record["crc32c"]])]
        first = begin // self.block_bytes
        for i, checksum in enumerate(block_checksums(buffer, self.block_bytes), start=first):
            if checksum != expected[i]:
                raise CheckpointError(f"{name}: {path} is damaged (checksum of block {i}); use another tag")


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a wanted box that lies in one chunk."""

    info: ArrayInfo
    chunk: str
    inside: Box
    """The part, counted from the chunk's beginning."""
    target: Box
    """The part, counted from the wanted box's beginning."""


def pieces(info: ArrayInfo, box: Box) -> Iterator[Piece]:
    """The chunks of an array that meet `box`, and what of each is wanted."""
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
    """Open checkpoint `tag` of the folder `run`, or the one that `latest` names.

    `run` may also be a checkpoint's own folder.

    Raises:
        CheckpointError: nothing is committed there, no such tag (the ones there are, are listed), or the
            documents are damaged.
    """
    folder = local_folder(run)
    if tag is None and (folder / MANIFEST).exists():
        return Checkpoint(folder)
    if tag is None:
        tag = read_latest(folder)
        if tag is None:
            exists = "holds no committed checkpoint" if folder.is_dir() else "is not a folder"
            raise CheckpointError(f"{folder} {exists}; give the folder that a run was saved to")
    elif not _is_tag(tag) or not (folder / tag / MANIFEST).exists():
        tags = committed_tags(folder)
        there = f"the tags there are: {', '.join(tags)}" if tags else "there are none"
        raise CheckpointError(f"{folder} has no committed checkpoint {tag!r}; {there}")
    return Checkpoint(folder / tag)


def _is_tag(tag: str) -> bool:
    try:
        check_tag(tag)
    except ValueError:
        return False
    return True


def _read_document(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
