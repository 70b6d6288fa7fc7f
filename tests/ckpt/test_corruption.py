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
from ckpt_helpers import cut, layout_of, random_array, run_ranks, same, save_arrays, targets_of
from ckpt_saved import CountingStore
from crc32c import crc32c

from ckpt import Box, CheckpointError, Solo, load, open_checkpoint
from ckpt.read import pieces

W, M, N, S, BIG = ("w", "fp32"), ("w", "exp_avg"), ("a/b", "fp32"), ("count", "value"), ("big", "fp32")
BLOCK = 1 << 14
PARTS = {W: (256, 512), M: (5, 3), N: (6,), S: (), BIG: (6, BLOCK // 4)}


def arrays_of(seed: int) -> dict[tuple[str, str], np.ndarray]:
    """Make arrays of two chunks in place, gathered ones, a scalar, and a chunk whose rows are blocks."""
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
    save_arrays(folder, "others", OTHERS, BOXES)
    save_arrays(folder, "numbers-1", ARRAYS, BOXES)
    yield folder
    shutil.rmtree(folder)


def objects(run: Path) -> list[Path]:
    return [run / "latest", *sorted(p for p in (run / "numbers-1").rglob("*") if p.is_file())]


def never_read(path: Path) -> bool:
    """Return whether only other readers read this document; ours uses the consolidated one."""
    return path.name == "zarr.json" and "atoms" in path.parts


@contextmanager
def changed(*changes: tuple[Path, bytes | None]) -> Iterator[None]:
    """Change the content of files, or remove them (None), for a while."""
    before = [(path, path.read_bytes()) for path, _ in changes]
    for path, content in changes:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    yield
    for path, content in before:
        path.write_bytes(content)


def read_everything(run: Path) -> str | None:
    """Return the error's text, or None if all numbers were read and are right."""
    try:
        checkpoint = open_checkpoint(run)
        found = {tuple(key): checkpoint.read(*key) for key in checkpoint.arrays}
    except CheckpointError as error:
        return str(error)
    assert found.keys() == ARRAYS.keys()
    assert all(same(found[key], expected) for key, expected in ARRAYS.items()), "wrong numbers"
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
    assert sum(never_read(path) for path in objects(run)) == 10
    assert len(objects(run)) == 3 + 10 + 6


def test_flipped_bytes(run):
    rng = np.random.default_rng(0)
    for path in objects(run):
        data = path.read_bytes()
        places = {0, len(data) - 1, len(data) // 2, *map(int, rng.integers(0, len(data), 4))}
        for place in places:
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(0, 8))
            crc = path.name.startswith("c") and place >= len(data) - 4  # zarr's, that other readers verify
            with changed((path, bytes(damaged))):
                found = check(run, path, harmless=crc or (path.name == "latest" and place == len(data) - 1))
                assert not (found and crc)


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
        for rest in {0, 1, len(data) // 2, len(data) - 5, len(data) - 1}:
            with changed((path, data[:rest])):
                whole = rest >= len(data) - 4 if chunk else path.name == "latest" and rest == len(data) - 1
                check(run, path, harmless=whole)
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
            assert (error is not None) == (path.name[0] in "cm"), path
            assert error is None or "numbers-1" in error


def test_no_more_than_a_box_s_blocks_is_read(run):
    specs = layout_of(ARRAYS, {BIG: [Box((2, 8), (1, PARTS[BIG][1] - 8))]})[0]
    report = load(open_checkpoint(run), targets_of(specs), comm=Solo(), strict=False)
    assert report.bytes_read == BLOCK


def test_a_box_of_sound_blocks_is_read_from_a_damaged_chunk(run):
    path = run / "numbers-1" / "atoms" / "big" / "fp32" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[4 * BLOCK + 5] ^= 4
    rows = lambda first, count: Box((first, 0), (count, PARTS[BIG][1]))  # noqa: E731
    with changed((path, bytes(data))):
        checkpoint = open_checkpoint(run)
        assert same(checkpoint.read(*BIG, rows(0, 4)), ARRAYS[BIG][:4])
        assert same(checkpoint.read(*BIG, rows(5, 1)), ARRAYS[BIG][5:])
        for box in (rows(3, 2), rows(4, 2), Box((4, 100), (1, 1)), Box((3, 7), (2, 5))):
            with pytest.raises(CheckpointError, match=r"big/fp32 chunk c\.0\.0.*block 4\)"):
                checkpoint.read(*BIG, box)


def load_on_two_ranks(run: Path) -> list[object]:
    layout = layout_of(ARRAYS, BOXES)
    checkpoint = open_checkpoint(run)
    return run_ranks(2, lambda comm: load(checkpoint, targets_of(layout[comm.rank]), comm=comm))


def test_a_load_that_one_rank_cannot_finish_fails_on_all(run, monkeypatch):
    path = run / "numbers-1" / "atoms" / "w" / "fp32" / "c.1.0"
    with changed((path, path.read_bytes()[:100])):
        errors = load_on_two_ranks(run)
    assert {str(e) for e in errors} == {
        f"w/fp32 chunk c.1.0: {path} is cut short at 100 bytes; use another tag (rank 1)"
    }

    def read_into(fd, buffer, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("ckpt.stores.files.read_into", read_into)
    errors = load_on_two_ranks(run)
    assert all(isinstance(e, CheckpointError) for e in errors), errors
    assert len({str(e) for e in errors}) == 1
    assert re.match(r".+/.+ chunk c\S*: .* can't be read \(Input/output error\)", str(errors[0]))

    def run_out(*args):
        raise MemoryError("no more")

    monkeypatch.setattr(importlib.import_module("ckpt.load"), "pieces", run_out)
    assert [str(e) for e in load_on_two_ranks(run)] == ["MemoryError: no more (rank 0)"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "has format version 3, expected 2; read it with the release that wrote it"),
        ({"version": 1}, "has format version 1, expected 2"),
        ({"version": None}, "has format version None"),
        ({"format": "other"}, "has format 'other', expected 'uni3d'"),
        ({"chunks": "left out", "tag": "left out"}, "has no 'tag' and no 'chunks'"),
        ({"chunks": {}}, "no record of .*/.* chunk c"),
    ],
    ids=["newer", "older", "no-version", "other-format", "no-keys", "no-chunks"],
)
def test_sound_manifests_that_cannot_be_followed(run, change, message):
    path = run / "numbers-1" / "manifest.json"
    manifest = {**json.loads(path.read_bytes()), **change}
    with changed((path, encoded({key: value for key, value in manifest.items() if value != "left out"}))):
        assert re.search(message, read_everything(run))


def test_the_cost_of_a_read_is_the_bytes_that_it_takes(run):
    checkpoint, rng, costs = open_checkpoint(run), np.random.default_rng(1), set()
    checkpoint.store = counting = CountingStore(checkpoint.store)
    for key, expected in ARRAYS.items():
        for _ in range(40):
            ends = [sorted(map(int, rng.choice(n + 1, 2, replace=False))) for n in expected.shape]
            if rng.integers(0, 2) and len(ends) == 2:
                ends[1] = [0, expected.shape[1]]  # whole rows are one stretch of bytes
            box = Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
            told = sum(checkpoint.cost(piece) for piece in pieces(checkpoint.info(*key), box))
            assert counting.read_bytes == 0, "nothing was read to tell it"
            assert same(checkpoint.read(*key, box), expected[box.slices]), (key, box)
            assert told == counting.read_bytes, (key, box)
            costs.add(told)
            counting.read_bytes = 0
    assert len(costs) > 10
