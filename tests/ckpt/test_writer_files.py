"""Files with one writer each, for places where ranks can't write one together; and which places these are."""

import math
from collections import defaultdict
from unittest import mock

import fsspec
import numpy as np
import pytest
from ckpt_helpers import (
    DOCUMENT,
    Arrays,
    all_ranks,
    check_read,
    cut,
    files_below,
    layout_of,
    load_in,
    random_array,
    run_ranks,
    save_arrays,
    shards_of,
    whole,
)
from ckpt_layouts import SIZES, check, layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import CheckpointError, committed_tags, make_plan, save
from ckpt.gather import rounds
from ckpt.plan import ArrayPlan

SMALL = {"chunk_bytes": 1 << 12, "gather_below": 1 << 12}
"""Sizes of a plan that cuts arrays of some hundred KiB as the usual ones cut those of some hundred MiB."""


def writers_of(array: ArrayPlan) -> dict[tuple[int, ...], set[int]]:
    """Return the ranks that write each file."""
    found = defaultdict(set)
    for chunk in array.chunk_plan.chunks:
        found[array.grid.place(chunk.index)[0]].add(chunk.writer)
    return dict(found)


def payloads(array: ArrayPlan) -> list[int]:
    """Return the bytes of the elements in each file."""
    return [len(array.grid.chunks(file)) * array.grid.payload for file, _ in array.grid.files()]


@settings(deadline=None, max_examples=200)
@given(layouts(), st.fixed_dictionaries(SIZES), st.sampled_from([1, 30, 100, 1 << 20]))
def test_each_file_has_one_writer_and_a_bounded_size(layout, sizes, most):
    with (
        mock.patch("ckpt.chunking.FILE_BYTES", 4 * most),
        mock.patch("ckpt.chunking.GATHERED_FILE_BYTES", most),
    ):
        plan = make_plan(layout, **{**sizes, "files": "writer"})
        one_file = make_plan(layout, **{**sizes, "files": "array"})
    for array in plan.arrays:
        check(layout, array)
        assert all(len(ranks) == 1 for ranks in writers_of(array).values())
        bound = most * (4 if array.chunk_plan.sources is None else 1)
        assert max(payloads(array), default=0) <= max(2 * bound, array.grid.payload)
    assert {len(writers_of(array)) for array in one_file.arrays} <= {0, 1}, "else an array is one file"


@pytest.mark.parametrize(
    ("shape", "cuts", "expected"),
    [
        ((1024, 256), (1, 1), [256 << 10] * 4),
        ((1024, 256), (2, 1), [256 << 10] * 4),
        ((1024, 256), (8, 1), [128 << 10] * 8),  # no larger than what a rank holds
        ((1024, 256), (1, 8), [128 << 10] * 8),
        ((1280, 256), (1, 1), [256 << 10] * 5),
        ((1023, 256), (1023, 1), [64 << 10] * 16),  # gathered, so smaller ones
        ((2, 32, 4096), (1, 1, 1), [256 << 10] * 4),  # cut along a second dim
    ],
    ids=str,
)
def test_files_are_near_the_size_wanted(monkeypatch, shape, cuts, expected):
    monkeypatch.setattr("ckpt.chunking.FILE_BYTES", 256 << 10)
    monkeypatch.setattr("ckpt.chunking.GATHERED_FILE_BYTES", 64 << 10)
    arrays = {("w", "fp32"): np.broadcast_to(np.float32(0), shape)}
    layout = layout_of(arrays, {("w", "fp32"): cut(shape, cuts)})
    (array,) = make_plan(layout, files="writer", **SMALL).arrays
    assert (array.chunk_plan.sources is not None) == (cuts[0] > 1000)
    assert payloads(array) == expected


@settings(deadline=None, max_examples=100)
@given(layouts(), st.fixed_dictionaries(SIZES), st.sampled_from([1, 100, 1 << 20]))
def test_what_is_gathered_comes_file_by_file(layout, sizes, most):
    """A file of one writer is written at once. Files that are shared are gathered chunk by chunk."""
    with mock.patch("ckpt.gather.ROUND_BYTES", most):
        plan = make_plan(layout, **sizes)
        batches = list(rounds(plan))
    where = defaultdict(set)
    load = [defaultdict(list) for _ in batches]
    for i, batch in enumerate(batches):
        for array, chunk, _ in batch:
            file = array.key, array.grid.place(chunk.index)[0]
            unit = file if plan.files == "writer" else (array.key, chunk.index)
            where[unit].add(i)
            load[i][chunk.writer].append((unit, chunk.box.size * array.grid.itemsize))
    assert all(len(found) == 1 for found in where.values())
    for of_rank in (units for of in load for units in of.values()):
        assert sum(n for _, n in of_rank) <= most or len({unit for unit, _ in of_rank}) == 1
    plans = [array.chunk_plan for array in plan.arrays if array.chunk_plan.sources is not None]
    gathered = sum(
        plan.files == "writer" or {rank for rank, _ in chunks.sources.of_chunk(chunk.box)} != {chunk.writer}
        for chunks in plans
        for chunk in chunks.chunks
    )
    assert sum(map(len, batches)) == gathered


LAYOUTS = {"rows": ((4, 1), 1), "columns": ((1, 4), 1), "both": ((2, 2), 1), "copies": ((1, 1), 4)}
LAYOUTS |= {"ragged": ((7, 1), 1), "rows-and-copies": ((3, 1), 2)}


def matrices() -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"w": (121, 260), "divides": (128, 256), "bias": (3001,), "small": (5, 3), "scale": ()}
    arrays = {(name, "fp32"): random_array(rng, "float32", shape) for name, shape in shapes.items()}
    return arrays | {
        ("w", "exp_avg"): random_array(rng, "bfloat16", (121, 260)),
        ("mask", "value"): random_array(rng, "bool", (3, 700, 11)),
        ("none", "value"): random_array(rng, "int64", (0, 3)),
    }


@pytest.mark.parametrize("place", ["folder-array", "folder-writer", "memory-writer"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trips(tmp_path, memory_url, monkeypatch, name, place):
    monkeypatch.setattr("ckpt.chunking.FILE_BYTES", 16 << 10)
    monkeypatch.setattr("ckpt.chunking.GATHERED_FILE_BYTES", 8 << 10)
    monkeypatch.setattr("ckpt.gather.ROUND_BYTES", 10_000)
    monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 9 << 10)
    monkeypatch.setattr("ckpt.write.JOB_BYTES", 1)
    where, _, files = place.partition("-")
    run, copy = (tmp_path / "run", None) if where == "folder" else (memory_url, tmp_path / "copy")
    arrays, (cuts, copies) = matrices(), LAYOUTS[name]
    parts = math.prod(cuts)
    boxes = {
        key: cut(a.shape, (cuts if a.ndim > 1 else (parts,) * a.ndim) + (1,) * (a.ndim - 2)) * copies
        for key, a in arrays.items()
    }
    boxes = {key: found * (parts * copies // len(found)) for key, found in boxes.items()}
    report = save_arrays(run, "t1", arrays, boxes, {("w", "fp32"): 1}, planning={"files": files, **SMALL})
    assert report.bytes_written >= sum(a.nbytes for a in arrays.values())
    check_read(run, "t1", arrays, copy)
    thirds = {key: cut(a.shape, (3, 1, 1)[: a.ndim]) for key, a in arrays.items()}
    load_in(run, arrays, thirds | {key: whole(arrays)[key] * 3 for key, a in arrays.items() if not a.ndim})


def test_several_ranks_are_told_that_they_cannot_write_one_object(memory_url):
    arrays = {("w", "fp32"): np.ones((4, 4), np.float32)}
    layout = layout_of(arrays, {("w", "fp32"): cut((4, 4), (2, 1))})
    plan = make_plan(layout)

    def work(comm):
        shards = shards_of(arrays, layout[comm.rank])
        return save(memory_url, "t1", shards, plan=plan, comm=comm, document=DOCUMENT)

    results = run_ranks(2, work)
    assert all(isinstance(r, CheckpointError) for r in results), results
    what = f"several ranks can't write one object of {memory_url}; plan with files='writer' (rank 0)"
    assert {str(r) for r in results} == {what}
    assert not fsspec.filesystem("memory").exists(memory_url), "nothing was written"
    assert committed_tags(memory_url) == []


def test_so_are_those_of_a_folder_that_is_an_object_store(tmp_path, monkeypatch):
    monkeypatch.setattr("ckpt.stores.local.can_share_files", lambda folder: False)
    monkeypatch.setattr("ckpt.write.JOB_BYTES", 1)  # in parts, if that were possible
    arrays = {("w", "fp32"): random_array(np.random.default_rng(0), "float32", (64, 64))}
    boxes = {("w", "fp32"): cut((64, 64), (2, 1))}
    with pytest.raises(CheckpointError, match="several ranks can't write one object"):
        save_arrays(tmp_path, "t1", arrays, boxes, planning={"files": "array", **SMALL})
    assert files_below(tmp_path) == {}
    with mock.patch("ckpt.stores.files.write_shared", side_effect=AssertionError("in parts")):
        save_arrays(tmp_path, "t1", arrays, boxes, planning=SMALL)
    check_read(tmp_path, "t1", arrays)


def test_one_rank_writes_whole_files_anywhere(tmp_path, memory_url):
    """A plan of one rank needs nothing of the place."""
    arrays = {("w", "fp32"): random_array(np.random.default_rng(0), "float32", (64, 64))}
    save_arrays(memory_url, "t1", arrays, planning={"files": "array", **SMALL})
    check_read(memory_url, "t1", arrays, tmp_path)


@pytest.mark.parametrize("files", ["array", "writer"])
def test_stages_of_one_rank_each_share_no_file(tmp_path, memory_url, files):
    stages = [{("a", "fp32"): np.ones((9, 9), np.float32)}, {("b", "fp32"): np.ones(7, np.float32)}]

    def work(comm):
        specs = layout_of(stages[comm.rank], whole(stages[comm.rank]))[0]
        plan = make_plan({comm.rank: specs}, files=files)
        shards = shards_of(stages[comm.rank], specs)
        save(memory_url, "t1", shards, plan=plan, comm=comm, document=DOCUMENT)

    all_ranks(2, work)
    check_read(memory_url, "t1", stages[0] | stages[1], tmp_path)
