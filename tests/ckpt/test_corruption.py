"""Damage to any object gives an error that names it, or the right numbers, never wrong ones."""

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import Arrays, cut, layout_of, random_array, run_ranks, same, save_arrays, targets_of
from ckpt_saved import CountingStore
from crc32c import crc32c

from ckpt import Box, CheckpointError, Solo, load, open_checkpoint, verify
from ckpt.read import pieces

W, M, N, S, BIG = ("w", "fp32"), ("w", "exp_avg"), ("a/b", "fp32"), ("count", "value"), ("big", "fp32")
ROW = 1 << 14
PARTS = {W: (256, 512), M: (5, 3), N: (6,), S: (), BIG: (6, ROW // 4)}
PLANNING = {"chunk_bytes": 4 * ROW, "gather_below": ROW}
STRIDE = 4 * ROW + 4096
"""Bytes from one of W's eight chunks to the next."""


def arrays_of(seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Make an array that two ranks write, gathered ones, a scalar, and one of two chunks of three rows."""
    rng = np.random.default_rng(seed)
    return {key: random_array(rng, "float32", shape) for key, shape in PARTS.items()}


ARRAYS, OTHERS = arrays_of(1), arrays_of(2)
BOXES = {W: cut(PARTS[W], (2, 1)), M: cut(PARTS[M], (2, 1)), N: cut(PARTS[N], (2,))}
BOXES |= {S: [Box.whole(())] * 2, BIG: [Box.whole(PARTS[BIG])] * 2}


def encoded(manifest: dict[str, object]) -> bytes:
    """Return a manifest laid out by another writer: any JSON with its checksum on the first line."""
    rest = json.dumps({k: v for k, v in manifest.items() if k != "crc32c"}, indent=1)[2:].encode()
    return b'{"crc32c": "%08x",\n' % crc32c(rest) + rest


@pytest.fixture(scope="module")
def run(memory_path) -> Iterator[Path]:
    """A run with two tags, of which `latest` names the second."""
    folder = memory_path / "corrupt"
    save_arrays(folder, "others", OTHERS, BOXES, planning=PLANNING)
    save_arrays(folder, "numbers-1", ARRAYS, BOXES, planning=PLANNING)
    yield folder
    shutil.rmtree(folder)


def objects(run: Path) -> list[Path]:
    return [run / "latest", *sorted(p for p in (run / "numbers-1").rglob("*") if p.is_file())]


def never_read(path: Path) -> bool:
    """Return whether only zarr's readers read this document."""
    return path.name == "zarr.json"


def read_places(run: Path, path: Path) -> np.ndarray:
    """Return, for each byte of a file with data, whether it is one of an element."""
    places = np.zeros(path.stat().st_size, bool)
    for info in open_checkpoint(run).arrays.values():
        if run / "numbers-1" / info.path == path.parent:
            payload = np.prod(info.grid.chunk_shape, dtype=int) * info.grid.itemsize
            for i in range(len(info.sums)):
                begin = i * -(-(payload + 4) // 4096) * 4096
                places[begin : begin + payload] = True
    return places


@contextmanager
def changed(*changes: tuple[Path, bytes | None]) -> Iterator[None]:
    """Change the content of files, or remove them (None), for a while."""
    before = [(path, path.read_bytes()) for path, _ in changes]
    for path, content in changes:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    try:
        yield
    finally:
        for path, content in before:
            path.write_bytes(content)


def read_everything(run: Path, arrays: Arrays = ARRAYS) -> str | None:
    """Return the error's text, or None if all numbers were read and are right."""
    try:
        checkpoint = open_checkpoint(run)
        found = {tuple(key): checkpoint.read(*key) for key in checkpoint.arrays}
    except CheckpointError as error:
        return str(error)
    assert found.keys() == arrays.keys()
    assert all(same(found[key], expected) for key, expected in arrays.items()), "wrong numbers"
    return None


def check(run: Path, *paths: Path, harmless: bool = False) -> bool:
    """Read everything and return whether that failed: it must unless `harmless`, naming one of `paths`."""
    error = read_everything(run)
    if error is None:
        assert harmless or all(never_read(path) for path in paths), f"damage to {paths} was not noticed"
        return False
    assert any(str(path) in error for path in paths), f"{error!r} does not name {paths}"
    return True


def test_undamaged_all_is_read(run):
    assert read_everything(run) is None
    assert sum(never_read(path) for path in objects(run)) == 11
    assert len(objects(run)) == 3 + 11 + 5
    assert read_places(run, run / "numbers-1" / "atoms/w/fp32/c.0.0").sum() == ARRAYS[W].nbytes


def test_flipped_bytes(run):
    rng = np.random.default_rng(0)
    for path in objects(run):
        data = path.read_bytes()
        read = read_places(run, path) if path.name[0] == "c" else np.full(len(data), not never_read(path))
        read[-1] &= path.name != "latest"  # a newline
        places = {0, len(data) - 1, len(data) // 2, *map(int, rng.integers(0, len(data), 12))}
        for place in places:
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(0, 8))
            with changed((path, bytes(damaged))):
                failed = check(run, path, harmless=not read[place])
                assert failed == read[place] or path.name == "latest"


TINY = {
    ("pair", "fp32"): np.arange(12, dtype=np.float32).reshape(4, 3),
    ("flag", "value"): np.array([True, False, True]),
    ("count", "value"): np.array(7),
}
"""The first is of two chunks, and so has a gap of 4,068 bytes."""


def test_every_byte_of_a_small_checkpoint(memory_path):
    """`verify` names the object, and a read gives an error that names it, or the right numbers."""
    run = memory_path / "tiny"
    save_arrays(run, "t1", TINY, planning={"chunk_bytes": 24, "gather_below": 1}, document={})
    rng = np.random.default_rng(0)
    for path in sorted(p for p in (run / "t1").rglob("*") if p.is_file()):
        data = path.read_bytes()
        step = 7 if never_read(path) else 1
        gap = range(100, 4000)
        for place in (p for p in range(0, len(data), step) if p % 4096 not in gap or p % 101 == 0):
            damaged = data[:place] + bytes([data[place] ^ 1 << int(rng.integers(0, 8))]) + data[place + 1 :]
            with changed((path, damaged)):
                error = read_everything(run, TINY)
                assert error is None or str(path) in error
                try:
                    named = {problem.path for problem in verify(open_checkpoint(run), threads=1)}
                except CheckpointError as error:
                    named = {str(error).split(" ")[0]}
                assert str(path) in named, place


def test_every_byte_of_the_manifest_s_first_line(run):
    path = run / "numbers-1" / "manifest.json"
    data = path.read_bytes()
    for place in range(data.index(b"\n") + 3):
        for bit in range(8):
            with changed((path, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])):
                assert check(run, path)


def test_files_that_are_cut_short_or_grow(run):
    for path in objects(run):
        data = path.read_bytes()
        chunk = path.name.startswith("c")
        needed = np.flatnonzero(read_places(run, path))[-1] + 1 if chunk else len(data)
        needed -= path.name == "latest"  # its newline
        for rest in {0, 1, len(data) // 2, needed - 1, needed, len(data) - 1}:
            with changed((path, data[:rest])):
                check(run, path, harmless=rest >= needed)
        with changed((path, data + b"\0")):
            check(run, path, harmless=chunk)


def test_files_that_are_missing(run):
    for path in objects(run):
        with changed((path, None)):
            if path.name == "manifest.json":
                check(run, run / "latest")  # which names a tag that isn't one any more
            elif path.name == "latest":
                assert f"{run} has no file 'latest'" in str(read_everything(run))
            else:
                check(run, path)


def test_files_that_took_each_other_s_place(run):
    for a, b in combinations(objects(run), 2):
        first, second = a.read_bytes(), b.read_bytes()
        with changed((a, second), (b, first)):
            check(run, a, b, harmless=first == second)


def test_files_of_another_checkpoint(run):
    """They have the same names and sizes and valid checksums, but other numbers."""
    for path in objects(run)[1:]:
        other = (run / "others" / path.relative_to(run / "numbers-1")).read_bytes()
        with changed((path, other)):
            error = read_everything(run)
            assert (error is not None) == (path.name[0] in "cma"), path
            assert error is None or "numbers-1" in error


def test_chunks_that_took_each_other_s_place(run):
    path = run / "numbers-1" / "atoms" / "w" / "fp32" / "c.0.0"
    data = path.read_bytes()
    chunks = [data[i * STRIDE : (i + 1) * STRIDE] for i in range(8)]
    for a, b in combinations(range(8), 2):
        exchanged = [*chunks]
        exchanged[a], exchanged[b] = chunks[b], chunks[a]
        with changed((path, b"".join(exchanged) + data[8 * STRIDE :])):
            check(run, path)


def test_no_more_than_a_box_s_chunks_is_read(run):
    specs = layout_of(ARRAYS, {BIG: [Box((2, 8), (1, PARTS[BIG][1] - 8))]})[0]
    report = load(open_checkpoint(run), targets_of(specs), comm=Solo(), strict=False)
    assert report.bytes_read == 3 * ROW


def test_a_box_of_sound_chunks_is_read_from_a_damaged_file(run):
    path = run / "numbers-1" / "atoms" / "big" / "fp32" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[3 * ROW + 4096 + 5] ^= 4  # in the first row of the second chunk
    rows = lambda first, count: Box((first, 0), (count, PARTS[BIG][1]))  # noqa: E731
    with changed((path, bytes(data))):
        checkpoint = open_checkpoint(run)
        assert same(checkpoint.read(*BIG, rows(0, 3)), ARRAYS[BIG][:3])
        assert same(checkpoint.read(*BIG, Box((1, 7), (2, 5))), ARRAYS[BIG][1:3, 7:12])
        for box in (rows(2, 2), rows(3, 3), Box((5, 100), (1, 1)), Box((2, 7), (2, 5))):
            with pytest.raises(CheckpointError, match=r"big/fp32 chunk \[1, 0\].*is damaged \(checksum\)"):
                checkpoint.read(*BIG, box)


def load_on_two_ranks(run: Path) -> list[object]:
    layout = layout_of(ARRAYS, BOXES)
    checkpoint = open_checkpoint(run)
    return run_ranks(2, lambda comm: load(checkpoint, targets_of(layout[comm.rank]), comm=comm))


def test_a_load_that_one_rank_cannot_finish_fails_on_all(run, monkeypatch):
    path = run / "numbers-1" / "atoms" / "w" / "fp32" / "c.0.0"
    for cut_at, chunk in ((5 * STRIDE + 100, 5), (4 * STRIDE - 1, 4)):  # the second rank's half is from 4 on
        with changed((path, path.read_bytes()[:cut_at])):
            errors = load_on_two_ranks(run)
        (told,) = {str(e) for e in errors}
        what = rf"w/fp32 chunk \[(\d), 0\]: {path} is cut short at {cut_at} bytes; use another tag \(rank 1\)"
        found = re.fullmatch(what, told)
        assert found, told
        assert int(found[1]) >= chunk, "that of the thread that came first"

    part = run / "numbers-1" / "arrays.0.json"
    with changed((part, b"{}")):
        errors = load_on_two_ranks(run)
    damaged = f"{part} is damaged: its checksum isn't the manifest's; use another tag (rank 0)"
    assert [str(e) for e in errors] == [damaged] * 2

    def read_into(fd, buffer, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ckpt.stores.files.read_into", read_into)
    errors = load_on_two_ranks(run)
    assert all(isinstance(e, CheckpointError) for e in errors), errors
    assert len({str(e) for e in errors}) == 1
    assert re.match(r".+/.+ chunk \[.*\]: .* can't be read \(Input/output error\)", str(errors[0]))

    def run_out(*args):
        raise MemoryError("no more")

    monkeypatch.setattr(importlib.import_module("ckpt.load"), "pieces", run_out)
    assert [str(e) for e in load_on_two_ranks(run)] == ["MemoryError: no more (rank 0)"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 2},
            "version 2, expected 'uni3d-checkpoint', version 1; read it with",
        ),
        ({"version": 2, "parts": "left out"}, "read it with the release that wrote it, or a newer one"),
        ({"version": None}, "has format 'uni3d-checkpoint', version None"),
        ({"format": "other"}, "has format 'other', version 1, expected 'uni3d-checkpoint'"),
        ({"format": "uni3d", "version": 2}, r"was written before the format was stable \(version 2\)"),
        ({"parts": "left out", "tag": "left out"}, "has no 'tag' and no 'parts'"),
    ],
    ids=["newer", "newer-form", "no-version", "other-format", "development", "no-keys"],
)
def test_sound_manifests_that_cannot_be_followed(run, change, message):
    path = run / "numbers-1" / "manifest.json"
    manifest = {**json.loads(path.read_bytes()), **change}
    with changed((path, encoded({key: value for key, value in manifest.items() if value != "left out"}))):
        assert re.search(message, read_everything(run))


def test_a_read_takes_the_chunks_that_it_meets_and_no_more(run):
    checkpoint, rng, costs = open_checkpoint(run), np.random.default_rng(1), set()
    checkpoint.store = counting = CountingStore(checkpoint.store)
    for key, expected in ARRAYS.items():
        for _ in range(40):
            ends = [sorted(map(int, rng.choice(n + 1, 2, replace=False))) for n in expected.shape]
            if rng.integers(0, 2) and len(ends) == 2:
                ends[1] = [0, expected.shape[1]]  # whole rows are one stretch of bytes
            box = Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
            info = checkpoint.info(*key)
            told = sum(info.grid.payload for _ in pieces(info, box))
            assert same(checkpoint.read(*key, box), expected[box.slices]), (key, box)
            assert told == counting.read_bytes, (key, box)
            costs.add(told)
            counting.read_bytes = 0
    assert len(costs) > 10
