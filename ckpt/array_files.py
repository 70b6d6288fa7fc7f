"""Places of an array's chunks in its files.

A file is a shard of zarr's codec `sharding_indexed`: chunks, then an index of their places. Chunks aren't
compressed, so each place is known before anything is written, and several ranks can write one file at the
same time without talking to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import numpy as np

from ckpt.box import Box, Shape, grid
from ckpt.checksums import CHECKSUM_BYTES, crc32c

PAGE = 4096
"""Chunks of a file begin at multiples of this, so that no two writers touch one page of it."""
_ABSENT = 2**64 - 1
"""Offset and size, in zarr's index, of a chunk that lies beyond the array's end."""


@dataclass(frozen=True)
class FileGrid:
    """Cut of an array into files, and of each file into chunks. Make one by `file_grid`."""

    shape: Shape
    """Shape of the array."""
    chunk_shape: Shape
    file_shape: Shape
    """Shape that a file covers: whole chunks, along each dim."""
    itemsize: int

    @cached_property
    def payload(self) -> int:
        """Bytes of a chunk's elements. Chunks that reach beyond the array's end are stored whole."""
        return prod(self.chunk_shape) * self.itemsize

    @cached_property
    def stride(self) -> int:
        """Bytes from the beginning of a chunk to that of the next in the same file."""
        return -(-(self.payload + CHECKSUM_BYTES) // PAGE) * PAGE

    @cached_property
    def counts(self) -> Shape:
        """Number of chunks along each dim."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True))

    @cached_property
    def per_file(self) -> Shape:
        """Number of a file's chunks along each dim, those beyond the array's end included."""
        return tuple(f // c for f, c in zip(self.file_shape, self.chunk_shape, strict=True))

    def number(self, index: Shape) -> int:
        """Return the position of a chunk among all of the array, in C order."""
        number = 0
        for i, count in zip(index, self.counts, strict=True):
            number = number * count + i
        return number

    def files(self, box: Box | None = None) -> Iterator[tuple[Shape, Box]]:
        """Yield `(index, box)` of each file, or of those that meet `box`."""
        return grid(self.shape, self.file_shape, box)

    def chunks(self, file: Shape) -> list[Shape]:
        """Return the indices of a file's chunks in the order in which they lie in it: C order."""
        first, there = _extent(self, file)
        return [tuple(a + b for a, b in zip(first, i, strict=True)) for i in np.ndindex(*there)]

    def place(self, index: Shape) -> tuple[Shape, int]:
        """Return the index of the file that holds a chunk, and the byte at which the chunk begins."""
        file = tuple(i // n for i, n in zip(index, self.per_file, strict=True))
        first, there = _extent(self, file)
        position = 0
        for i, a, n in zip(index, first, there, strict=True):
            position = position * n + (i - a)
        return file, position * self.stride

    def index_offset(self, file: Shape) -> int:
        """Return the byte at which a file's index begins."""
        number = prod(_extent(self, file)[1])
        return self.payload + CHECKSUM_BYTES if number == 1 else number * self.stride

    def index(self, file: Shape) -> bytes:
        """Return a file's index: `(offset, size)` of each chunk as uint64, then their crc32c."""
        return _index(self, file)

    def file_bytes(self, file: Shape) -> int:
        """Return the size of a file."""
        return self.index_offset(file) + 16 * prod(self.per_file) + CHECKSUM_BYTES


# The results below are kept, as a model's arrays are of few kinds, and most have one file.


@lru_cache(4096)
def _extent(grid: FileGrid, file: Shape) -> tuple[Shape, Shape]:
    """Return the index of a file's first chunk, and the number of its chunks along each dim."""
    first = tuple(f * n for f, n in zip(file, grid.per_file, strict=True))
    there = tuple(min(n, c - a) for n, c, a in zip(grid.per_file, grid.counts, first, strict=True))
    return first, there


@lru_cache(64)
def _index(grid: FileGrid, file: Shape) -> bytes:
    """Return `grid.index(file)`."""
    there = _extent(grid, file)[1]
    table = np.full((*grid.per_file, 2), _ABSENT, "<u8")
    inside = table[tuple(slice(n) for n in there) or ...]
    inside[..., 0] = (np.arange(prod(there), dtype="<u8") * grid.stride).reshape(there)
    inside[..., 1] = grid.payload + CHECKSUM_BYTES
    data = table.tobytes()
    return data + crc32c(data).to_bytes(CHECKSUM_BYTES, "little")


@lru_cache(4096)
def file_grid(shape: Shape, chunk_shape: Shape, file_shape: Shape, itemsize: int) -> FileGrid:
    """Return the one `FileGrid` of these."""
    return FileGrid(shape, chunk_shape, file_shape, itemsize)
