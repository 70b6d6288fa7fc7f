"""What is told of files and of reads, with nothing read, is what is there and what reading takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import cut, random_array, save_arrays
from ckpt_saved import Saved, make_version_1

import ckpt
from ckpt.read import pieces

BIG, SMALL, NUMBER = ("big", "fp32"), ("a/small", "exp_avg"), ("count", "value")
SHAPE = (1200, 512)


@pytest.fixture(scope="module", params=["file", "memory", "version-1"])
def saved(request: pytest.FixtureRequest, memory_path: Path) -> Saved:
    """A matrix in four chunks of several blocks, a vector, a number."""
    rng = np.random.default_rng(0)
    arrays = {BIG: random_array(rng, "float32", SHAPE), SMALL: random_array(rng, "float64", (9,))}
    arrays[NUMBER] = np.array(3)
    boxes = {BIG: cut(SHAPE, (4, 1)), SMALL: cut((9,), (4,)), NUMBER: [ckpt.Box.whole(())] * 4}
    on_disk = f"{memory_path}/presence-{request.param}"
    made = Saved("memory://presence" if request.param == "memory" else on_disk)
    save_arrays(made.run, "t1", arrays, boxes)
    if request.param == "version-1":
        make_version_1(made)
    return made


def absent(saved: Saved) -> list[ckpt.Problem]:
    return ckpt.absent(ckpt.open_checkpoint(saved.run))


def test_where_all_is_there_nothing_is_told(saved: Saved) -> None:
    assert len(saved.chunks) == 4 + 1 + 1
    assert absent(saved) == []


def test_what_is_missing_or_of_another_size_is_named(saved: Saved) -> None:
    chunk, other, document = "atoms/big/fp32/c.1.0", saved.chunks[0], "atoms/count/zarr.json"
    size = len(saved.get(other))
    with saved.changed((chunk, None), (other, saved.get(other)[:-1]), (document, None)):
        found = {str(problem) for problem in absent(saved)}
    cut_short = saved.found(other, f"has {size - 1} bytes instead of {size}")
    if "a%2Fsmall" in other:
        cut_short = ckpt.Problem(
            atom="a/small", state="exp_avg", chunk=cut_short.chunk, path=cut_short.path, what=cut_short.what
        )
    missing = {str(saved.found(path, "is missing")) for path in (chunk, document)}
    assert found == {str(cut_short), *missing}


def test_a_changed_byte_is_not_seen(saved: Saved) -> None:
    path = "atoms/big/fp32/c.1.0"
    with saved.changed((path, b"x" * len(saved.get(path)))):
        assert absent(saved) == []


def test_a_chunk_without_a_record_is_named(saved: Saved) -> None:
    with saved.with_manifest(lambda manifest: manifest["chunks"]["atoms/big/fp32"].pop("c.2.0")):
        (problem,) = absent(saved)
    assert (problem.atom, problem.state, problem.chunk) == ("big", "fp32", "c.2.0")
    assert problem.path.endswith("manifest.json")


class Counting:
    """A store that adds up what is read."""

    def __init__(self, store: Any) -> None:
        self._store, self.read_bytes = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        self.read_bytes += buffer.nbytes
        return int(self._store.read_into(path, buffer, offset))


def test_what_a_read_costs_is_what_the_store_gives(saved: Saved) -> None:
    checkpoint = ckpt.open_checkpoint(saved.run)
    counting: Any = Counting(checkpoint.store)
    checkpoint.store = counting
    rng = np.random.default_rng(1)
    costs = set()
    for key in (BIG, SMALL, NUMBER):
        info = checkpoint.info(*key)
        for _ in range(40):
            begin = [int(rng.integers(0, n)) for n in info.shape]
            whole_rows = bool(rng.integers(0, 2))
            if whole_rows and len(begin) == 2:
                begin[1] = 0
            ends = [int(rng.integers(b + 1, n + 1)) for b, n in zip(begin, info.shape, strict=True)]
            if whole_rows and len(begin) == 2:
                ends[1] = info.shape[1]
            box = ckpt.Box(tuple(begin), tuple(e - b for b, e in zip(begin, ends, strict=True)))
            told = sum(checkpoint.cost(piece) for piece in pieces(info, box))
            assert counting.read_bytes == 0, "nothing was read for it"
            checkpoint.read(*key, box)
            assert told == counting.read_bytes, (key, box)
            costs.add(told)
            counting.read_bytes = 0
    assert len(costs) > 10
