"""crc32c of buffers, of whole chunks and of their blocks.

A chunk's file ends with the crc32c of the whole chunk, as zarr's codec wants it. The manifest also keeps the
running checksum after each block. Continuing from the checksum before a block over the block's bytes must
give the checksum after it, so a reader that needs a part of a chunk can verify just that part. The last
running checksum is the whole chunk's, so each byte is summed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c as _crc32c

Buffer = bytes | memoryview

CHECKSUM_BYTES = 4
"""Size of the checksum at the end of a chunk's file."""

BLOCKS = 48
"""Most blocks per chunk. A multiple of 2 and 3, so that halves, thirds, ... of a chunk are whole blocks."""
SMALLEST_BLOCK = 16 << 10


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the checksum of `data`, continuing from the checksum `value` of the bytes before it."""
    return int(_crc32c.crc32c(data, value))


def block_bytes(chunk_bytes: int) -> int:
    """Return the block size for a chunk: a multiple of 8, and so of every element's size."""
    if chunk_bytes <= SMALLEST_BLOCK:
        return max(chunk_bytes, 8)
    return max(SMALLEST_BLOCK, -(-chunk_bytes // (BLOCKS * 8)) * 8)


def hexadecimal(checksum: int) -> str:
    """Return the checksum as the manifest stores it, as eight hexadecimal digits."""
    return f"{checksum:08x}"


@dataclass(frozen=True, slots=True)
class Blocks:
    """Running checksums of one chunk: after each block, the checksum of the chunk up to there."""

    size: int
    """Block size in bytes; the last block may be shorter."""
    sums: str
    """Eight hexadecimal digits per block."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Blocks:
        """Parse a manifest's record of a chunk; without `running`, the chunk is one block."""
        if "running" in record:
            return cls(record["block"], record["running"])
        return cls(record["size"], record["crc32c"])

    def first_damaged(self, data: memoryview, first: int) -> int | None:
        """Return the index of the first damaged block in `data`, which begins with block `first`."""
        count = -(-len(data) // self.size)
        if crc32c(data, self._before(first)) == self.sum(first + count - 1):
            return None  # one pass over everything; block by block only to find the damaged one
        for i, begin in enumerate(range(0, len(data), self.size), start=first):
            if crc32c(data[begin : begin + self.size], self._before(i)) != self.sum(i):
                return i
        return None

    @property
    def count(self) -> int:
        return len(self.sums) // 8

    def sum(self, i: int) -> int:
        """Return the checksum of the chunk up to the end of block `i`."""
        return int(self.sums[8 * i : 8 * i + 8], 16)

    def _before(self, i: int) -> int:
        return self.sum(i - 1) if i else 0


class Summing:
    """Sums a chunk block by block while it is written."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.block = block_bytes(len(data))
        self.sums: list[int] = []

    def blocks(self) -> Iterator[Buffer]:
        """Yield the chunk's blocks, then the checksum as it stands at the end of the file.

        Each block is summed just before it is yielded, so that the write that follows finds it in the
        processor's cache.
        """
        checksum = 0
        self.sums.clear()
        for begin in range(0, len(self._data), self.block):
            block = self._data[begin : begin + self.block]
            checksum = crc32c(block, checksum)
            self.sums.append(checksum)
            yield block
        yield checksum.to_bytes(CHECKSUM_BYTES, "little")

    def record(self) -> dict[str, Any]:
        """Return the manifest's record of the chunk, once all blocks have been summed."""
        return chunk_record(len(self._data), self.sums)


def chunk_record(nbytes: int, sums: Sequence[int]) -> dict[str, Any]:
    """Return the manifest's record of a chunk, given the checksum after each of its blocks."""
    record: dict[str, Any] = {"size": nbytes + CHECKSUM_BYTES, "crc32c": hexadecimal(sums[-1])}
    if len(sums) > 1:
        record |= {"block": block_bytes(nbytes), "running": "".join(map(hexadecimal, sums))}
    return record
