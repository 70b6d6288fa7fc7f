"""Checksums against their definition, and the manifest's records of a chunk's blocks."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.checksums import BLOCKS, SMALLEST_BLOCK, Blocks, Summing, block_bytes, crc32c

PAYLOADS = st.builds(
    lambda size, seed: np.random.default_rng(seed).bytes(size),
    st.one_of(st.integers(1, 200), st.integers(SMALLEST_BLOCK - 9, 3 * SMALLEST_BLOCK), st.just(1_000_001)),
    st.integers(0, 2**32 - 1),
)


def by_the_definition(data: bytes) -> int:
    """Compute crc32c bit by bit: Castagnoli's polynomial, reflected, all ones before and after."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def summed(data: bytes) -> tuple[dict, bytes]:
    """Return the record of a chunk, and its file."""
    summing = Summing(memoryview(data))
    file = b"".join(summing.blocks())
    return summing.record(), file


def test_check_value_of_the_algorithm():
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's, for CRC-32/ISCSI


@given(st.binary(max_size=64))
def test_checksum_is_the_definition_s(data):
    assert crc32c(data) == by_the_definition(data)


@given(st.integers(1, 1 << 34))
def test_blocks_are_few_and_neither_tiny_nor_out_of_step_with_the_elements(size):
    block = block_bytes(size)
    assert -(-size // block) <= BLOCKS, "each costs 8 digits in the manifest"
    assert block >= min(size, SMALLEST_BLOCK), "and a call"
    assert block >= size or block % 8 == 0, "begins with a whole element"
    assert block <= max(SMALLEST_BLOCK, size / BLOCKS + 8), "no larger than it need be"


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_equal_parts_of_a_chunk_are_whole_blocks(parts):
    size = 48 * 8 * 4321
    assert size // parts % block_bytes(size) == 0


@settings(deadline=None, max_examples=60)
@given(PAYLOADS)
def test_the_record_of_a_chunk_is_what_the_format_says(data):
    record, file = summed(data)
    assert file == data + struct.pack("<I", crc32c(data)), "zarr's codec: the elements, then their checksum"
    assert record["size"] == len(file)
    assert record["crc32c"] == f"{crc32c(data):08x}"
    if len(data) <= SMALLEST_BLOCK:
        assert record.keys() == {"size", "crc32c"}
        return
    ends = range(record["block"], len(data) + record["block"], record["block"])
    assert record["running"] == "".join(f"{crc32c(data[:end]):08x}" for end in ends)
    assert record["running"].endswith(record["crc32c"])


def test_a_chunk_that_is_summed_twice_has_the_same_record():
    """This happens when a chunk that might have been linked turns out to have changed."""
    summing = Summing(memoryview(bytes(range(256)) * 300))
    first = b"".join(summing.blocks()), summing.record()
    assert (b"".join(summing.blocks()), summing.record()) == first


def record_with_blocks(data: bytes, block: int) -> dict:
    """Return the record of a chunk with blocks of any size, as another writer may make them."""
    sums = [f"{crc32c(data[: i + block]):08x}" for i in range(0, len(data), block)]
    record = {"size": len(data) + 4, "crc32c": f"{crc32c(data):08x}"}
    return record | ({"block": block, "running": "".join(sums)} if len(sums) > 1 else {})


@settings(deadline=None, max_examples=100)
@given(PAYLOADS, st.sampled_from([None, 1 << 10, 1 << 14, 1 << 22]), st.data())
def test_any_range_of_blocks_is_verified_by_itself(data, block, draw):
    blocks = Blocks.of_record(record_with_blocks(data, block) if block else summed(data)[0])
    count = -(-len(data) // blocks.size)
    first = draw.draw(st.integers(0, count - 1))
    last = draw.draw(st.integers(first, min(count - 1, first + 9)))
    part = bytearray(data[first * blocks.size : (last + 1) * blocks.size])
    assert blocks.first_damaged(memoryview(part), first) is None
    place = draw.draw(st.integers(0, len(part) - 1))
    part[place] ^= 1 << draw.draw(st.integers(0, 7))
    assert blocks.first_damaged(memoryview(part), first) == first + place // blocks.size


def test_the_first_of_several_damaged_blocks_is_named():
    data = np.random.default_rng(0).bytes(5 * SMALLEST_BLOCK)
    damaged = bytearray(data)
    for block in (1, 3, 4):
        damaged[block * SMALLEST_BLOCK + 7] ^= 1
    blocks = Blocks.of_record(summed(data)[0])
    assert blocks.first_damaged(memoryview(damaged), 0) == 1
    assert blocks.first_damaged(memoryview(damaged)[2 * SMALLEST_BLOCK :], 2) == 3
