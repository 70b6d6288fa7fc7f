"""Checksums against their definition, at the end of a chunk and in a part of the manifest."""

import base64
import json
import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.array_files import FileGrid
from ckpt.checksums import Summing, crc32c
from ckpt.parts import ArrayInfo, decode_part, encode_part
from ckpt.shards import ArrayKey

WINDOW = 256 << 10
"""Bytes that are summed at a time."""

PAYLOADS = st.builds(
    lambda size, seed: np.random.default_rng(seed).bytes(size),
    st.one_of(st.integers(1, 200), st.integers(WINDOW - 9, WINDOW + 9), st.just(1_000_001)),
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


def test_check_value_of_the_algorithm():
    assert crc32c(b"123456789") == 0xE3069283  # the catalogue's, for CRC-32/ISCSI


@given(st.binary(max_size=64))
def test_checksum_is_the_definition_s(data):
    assert crc32c(data) == by_the_definition(data)


@settings(deadline=None, max_examples=60)
@given(PAYLOADS)
def test_a_chunk_ends_with_its_checksum_as_zarr_wants_it(data):
    summing = Summing(memoryview(data))
    parts = [bytes(part) for part in summing.parts()]
    assert b"".join(parts) == data + struct.pack("<I", crc32c(data))
    assert summing.sum == crc32c(data)
    assert max(map(len, parts)) <= WINDOW, "few enough bytes to be still in the cache when they are written"


def test_a_chunk_that_is_summed_twice_has_the_same_sum():
    """This happens when a chunk that might have been linked turns out to have changed."""
    summing = Summing(memoryview(bytes(range(256)) * 3000))
    first = [bytes(part) for part in summing.parts()], summing.sum
    next(summing.parts())
    assert ([bytes(part) for part in summing.parts()], summing.sum) == first


GRIDS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3)), max_size=3)


@given(GRIDS, st.data())
def test_a_part_has_the_checksum_of_each_chunk(dims, draw):
    shape, chunk = (tuple(dim[i] for dim in dims) for i in (0, 1))
    grid = FileGrid(shape, chunk, tuple(c * n for _, c, n in dims), 4)
    count = int(np.prod([-(-n // c) for n, c in zip(shape, chunk, strict=True)], dtype=int))
    sums = draw.draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count))
    key = ArrayKey("w", "fp32")
    part = encode_part([ArrayInfo(key, "float32", grid, np.array(sums, np.uint32))])
    record = json.loads(part)["w"]["fp32"]
    assert record == {
        "dtype": "float32",
        "shape": [*shape],
        "chunk_shape": [*chunk],
        "file_shape": [*grid.file_shape],
        "crc32c": base64.b64encode(struct.pack(f"<{count}I", *sums)).decode(),
    }
    (info,) = decode_part(part, "the part", {"w": ["fp32"]}).values()
    assert (info.key, info.dtype, info.grid, info.sums.tolist()) == (key, "float32", grid, sums)
