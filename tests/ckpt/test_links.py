"""Incremental saves: files are linked only if every writer finds its part of them unchanged."""

import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import (
    Arrays,
    Ranks,
    all_ranks,
    check_read,
    cut,
    files_below,
    layout_of,
    random_array,
    shards_of,
)
from ckpt_layouts import SIZES, layouts
from ckpt_links import PLACES, SMALL, THREE, B, V, W, arrays, data_files, linked, saved, with_one_changed
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import (
    Box,
    Retention,
    SaveReport,
    UnreadShard,
    make_plan,
    open_checkpoint,
    prune,
    save,
)
from ckpt.plan import ArrayPlan


def total(run: Path) -> int:
    grids = [info.grid for info in open_checkpoint(run).arrays.values()]
    return sum(int(np.prod(grid.counts)) * (grid.payload + 4) for grid in grids)


@pytest.mark.parametrize("name", PLACES)
def test_what_is_unchanged_is_linked(tmp_path, name):
    content = arrays()
    first = saved(tmp_path, "t1", content, PLACES[name])
    again = saved(tmp_path, "t2", content, PLACES[name])
    assert (first.bytes_written, first.bytes_linked) == (total(tmp_path), 0)
    assert (again.bytes_written, again.bytes_linked) == (0, total(tmp_path))
    assert linked(tmp_path) == {"w", "v", "bias"}
    assert {stat.st_nlink for stat in data_files(tmp_path / "t2").values()} == {2}
    check_read(tmp_path, "t2", content)
    prune(tmp_path, Retention(keep_last=1))
    assert {stat.st_nlink for stat in data_files(tmp_path / "t2").values()} == {1}
    check_read(tmp_path, "t2", content)


# The owner, rank 0 in rows, looks at its first page; the other places are found by one rank each.
CHANGED = [(0, 0), (0, 95), (39, 95), (40, 0), (50, 17), (79, 95), (80, 0), (119, 95), (11, 33), (65, 64)]


@pytest.mark.parametrize("place", CHANGED, ids=str)
@pytest.mark.parametrize(("key", "other"), [(W, "v"), (V, "w")], ids=["rows", "columns"])
@pytest.mark.parametrize("name", PLACES)
def test_one_changed_number_anywhere(tmp_path, name, key, other, place):
    content = arrays()
    saved(tmp_path, "t1", content, PLACES[name])
    before, after = files_below(tmp_path / "t1"), with_one_changed(content, key, *place)
    report = saved(tmp_path, "t2", after, PLACES[name])
    assert linked(tmp_path) == {other, "bias"}
    assert report.bytes_written + report.bytes_linked == total(tmp_path)
    grid = open_checkpoint(tmp_path).info(*key).grid
    assert report.bytes_written == int(np.prod(grid.counts)) * (grid.payload + 4)
    assert files_below(tmp_path / "t1") == before
    check_read(tmp_path, "t2", after)


def places(array: ArrayPlan) -> list[tuple[int, Box]]:
    """Return the writer and the box of each chunk: some it has whole, others are gathered to it later."""
    return [(rank, chunk.box) for rank, chunks in array.chunk_plan.by_writer.items() for chunk in chunks]


@settings(deadline=None, max_examples=60)
@given(layouts(range(5)), st.fixed_dictionaries(SIZES), st.data())
def test_one_changed_number_of_any_layout(memory_path, layout, sizes, data):
    """Every array is linked but the changed one, and those of which no rank has a whole file at once."""
    layout: Ranks = {rank: layout.get(rank, []) for rank in range(max(layout) + 1)}
    specs = {tuple(s.key): s for held in layout.values() for s in held}
    rng = np.random.default_rng(0)
    content = {key: random_array(rng, s.dtype, s.shape) for key, s in specs.items()}
    run, plan = memory_path / "links", make_plan(layout, **sizes)

    def saved_as(tag: str, arrays: Arrays) -> None:
        def work(comm: Any) -> SaveReport:
            shards = shards_of(arrays, layout[comm.rank])
            return save(run, tag, shards, plan=plan, comm=comm, document={}, durable=False)

        all_ranks(len(layout), work)

    saved_as("t1", content)
    before = files_below(run / "t1")
    after = {key: a.copy() for key, a in content.items()}
    key = data.draw(st.sampled_from(sorted(content)))
    if after[key].size:
        bytes_of = after[key].reshape(-1).view(np.uint8)
        bytes_of[data.draw(st.integers(0, len(bytes_of) - 1))] ^= 1
    saved_as("t2", after)
    assert files_below(run / "t1") == before
    check_read(run, "t2", after)
    written = {a.key.atom: a.chunk_plan.writers for a in plan.arrays if len(a.chunk_plan.by_writer) > 1}
    alone = {
        a.key.atom
        for a in plan.arrays
        if (sources := a.chunk_plan.sources)
        and (a.key.atom in written or len({sources.has_whole(*place) for place in places(a)}) > 1)
    }
    whole = {a.key.atom for a in plan.arrays if len(a.chunk_plan.chunks)} - {key[0]}
    if sizes["files"] == "array":
        assert linked(run) == whole - alone
    else:
        assert linked(run) - {key[0]} == whole
    shutil.rmtree(run)


def test_a_gathered_array_that_changed(tmp_path):
    content = arrays()
    saved(tmp_path, "t1", content)
    after = with_one_changed(content, B, 6)
    saved(tmp_path, "t2", after)
    assert linked(tmp_path) == {"w", "v"}
    check_read(tmp_path, "t2", after)


@pytest.mark.parametrize("round_bytes", [1, 1 << 30])
@pytest.mark.parametrize("files", ["array", "writer"])
def test_a_large_gathered_array(tmp_path, monkeypatch, files, round_bytes):
    """A file of which only parts come at a time is written again, changed or not."""
    monkeypatch.setattr("ckpt.gather.ROUND_BYTES", round_bytes)
    monkeypatch.setattr("ckpt.chunking.GATHERED_FILE_BYTES", 1 << 14)
    planning = {"files": files, "gather_below": 1 << 20}
    content, boxes = {W: arrays()[W]}, {W: THREE[W]}
    saved(tmp_path, "t1", content, boxes, planning)
    before = files_below(tmp_path / "t1")
    saved(tmp_path, "t2", content, boxes, planning)
    assert linked(tmp_path) == ({"w"} if files == "writer" else set())
    after = with_one_changed(content, W, 119, 95)
    saved(tmp_path, "t3", after, boxes, planning)
    assert files_below(tmp_path / "t1") == before
    check_read(tmp_path, "t1", content)
    check_read(tmp_path, "t2", content)
    check_read(tmp_path, "t3", after)


def test_files_of_one_writer_are_linked_one_by_one(tmp_path):
    content, boxes = {W: arrays()[W]}, {W: THREE[W]}
    saved(tmp_path, "t1", content, boxes, {"files": "writer"})
    after = with_one_changed(content, W, 50, 3)
    report = saved(tmp_path, "t2", after, boxes, {"files": "writer"})
    inodes = [{n: s.st_ino for n, s in data_files(tmp_path / tag).items()} for tag in ("t1", "t2")]
    assert {name for name in inodes[0] if inodes[0][name] != inodes[1][name]} == {"atoms/w/fp32/c.1.0"}
    assert report.bytes_linked == 2 * report.bytes_written
    check_read(tmp_path, "t2", after)


@pytest.mark.parametrize(
    ("before", "after"),
    [*permutations(["rows-3", "columns-3", "one", "rows-2", "copies", "other-chunks", "files"], 2)],
    ids=str,
)
def test_another_topology_between_saves(tmp_path, before, after):
    """Whatever can be linked is, and nothing else."""
    ways = {
        "rows-3": ({W: cut((120, 96), (3, 1))}, {}),
        "columns-3": ({W: cut((120, 96), (1, 3))}, {}),
        "rows-2": ({W: cut((120, 96), (2, 1))}, {}),
        "one": ({W: cut((120, 96), (1, 1))}, {}),
        "copies": ({W: cut((120, 96), (1, 1)) * 3}, {}),
        "other-chunks": ({W: cut((120, 96), (2, 1))}, {"chunk_bytes": 1 << 13, "gather_below": 0}),
        "files": ({W: cut((120, 96), (3, 1))}, {"files": "writer"}),
    }
    content = {W: arrays()[W]}
    (first, how), (second, other) = ways[before], ways[after]
    saved(tmp_path, "t1", content, first, how)
    kept = files_below(tmp_path / "t1")
    saved(tmp_path, "t2", content, second, other)
    grids = [open_checkpoint(tmp_path, tag).info(*W).grid for tag in ("t1", "t2")]
    assert (grids[0] == grids[1]) == (linked(tmp_path) == {"w"})
    changed = with_one_changed(content, W, 60, 60)
    saved(tmp_path, "t3", changed, first, how)
    assert files_below(tmp_path / "t1") == kept
    check_read(tmp_path, "t2", content)
    check_read(tmp_path, "t3", changed)


def test_the_same_bytes_of_another_type_or_shape(tmp_path):
    """A file says nothing of its type; two arrays may share one."""
    content = {W: np.zeros((120, 96), np.float32)}
    saved(tmp_path, "t1", content, {W: THREE[W]})
    for tag, other in (("t2", np.zeros((120, 96), np.int32)), ("t3", np.zeros((60, 192), np.float32))):
        saved(tmp_path, tag, {W: other}, {W: cut(other.shape, (3, 1))})
        check_read(tmp_path, tag, {W: other})
    check_read(tmp_path, "t1", content)


def test_nothing_is_linked_unless_asked_to(tmp_path):
    content = arrays()
    saved(tmp_path, "t1", content)
    report = saved(tmp_path, "t2", content, incremental=False)
    assert (linked(tmp_path), report.bytes_linked) == (set(), 0)
    check_read(tmp_path, "t2", content)


def test_a_save_is_linked_to_the_latest_only(tmp_path):
    content = arrays()
    saved(tmp_path, "t1", content)
    other = {key: a + 1 for key, a in content.items()}
    saved(tmp_path, "t2", other)
    report = saved(tmp_path, "t3", content)
    assert report.bytes_linked == 0
    (tmp_path / "latest").write_text("t1\n")
    saved(tmp_path, "t4", content)
    assert linked(tmp_path, "t1", "t4") == {"w", "v", "bias"}
    assert linked(tmp_path, "t3", "t4") == set()


def test_stages_agree_each_for_itself(tmp_path):
    """Ranks 0 and 2 share one array, ranks 1 and 3 another, of which they alone know."""
    stages = [(0, 2), (1, 3)]
    first, last = ({(name, "fp32"): arrays()[W]} for name in "wv")
    boxes = cut((120, 96), (2, 1))

    def save_both(tag: str, contents: list[Arrays]) -> None:
        plans, shards = {}, {}
        for ranks, content in zip(stages, contents, strict=True):
            local = layout_of(content, dict.fromkeys(content, boxes))
            layout = {rank: local[i] for i, rank in enumerate(ranks)}
            plans |= dict.fromkeys(ranks, make_plan(layout, **SMALL))
            shards |= {rank: shards_of(content, specs) for rank, specs in layout.items()}

        def work(comm: Any) -> SaveReport:
            mine, plan = shards[comm.rank], plans[comm.rank]
            return save(tmp_path, tag, mine, plan=plan, comm=comm, document={}, durable=False)

        all_ranks(4, work)
        check_read(tmp_path, tag, contents[0] | contents[1])

    save_both("t1", [first, last])
    save_both("t2", [first, last])
    assert linked(tmp_path) == {"w", "v"}
    save_both("t3", [with_one_changed(first, W, 119, 95), last])
    assert linked(tmp_path, "t2", "t3") == {"v"}
    save_both("t4", [first, with_one_changed(last, V, 0, 0)])
    assert linked(tmp_path, "t2", "t4") == set()
    assert linked(tmp_path, "t3", "t4") == set()


def test_arrays_that_are_read_when_they_are_written(tmp_path):
    """They are read again where they turn out to have changed."""
    content = {W: arrays()[W]}
    layout = layout_of(content, {W: THREE[W]})
    plan = make_plan(layout, **SMALL)
    for tag, place in (("t1", None), ("t2", None), ("t3", (119, 95))):
        content = content if place is None else with_one_changed(content, W, *place)

        def work(comm: Any, tag: str = tag, content: Arrays = content) -> SaveReport:
            shards = [UnreadShard(s.spec, s.data) for s in shards_of(content, layout[comm.rank])]
            return save(tmp_path, tag, shards, plan=plan, comm=comm, document={}, durable=False)

        all_ranks(3, work)
        check_read(tmp_path, tag, content)
    assert linked(tmp_path) == {"w"}
    assert linked(tmp_path, "t2", "t3") == set()
