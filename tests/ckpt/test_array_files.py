"""Places of chunks in files: apart from each other, as zarr finds them, and all of the file."""

import json
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from ckpt_helpers import tensorstore_read, zarr_read
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.array_files import PAGE, FileGrid, file_grid
from ckpt.box import grid
from ckpt.checksums import crc32c
from ckpt.format import array_document, array_path, file_name

ABSENT = 2**64 - 1


@st.composite
def grids(draw: st.DrawFn, longest: int = 9) -> FileGrid:
    """Draw an array of up to three dims, of which files often reach beyond the end by whole chunks."""
    shape = tuple(draw(st.lists(st.integers(0, longest), max_size=3)))
    chunk = tuple(draw(st.integers(1, 4)) for _ in shape)
    file = tuple(draw(st.integers(1, 4)) * c for c in chunk)
    return file_grid(shape, chunk, file, draw(st.sampled_from([1, 2, 4, 8])))


@st.composite
def large_grids(draw: st.DrawFn) -> FileGrid:
    """Draw chunks of up to a few pages, of any number of bytes."""
    chunk = (draw(st.integers(1, 3)), draw(st.integers(1, 3 * PAGE)))
    number = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    shape = tuple(draw(st.integers(1, 2 * c * n)) for c, n in zip(chunk, number, strict=True))
    file = tuple(c * n for c, n in zip(chunk, number, strict=True))
    return file_grid(shape, chunk, file, draw(st.sampled_from([1, 2, 4, 8])))


def index_of(cut: FileGrid, file: tuple[int, ...]) -> np.ndarray:
    """Return the table of a file's index, after verifying its checksum."""
    data = cut.index(file)
    assert crc32c(data[:-4]).to_bytes(4, "little") == data[-4:]
    return np.frombuffer(data[:-4], "<u8").reshape(*cut.per_file, 2)


@settings(deadline=None)
@given(st.one_of(grids(), large_grids()))
def test_chunks_are_apart_and_in_order(cut):
    """No two lie on one page, whoever writes them, and the index is behind them."""
    for file, _ in cut.files():
        chunks = cut.chunks(file)
        assert chunks == sorted(chunks)
        places = [cut.place(index) for index in chunks]
        assert {name for name, _ in places} == {file}
        assert [begin for _, begin in places] == [i * cut.stride for i in range(len(chunks))]
        pages = [{*range(begin // PAGE, (begin + cut.payload + 3) // PAGE + 1)} for _, begin in places]
        assert sum(map(len, pages)) == len(set().union(*pages)), "no page is in two chunks"
        end = places[-1][1] + cut.payload + 4
        assert end <= cut.index_offset(file) < end + PAGE
        assert (cut.index_offset(file) == end) or len(chunks) > 1, "a file of one chunk has no gap"


@settings(deadline=None)
@given(st.one_of(grids(), large_grids()))
def test_every_chunk_is_in_one_file(cut):
    regular = [index for index, _ in grid(cut.shape, cut.chunk_shape)]
    files = {file: cut.chunks(file) for file, _ in cut.files()}
    assert sorted(index for chunks in files.values() for index in chunks) == regular
    assert [cut.number(index) for index in regular] == [*range(len(regular))]
    assert len(regular) == prod(cut.counts)
    boxes = dict(grid(cut.shape, cut.chunk_shape))
    for file, box in cut.files():
        assert all(boxes[index].within(box) for index in files[file])
        for index in files[file]:
            assert [f for f, _ in cut.files(boxes[index])] == [file]


@settings(deadline=None)
@given(st.one_of(grids(), large_grids()))
def test_the_index_names_every_chunk_of_the_file_and_no_other(cut):
    for file, _ in cut.files():
        table, there = index_of(cut, file), {*cut.chunks(file)}
        for inner in np.ndindex(*cut.per_file):
            index = tuple(f * n + i for f, n, i in zip(file, cut.per_file, inner, strict=True))
            if index in there:
                assert table[inner].tolist() == [cut.place(index)[1], cut.payload + 4]
            else:
                assert table[inner].tolist() == [ABSENT, ABSENT]
                assert any(i >= n for i, n in zip(index, cut.counts, strict=True)), "beyond the array's end"
        assert cut.file_bytes(file) == cut.index_offset(file) + len(cut.index(file))


def written(cut: FileGrid, array: np.ndarray, folder: Path) -> None:
    """Write an array by hand, each chunk in its place."""
    path = folder / array_path("w", "fp32")
    path.mkdir(parents=True)
    (path / "zarr.json").write_text(json.dumps(array_document(str(array.dtype), cut)))
    boxes = dict(grid(cut.shape, cut.chunk_shape))
    for file, _ in cut.files():
        with (path / file_name(file)).open("wb") as out:
            for index in cut.chunks(file):
                chunk = np.zeros(cut.chunk_shape, array.dtype)
                part = array[boxes[index].slices]
                chunk[tuple(slice(n) for n in part.shape)] = part
                out.seek(cut.place(index)[1])
                out.write(chunk.tobytes() + crc32c(chunk.tobytes()).to_bytes(4, "little"))
            out.seek(cut.index_offset(file))
            out.write(cut.index(file))
            assert out.tell() == cut.file_bytes(file)


@settings(deadline=None, max_examples=60)
@given(grids())
def test_zarr_s_readers_find_every_chunk(cut):
    dtype = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}[cut.itemsize]
    array = np.arange(1, prod(cut.shape) + 1, dtype=dtype).reshape(cut.shape)
    with TemporaryDirectory() as name:
        written(cut, array, Path(name))
        for read in (zarr_read, tensorstore_read):
            assert np.array_equal(read(Path(name), ("w", "fp32")), array)


@pytest.mark.parametrize(
    ("shape", "chunk", "file", "offsets", "sizes"),
    [
        ((), (), (), {(): 0}, {(): 4 + 4 + 20}),  # a scalar
        ((1022,), (1022,), (1022,), {(0,): 0}, {(0,): 4088 + 4 + 20}),  # one chunk: no gap before the index
        ((2046,), (1023,), (2046,), {(0,): 0, (1,): 4096}, {(0,): 2 * 4096 + 36}),  # exactly a page each
        ((2048,), (1024,), (2048,), {(0,): 0, (1,): 8192}, {(0,): 2 * 8192 + 36}),  # with its checksum more
        # The last file has one chunk of four, and its index is right behind it.
        ((3, 3), (1, 1), (2, 2), {(0, 1): 4096, (1, 0): 8192, (2, 2): 0}, {(0, 0): 16452, (1, 1): 8 + 68}),
        # Two of four, one below the other, which lie in turn.
        ((3, 3), (1, 1), (2, 2), {(0, 2): 0, (1, 2): 4096}, {(0, 1): 8192 + 68, (1, 0): 8192 + 68}),
    ],
    ids=str,
)
def test_places_by_hand(shape, chunk, file, offsets, sizes):
    cut = FileGrid(shape, chunk, file, 4)
    assert {index: cut.place(index)[1] for index in offsets} == offsets
    assert {name: cut.file_bytes(name) for name in sizes} == sizes


def test_an_array_without_elements_has_no_files():
    cut = FileGrid((0, 5), (1, 5), (1, 5), 4)
    assert ([*cut.files()], prod(cut.counts)) == ([], 0)
