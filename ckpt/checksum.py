"""crc32c of buffers, per block and as a whole.

A chunk's file ends with the crc32c of the whole chunk, as zarr's codec wants it. The manifest also keeps
one per block, so that a reader that wants part of a chunk can verify that part. Each byte is summed once:
the whole's checksum follows from the blocks' by combination.
"""

from __future__ import annotations

from functools import lru_cache

import crc32c as _crc32c

from ckpt.files import Buffer

BLOCK_BYTES = 4 << 20
_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bit-reversed


def crc32c(data: Buffer, value: int = 0) -> int:
    """Checksum of `data`, going on from `value`."""
    return int(_crc32c.crc32c(data, value))


def block_checksums(data: Buffer, block: int = BLOCK_BYTES) -> list[int]:
    """Checksum of each block of `data`; of nothing, the one of the empty string."""
    view = memoryview(data).cast("B")
    return [crc32c(view[i : i + block]) for i in range(0, max(len(view), 1), block)]


def combine(checksums: list[int], total: int, block: int = BLOCK_BYTES) -> int:
    """Checksum of `total` bytes from those of their blocks.

    Appending n bytes to a message multiplies its checksum by x^(8n) modulo the polynomial, and adds the
    appended bytes' own (M. Adler's crc32_combine in zlib does the same for another polynomial).
    """
    whole = checksums[0]
    for i, checksum in enumerate(checksums[1:], start=1):
        whole = _multiply(_shift(min(block, total - i * block)), whole) ^ checksum
    return whole


@lru_cache(maxsize=256)
def _shift(n_bytes: int) -> int:
    """x^(8 n_bytes) modulo the polynomial, by repeated squaring."""
    result, square, n = 1 << 31, 1 << 23, n_bytes  # the polynomials 1 and x^8, highest power last
    while n:
        if n & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        n >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """Product of two bit-reversed polynomials modulo the crc's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product
