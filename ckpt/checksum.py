"""crc32c of buffers, as a whole and by block.

A chunk's file ends with the crc32c of the whole chunk, as zarr's codec wants it. The manifest also keeps the
checksum as it stands after each block: going on from there over the next block must give the next one, so a
reader that wants a part of a chunk can verify that part, and the last one is the whole chunk's. Each byte is
summed once.
"""

from __future__ import annotations

import crc32c as _crc32c

Buffer = bytes | memoryview

BLOCKS = 48
"""Of a chunk: halves, thirds, ... of a chunk are then whole blocks, and little is read beside them."""
SMALLEST_BLOCK = 16 << 10


def crc32c(data: Buffer, value: int = 0) -> int:
    """Checksum of `data`, going on from `value`."""
    return int(_crc32c.crc32c(data, value))


def block_bytes(chunk_bytes: int) -> int:
    """Size of the blocks of a chunk; a multiple of 8, so of every element's size."""
    if chunk_bytes <= SMALLEST_BLOCK:
        return max(chunk_bytes, 8)
    return max(SMALLEST_BLOCK, -(-chunk_bytes // (BLOCKS * 8)) * 8)


def hexadecimal(checksum: int) -> str:
    """As the manifest has it."""
    return f"{checksum:08x}"
