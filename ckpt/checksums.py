"""crc32c of buffers and of chunks.

A chunk in a file ends with its crc32c, as zarr's codec wants it. The manifest has the same number, so that a
reader can tell a chunk of another save from the right one.
"""

from __future__ import annotations

from collections.abc import Iterator

import crc32c as _crc32c

Buffer = bytes | memoryview

CHECKSUM_BYTES = 4
"""Size of the checksum at the end of a chunk."""
_WINDOW = 256 << 10
"""Bytes to sum before they are written: few enough to stay in the processor's cache until then."""


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the checksum of `data`, continuing from the checksum `value` of the bytes before it."""
    return int(_crc32c.crc32c(data, value))


def hexadecimal(checksum: int) -> str:
    """Return the checksum as the manifest stores it, as eight hexadecimal digits."""
    return f"{checksum:08x}"


class Summing:
    """Sums a chunk while it is written.

    Attributes:
        sum: the checksum, once `parts` is exhausted.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.sum = 0

    def parts(self) -> Iterator[Buffer]:
        """Yield the chunk in parts, each just after it was summed, then the checksum as the file has it."""
        self.sum = 0
        for begin in range(0, len(self._data), _WINDOW):
            part = self._data[begin : begin + _WINDOW]
            self.sum = crc32c(part, self.sum)
            yield part
        yield self.sum.to_bytes(CHECKSUM_BYTES, "little")
