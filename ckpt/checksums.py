"""What the manifest keeps of a chunk, so that a part of it can be verified: checksums by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ckpt.checksum import Buffer, block_bytes, crc32c, hexadecimal
from ckpt.format import Json


@dataclass(frozen=True, slots=True)
class Blocks:
    """The checksums of one chunk's blocks.

    In version 2 of the format they run on: the one of a block is the chunk's up to its end. In version 1
    each is of its block alone.
    """

    size: int
    """Of a block, in bytes; the last one may be shorter."""
    sums: str
    """Eight hexadecimal digits of each."""
    run_on: bool = True

    @classmethod
    def of_record(cls, record: Json, version_1_block: int | None) -> Blocks:
        """Those that a manifest's record of a chunk holds."""
        if version_1_block is not None:
            sums = record["blocks"] if "blocks" in record else [record["crc32c"]]
            return cls(version_1_block, "".join(sums), run_on=False)
        if "running" in record:
            return cls(record["block"], record["running"])
        return cls(record["size"], record["crc32c"])

    def first_damaged(self, data: memoryview, first: int) -> int | None:
        """Index of the first block that isn't what was saved; `data` begins with block `first`."""
        count = -(-len(data) // self.size)
        if self.run_on and crc32c(data, self._before(first)) == self.sum(first + count - 1):
            return None  # all at once; block by block only to tell which one
        for i, begin in enumerate(range(0, len(data), self.size), start=first):
            if crc32c(data[begin : begin + self.size], self._before(i)) != self.sum(i):
                return i
        return None

    @property
    def count(self) -> int:
        return len(self.sums) // 8

    def _before(self, i: int) -> int:
        return self.sum(i - 1) if self.run_on and i else 0

    def sum(self, i: int) -> int:
        return int(self.sums[8 * i : 8 * i + 8], 16)


class Summing:
    """Sums a chunk block by block, while it is written."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.block = block_bytes(len(data))
        self.sums: list[int] = []

    def blocks(self) -> Iterator[Buffer]:
        """The chunk's blocks, each summed just before it is given, while it is in the processor's cache;
        then the checksum of all, as it stands in the file."""
        checksum = 0
        self.sums.clear()
        for begin in range(0, len(self._data), self.block):
            block = self._data[begin : begin + self.block]
            checksum = crc32c(block, checksum)
            self.sums.append(checksum)
            yield block
        yield checksum.to_bytes(4, "little")

    def record(self) -> Json:
        """For the manifest, when all blocks have been summed."""
        record: Json = {"size": len(self._data) + 4, "crc32c": hexadecimal(self.sums[-1])}
        if len(self.sums) > 1:
            record["block"] = self.block
            record["running"] = "".join(map(hexadecimal, self.sums))
        return record
