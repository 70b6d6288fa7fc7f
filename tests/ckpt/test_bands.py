"""Bands of arrays: how they are cut, and that none is left out."""

import numpy as np
import pytest

from ckpt import ArrayKey
from ckpt.array_files import file_grid
from ckpt.bands import bands
from ckpt.parts import ArrayInfo


@pytest.mark.parametrize(
    ("dtype", "shape", "chunk", "most", "expected"),
    [
        ("float32", (8, 16), (1, 16), 64, (1, 16)),  # a row has just the bytes
        ("float32", (8, 16), (2, 16), 64, (2, 16)),  # rather too many bytes than half a chunk
        ("float32", (8, 16), (2, 16), 300, (4, 16)),  # 4.7 rows, but whole chunks
        ("float32", (9, 16), (2, 16), 300, (4, 16)),  # 4, 4 and 1
        ("float32", (8, 16), (3, 16), 1000, (8, 16)),  # all at once
        ("float32", (2, 3, 100), (1, 1, 10), 200, (1, 1, 50)),  # a row is too much
        ("float32", (2, 3, 100), (1, 1, 100), 200, (1, 1, 100)),  # but is one chunk
        ("float32", (2, 6, 5), (1, 1, 5), 50, (1, 2, 5)),  # two rows fit
        ("float32", (4, 6, 5), (1, 6, 5), 240, (2, 6, 5)),  # two of the first dim
        ("uint8", (100,), (1,), 10, (10,)),
        ("float64", (100,), (1,), 80, (10,)),
        ("float32", (), (), 4, ()),
    ],
    ids=str,
)
def test_bands_are_whole_chunks_of_about_the_bytes_wanted(monkeypatch, dtype, shape, chunk, most, expected):
    monkeypatch.setattr("ckpt.bands.BAND_BYTES", most)
    grid = file_grid(shape, chunk, tuple(-(-n // c) * c for n, c in zip(shape, chunk, strict=True)), 4)
    found = list(bands(ArrayInfo(ArrayKey("w", "fp32"), dtype, grid, np.empty(0, np.uint32))))
    assert found[0].shape == expected
    assert all(n <= m for box in found for n, m in zip(box.shape, expected, strict=True))
    elements = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    read = [i for box in found for i in elements[box.slices].ravel().tolist()]
    assert read == [*range(elements.size)], "each once, in C order"
    assert all(np.ptp(elements[box.slices]) == box.size - 1 for box in found), "contiguous"
