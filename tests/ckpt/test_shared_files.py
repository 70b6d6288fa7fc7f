"""Files that several ranks write at the same time, each its own chunks in their places."""

import shutil
import threading
from collections import defaultdict
from unittest import mock

import numpy as np
import pytest
from ckpt_helpers import (
    Arrays,
    Ranks,
    all_ranks,
    check_read,
    cut,
    layout_of,
    load_in,
    random_array,
    save_arrays,
    shards_of,
)
from ckpt_layouts import SIZES, layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import Box, CheckpointError, make_plan, open_checkpoint, save
from ckpt.array_files import PAGE
from ckpt.stores import files

KEY = ("w", "fp32")
SMALL = {"chunk_bytes": 1 << 12, "gather_below": 1 << 10}

CUTS = {
    "rows": cut((120, 96), (4, 1)),
    "columns": cut((120, 96), (1, 4)),  # as tensor parallelism cuts: each writes a piece of every stretch
    "both": cut((120, 96), (2, 2)),
    "uneven": cut((126, 96), (4, 1)),  # the last part is smaller, and its last chunk reaches beyond the end
    "uneven-columns": cut((120, 94), (1, 4)),
    "strided": [Box((a, 0), (30, 96)) for a in (0, 60, 30, 90)],  # by tensor, then by ZeRO
    "copies": [Box.whole((120, 96))] * 3,
    "rows-and-copies": cut((120, 96), (2, 1)) * 2,
    "columns-and-copies": cut((120, 96), (1, 2)) * 2,
    "one-has-nothing": [*cut((120, 96), (2, 1)), Box((0, 0), (0, 96))],
    "ragged": [Box((0, 0), (50, 96)), Box((50, 0), (51, 96)), Box((101, 0), (19, 96))],
    "many-dims": cut((4, 6, 50, 16), (2, 1, 2, 1)),
}


def arrays_like(boxes: list[Box], dtype: str = "float32") -> Arrays:
    shape = tuple(max(box.end[d] for box in boxes) for d in range(len(boxes[0].shape)))
    return {KEY: random_array(np.random.default_rng(0), dtype, shape)}


@pytest.mark.parametrize("fine", [None, 1])
@pytest.mark.parametrize("name", CUTS)
def test_round_trips(tmp_path, name, fine):
    arrays, boxes = arrays_like(CUTS[name]), {KEY: CUTS[name]}
    tiles = {} if fine is None else {KEY: fine}
    sizes = SMALL | ({"gather_below": 1 << 13} if name == "ragged" else {})
    (plan,) = make_plan(layout_of(arrays, boxes, tiles), **sizes).arrays
    assert len(plan.chunk_plan.by_writer) > 1
    assert len(plan.chunk_plan.chunks) > len(plan.chunk_plan.by_writer)
    save_arrays(tmp_path, "t1", arrays, boxes, tiles, planning=sizes, durable=fine is None)
    assert [p.name for p in (tmp_path / "t1/atoms/w/fp32").iterdir() if p.name != "zarr.json"] == [
        "c" + ".0" * arrays[KEY].ndim
    ]
    check_read(tmp_path, "t1", arrays)
    load_in(tmp_path, arrays, {KEY: cut(arrays[KEY].shape, (3, 2, 1, 1)[: arrays[KEY].ndim])})


@settings(deadline=None, max_examples=120)
@given(layouts(range(5)), st.fixed_dictionaries(SIZES), st.data())
def test_any_layout_is_read_by_everyone(memory_path, layout, sizes, data):
    """Random parts of random arrays, gathered or not, in files of one writer or of several."""
    layout: Ranks = {rank: layout.get(rank, []) for rank in range(max(layout) + 1)}
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    specs = {spec.key: spec for held in layout.values() for spec in held}
    arrays = {tuple(key): random_array(rng, s.dtype, s.shape) for key, s in specs.items()}
    plan = make_plan(layout, **sizes)
    run = memory_path / "any"

    def work(comm):
        shards = shards_of(arrays, layout[comm.rank])
        save(run, "t1", shards, plan=plan, comm=comm, document={}, durable=False)

    with mock.patch("ckpt.write.JOB_BYTES", data.draw(st.sampled_from([1, 3 * PAGE, 1 << 20]))):
        all_ranks(len(layout), work)
    check_read(run, "t1", arrays)
    shutil.rmtree(run)


def test_no_two_ranks_write_one_page(tmp_path):
    """Two writers of a page, on two machines, would each write the other's half of it back as it was."""
    pages, lock = defaultdict(set), threading.Lock()
    rank = threading.local()
    real = files.write_shared

    def noted(path, runs, *, hurry):
        listed = [(offset, [bytes(part) for part in parts]) for offset, parts in runs]
        with lock:
            for offset, parts in listed:
                end = offset + sum(map(len, parts))
                pages[path] |= {(page, rank.it) for page in range(offset // PAGE, -(-end // PAGE))}
        real(path, listed, hurry=hurry)

    arrays, boxes = arrays_like(CUTS["columns"]), {KEY: CUTS["columns"]}
    layout = layout_of(arrays, boxes)
    plan = make_plan(layout, **SMALL)

    def work(comm):
        rank.it = comm.rank
        shards = shards_of(arrays, layout[comm.rank])
        save(tmp_path, "t1", shards, plan=plan, comm=comm, document={}, durable=False, threads=1)

    with mock.patch("ckpt.stores.files.write_shared", noted):
        all_ranks(4, work)
    (found,) = pages.values()
    written = [page for page, _ in found]
    assert len(written) == len(set(written))
    assert {by for _, by in found} == {0, 1, 2, 3}
    size = (tmp_path / "t1/atoms/w/fp32/c.0.0").stat().st_size
    assert {*written} == {*range(-(-size // PAGE))}, "and all of them are written"
    check_read(tmp_path, "t1", arrays)


@pytest.mark.parametrize("job", [1, 20_000, 1 << 30])
def test_large_parts_are_written_by_several_threads(tmp_path, monkeypatch, job):
    monkeypatch.setattr("ckpt.write.JOB_BYTES", job)
    jobs, real = [], files.write_shared
    monkeypatch.setattr(
        "ckpt.stores.files.write_shared", lambda path, runs, **kw: (jobs.append(path), real(path, runs, **kw))
    )
    arrays = arrays_like(CUTS["rows"])
    save_arrays(tmp_path, "t1", arrays, {KEY: CUTS["rows"]}, planning=SMALL, threads=4)
    grid = open_checkpoint(tmp_path).info(*KEY).grid
    chunks = grid.counts[0] * grid.counts[1] // 4  # of a rank
    assert len(jobs) == 4 * -(-chunks // max(1, job // grid.stride))
    check_read(tmp_path, "t1", arrays)


def test_a_chunk_that_nobody_wrote_is_noticed(tmp_path, monkeypatch):
    """The plan proves that each has a writer; before the commit it is also asked who wrote what."""
    real = make_plan(layout_of(arrays_like(CUTS["rows"]), {KEY: CUTS["rows"]}), **SMALL)
    monkeypatch.setattr(
        "ckpt.write.Written.in_order", lambda self, plan, rank: np.zeros(len(real.arrays), np.uint32)
    )
    with pytest.raises(CheckpointError, match=r"rank 0"):
        save_arrays(tmp_path, "t1", arrays_like(CUTS["rows"]), {KEY: CUTS["rows"]}, planning=SMALL)
    assert not (tmp_path / "t1").exists()
