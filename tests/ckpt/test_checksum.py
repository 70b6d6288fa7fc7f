"""Checksums: the library's against the definition, and the whole's from its blocks'."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.checksum import BLOCK_BYTES, block_checksums, combine, crc32c


def by_the_definition(data: bytes) -> int:
    """crc32c bit by bit: Castagnoli's polynomial, reflected, all ones before and after."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def test_check_value_of_the_algorithm():
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's, for CRC-32/ISCSI


@given(st.binary(max_size=64))
def test_checksum_is_the_definition_s(data):
    assert crc32c(data) == by_the_definition(data)


@given(st.binary(max_size=300), st.integers(1, 400))
def test_whole_follows_from_blocks_of_any_size(data, block):
    blocks = block_checksums(data, block)
    assert blocks == [crc32c(data[i : i + block]) for i in range(0, max(len(data), 1), block)]
    assert combine(blocks, len(data), block) == crc32c(data)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 3), st.integers(-2, 2), st.integers(0, 2**32 - 1))
def test_whole_follows_from_blocks_of_the_real_size(blocks, more, seed):
    size = max(blocks * BLOCK_BYTES + more, 0)
    data = np.random.default_rng(seed).bytes(size)
    assert combine(block_checksums(data), size) == crc32c(data)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_going_on_from_a_value(head, tail):
    assert crc32c(tail, crc32c(head)) == crc32c(head + tail)


def test_views_of_any_type_are_summed_as_their_bytes():
    numbers = np.arange(1000, dtype=np.float64)
    assert block_checksums(numbers.data, 64) == block_checksums(numbers.tobytes(), 64)
