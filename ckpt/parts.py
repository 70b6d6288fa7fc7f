"""Parts of the manifest: documents that describe arrays, with a checksum for each chunk.

The manifest names its parts, with the arrays that each describes. A rank reads only the parts that it needs.
"""

from __future__ import annotations

import base64
import binascii
import gc
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.array_files import FileGrid, file_grid
from ckpt.box import Shape
from ckpt.errors import CheckpointError
from ckpt.format import (
    DTYPES,
    Json,
    array_document,
    array_path,
    atom_path,
    encode_document,
    group_document,
    itemsize,
)
from ckpt.shards import ArrayKey

Sums = npt.NDArray[np.uint32]

MOST_DIMS = 63
"""Most dims of an array: those of numpy less one, for the index of a file."""
MOST_BYTES = 2**63 - 1
"""Most bytes of an array and of a file, as places in them are 64-bit integers."""


@dataclass(frozen=True, eq=False)
class ArrayInfo:
    """One array of a checkpoint."""

    key: ArrayKey
    dtype: str
    grid: FileGrid
    """Its shape, and the places of its chunks."""
    sums: Sums
    """Checksum of each chunk, in C order."""

    @property
    def shape(self) -> Shape:
        return self.grid.shape

    @property
    def nbytes(self) -> int:
        return prod(self.grid.shape) * self.grid.itemsize

    @cached_property
    def path(self) -> str:
        """Folder of the array, relative to the checkpoint."""
        return array_path(*self.key)


def encode_part(arrays: Iterable[ArrayInfo]) -> bytes:
    """Encode the description of some arrays."""
    document: Json = {}
    for info in arrays:
        record = array_record(info.dtype, info.grid, info.sums)
        document.setdefault(info.key.atom, {})[info.key.state] = record
    return encode_document(document)


def array_record(dtype: str, grid: FileGrid, sums: Sums) -> Json:
    """Return the description of one array."""
    return {
        "dtype": dtype,
        "shape": grid.shape,
        "chunk_shape": grid.chunk_shape,
        "file_shape": grid.file_shape,
        "crc32c": base64.b64encode(sums.astype("<u4").tobytes()).decode(),
    }


def decode_part(data: bytes, source: str, listed: Mapping[str, Any]) -> dict[ArrayKey, ArrayInfo]:
    """Decode a part; `listed` are its atoms with their states, by the manifest; `source` names it in errors.

    Raises:
        CheckpointError: it isn't of the form that the specification gives.
    """
    with uncollected():
        try:
            document = json.loads(data)
            same = _names(document) == {atom: sorted(states) for atom, states in listed.items()}
        except (ValueError, RecursionError, AttributeError, TypeError):
            same = False
        if not same:
            raise CheckpointError(f"{source} doesn't describe the arrays that the manifest lists for it")
        arrays = {}
        for atom, states in document.items():
            for state, record in states.items():
                try:
                    info = _info(ArrayKey(atom, state), record)
                except KeyError as error:
                    raise _unusable(source, atom, state, f"no {error}") from None
                except (TypeError, ValueError, CheckpointError) as error:
                    raise _unusable(source, atom, state, error) from None
                arrays[info.key] = info
        return arrays


def _unusable(source: str, atom: str, state: str, why: object) -> CheckpointError:
    name = f"{atom}/{state}".encode(errors="backslashreplace").decode()
    return CheckpointError(f"{source} has a record of {name} that can't be followed ({why}); use another tag")


def _names(document: Json) -> dict[str, list[str]]:
    """Return the states of each atom of a part; raises AttributeError if they aren't objects."""
    return {atom: sorted(states.keys()) for atom, states in document.items()}


def _info(key: ArrayKey, record: Json) -> ArrayInfo:
    """Return the array of a record; raises ValueError, KeyError or TypeError if its form is wrong."""
    dtype = record["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype {reprlib.repr(dtype)}")
    shape, chunk, file = (_shape(record, name) for name in ("shape", "chunk_shape", "file_shape"))
    grid, count = _grid(shape, chunk, file, itemsize(dtype))
    try:
        sums = np.frombuffer(base64.b64decode(record["crc32c"], validate=True), "<u4")
    except binascii.Error as error:
        raise ValueError(f"crc32c: {error}") from None
    if len(sums) != count:
        raise ValueError(f"{len(sums)} checksums of {count} chunks")
    info = ArrayInfo(key, dtype, grid, sums)
    _ = info.path  # raises an error if no file can have such a name
    return info


@lru_cache(4096)
def _grid(shape: Shape, chunk: Shape, file: Shape, element_size: int) -> tuple[FileGrid, int]:
    """Return the grid of an array and its number of chunks; raises ValueError if there is no such grid."""
    if not len(shape) == len(chunk) == len(file):
        raise ValueError("shapes of different lengths")
    if any(c < 1 or f < 1 or f % c for c, f in zip(chunk, file, strict=True)):
        raise ValueError(f"file_shape {reprlib.repr([*file])} isn't whole chunks of {reprlib.repr([*chunk])}")
    grid = file_grid(shape, chunk, file, element_size)
    most = max(prod(max(n, 1) for n in grid.counts), prod(grid.per_file)) * (grid.stride + 16)
    if len(shape) > MOST_DIMS or most > MOST_BYTES:
        raise ValueError(f"{len(shape)} dims, {most.bit_length()}-bit places")
    return grid, prod(grid.counts)


def _shape(record: Json, name: str) -> Shape:
    shape = record[name]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} {reprlib.repr(shape)}")
    return tuple(shape)


def consolidated(groups: Iterable[Iterable[ArrayInfo]]) -> Json:
    """Return the `zarr.json` of the checkpoint, with the documents of all groups and arrays."""
    documents: Json = {"atoms": group_document()}
    for info in (info for group in groups for info in group):
        documents[atom_path(info.key.atom)] = group_document()
        documents[info.path] = array_document(info.dtype, info.grid)
    return group_document(dict(sorted(documents.items())))


@contextmanager
def uncollected() -> Iterator[None]:
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
