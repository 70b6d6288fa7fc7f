"""Parts and plans that ranks bring to a save: less, more, by stage, and wrong."""

import math
from dataclasses import replace

import numpy as np
import pytest
import zarr
from ckpt_helpers import (
    DOCUMENT,
    all_ranks,
    cut,
    files_below,
    layout_of,
    parts_of,
    random_array,
    run_ranks,
    same,
    save_arrays,
    shards_of,
    whole,
)

from ckpt import Box, CheckpointError, Shard, committed_tags, make_plan, open_checkpoint, save

ARRAYS = {
    ("embed.weight", "fp32"): random_array(np.random.default_rng(7), "float32", (1027, 517)),
    ("bias", "fp32"): random_array(np.random.default_rng(8), "float32", (300_001,)),
    ("norm.weight", "fp32"): random_array(np.random.default_rng(9), "float32", (13, 1)),
    ("empty", "fp32"): np.ones((0, 5), np.float32),
}


@pytest.mark.parametrize("cuts", [(1, 1), (2, 1)], ids=str)
def test_a_rank_need_bring_only_its_parts(tmp_path, cuts):
    arrays, boxes = ARRAYS, {key: cut(a.shape, cuts[: a.ndim]) * 2 for key, a in ARRAYS.items()}
    layout = layout_of(arrays, boxes)
    plan = make_plan(layout)
    brought = []

    def work(comm):
        shards = parts_of(arrays, layout[comm.rank], plan, comm.rank)
        brought.append(sum(s.data.nbytes for s in shards))
        options = {"document": DOCUMENT, "durable": False}
        return save(tmp_path / "parts", "t1", shards, plan=plan, comm=comm, **options)

    reports = all_ranks(len(layout), work)
    whole = save_arrays(tmp_path / "whole", "t1", arrays, boxes)
    assert files_below(tmp_path / "parts") == files_below(tmp_path / "whole")
    chunks = sum(
        math.prod(a.grid.counts) * (a.grid.payload + 4)
        for a in open_checkpoint(tmp_path / "parts").arrays.values()
    )
    assert {replace(r, url=whole.url) for r in reports} == {whole}, "each rank is told of all"
    assert (whole.tag, whole.url, reports[0].url) == ("t1", f"{tmp_path}/whole/t1", f"{tmp_path}/parts/t1")
    assert (whole.bytes_written, whole.bytes_linked, whole.pruned) == (chunks, 0, ())
    assert sum(brought) == sum(a.nbytes for a in arrays.values()), "each byte once, though it is there twice"


def test_a_rank_may_bring_more_than_its_parts(tmp_path):
    """Ranks hold whole arrays, of which the plan expects a part."""
    arrays = ARRAYS
    boxes = {key: cut(a.shape, (2, 1)[: a.ndim]) for key, a in arrays.items()}
    plan = make_plan(layout_of(arrays, boxes))
    assert {array.chunk_plan.sources is None for array in plan.arrays} == {False, True}
    everything = shards_of(arrays, layout_of(arrays, whole(arrays))[0])
    all_ranks(2, lambda comm: save(tmp_path, "t1", everything, plan=plan, comm=comm, document={}))
    assert all(same(open_checkpoint(tmp_path).read(*key), a) for key, a in arrays.items())


def test_stages_that_know_nothing_of_each_other_save_together(tmp_path, monkeypatch):
    """Ranks 0 and 2 share some arrays, ranks 1 and 3 others that take more gathering rounds."""
    monkeypatch.setattr("ckpt.gather.ROUND_BYTES", 1000)
    rng, stages = np.random.default_rng(8), [(0, 2), (1, 3)]
    few = {("first.w", "fp32"): random_array(rng, "float32", (512, 300)), ("w.0", "fp32"): np.ones(7)}
    many = {(f"w.{i}", "exp_avg"): random_array(rng, "float32", (11, 9)) for i in range(1, 20)}
    plans, shards = {}, {}
    for ranks, arrays in zip(stages, (few, many), strict=True):
        local = layout_of(arrays, {key: cut(a.shape, (2, 1)[: a.ndim]) for key, a in arrays.items()})
        layout = {rank: local[i] for i, rank in enumerate(ranks)}
        plans |= dict.fromkeys(ranks, make_plan(layout))
        shards |= {rank: shards_of(arrays, specs) for rank, specs in layout.items()}
    work = lambda comm: save(  # noqa: E731
        tmp_path, "t1", shards[comm.rank], plan=plans[comm.rank], comm=comm, document={}, durable=False
    )
    all_ranks(4, work)
    checkpoint = open_checkpoint(tmp_path)
    assert {*checkpoint.arrays} == {*few, *many}
    assert all(same(checkpoint.read(*key), a) for key, a in (few | many).items())
    folders = {key: tmp_path / "t1" / "atoms" / "/".join(key) for key in few | many}
    assert all(same(zarr.open_array(folders[key], mode="r")[...], a) for key, a in (few | many).items())


def refused(tmp_path, plans, shards, tags=("t1",) * 4) -> str:
    """Return the message that all ranks raise when saving with these plans; nothing may be left behind."""
    results = run_ranks(
        len(plans),
        lambda comm: save(
            tmp_path, tags[comm.rank], shards[comm.rank], plan=plans[comm.rank], comm=comm, document={}
        ),
    )
    assert all(isinstance(r, CheckpointError) for r in results), results
    assert not [*tmp_path.rglob("*")]
    (message,) = {str(r) for r in results}
    return message


def test_ranks_that_do_not_hold_what_the_plan_wants_are_refused(tmp_path):
    arrays = {("w", "fp32"): np.ones((4, 4), np.float32)}
    layout = layout_of(arrays, {("w", "fp32"): cut((4, 4), (2, 1))})
    plans = [make_plan(layout)] * 2
    full = [shards_of(arrays, specs) for specs in layout.values()]
    (spec,) = layout[1]
    less = shards_of(arrays, [replace(spec, box=Box((3, 0), (1, 4)))])
    message = "the plan expects [2, 0]+[2, 4] of w/fp32 from this rank, which doesn't hold it (rank 1)"
    assert refused(tmp_path, plans, [full[0], []]) == message
    assert refused(tmp_path, plans, [full[0], less]) == message
    wrong = [Shard(spec, full[1][0].data.astype(np.float64))]
    assert refused(tmp_path, plans, [full[0], wrong]).startswith("AssertionError")
    assert "float64" in refused(tmp_path, plans, [full[0], wrong])
    assert "different tags: t1, t2" in refused(tmp_path, plans, full, ("t1", "t2"))


def test_ranks_that_planned_differently_are_refused(tmp_path):
    arrays = {("w", "fp32"): np.ones((4, 4), np.float32), ("v", "fp32"): np.ones(4, np.float32)}
    boxes = {("w", "fp32"): cut((4, 4), (2, 1)), ("v", "fp32"): cut((4,), (2,))}
    layout = layout_of(arrays, boxes)
    shards = [shards_of(arrays, specs) for specs in layout.values()]
    plan, other = make_plan(layout), make_plan(layout_of(arrays, {("w", "fp32"): boxes["w", "fp32"]}))
    message = "rank 0 and a rank that shares its arrays have different plans for them"
    assert message in refused(tmp_path, [plan, other], shards)


def test_ranks_that_each_believe_to_be_the_only_holder_are_refused(tmp_path, memory_url):
    """Separate plans for shared arrays give each chunk two writers, here of a link to an older one."""
    arrays = {("w", "fp32"): np.ones((4, 4), np.float32), ("v", "fp32"): np.ones(4, np.float32)}
    save_arrays(tmp_path, "t1", arrays)
    before, alone = files_below(tmp_path), layout_of(arrays, whole(arrays))[0]

    def work(comm, run=tmp_path, files="array"):
        shards = shards_of(arrays, alone)
        shards[comm.rank].data[:] += comm.rank
        plan = make_plan({comm.rank: alone}, files=files)
        return save(run, "t2", shards, plan=plan, comm=comm, document={})

    for _ in range(10):  # whichever of them comes first
        results = run_ranks(2, work)
        assert all(isinstance(r, CheckpointError) for r in results), results
        assert files_below(tmp_path) == before
    # where nothing is said of an object that is written again
    results = run_ranks(2, lambda comm: work(comm, memory_url, "writer"))
    message = "AssertionError: v/fp32 is in the plans of ranks that don't know each other (rank 0)"
    assert {str(r) for r in results} == {message}
    assert committed_tags(memory_url) == []
