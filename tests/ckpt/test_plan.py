"""Plans of random layouts: each chunk has one writer, who holds or receives all of it."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from ckpt_helpers import cut
from ckpt_layouts import DTYPES, SIZES, check, content, held_of, layouts, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import ArrayKey, ArrayLayout, Box, CheckpointError, ShardSpec, make_plan
from ckpt.plan import Sources, plan_arrays


@settings(deadline=None, max_examples=250)
@given(layouts(), st.fixed_dictionaries(SIZES))
def test_every_chunk_has_one_writer_and_every_element_is_covered(layout, sizes):
    whole = make_plan(layout, **sizes)
    shuffled = {r: random.Random(0).sample(layout[r], len(layout[r])) for r in sorted(layout)[::-1]}
    again = make_plan(shuffled, **sizes)
    kinds = {s.key: s for specs in shuffled.values() for s in specs}.values()
    other = [ArrayLayout(s.key, s.dtype, s.shape, held_of(layout, s.key), s.fine_dim) for s in kinds]
    told = content(plan_arrays(other, layout, **sizes))
    assert told == content(whole), "whether it is told by array or by rank"
    assert [p.key for p in whole.arrays] == sorted({s.key for specs in layout.values() for s in specs})
    for array in whole.arrays:
        check(layout, array)
    assert (whole.ranks, whole.files) == (tuple(sorted(layout)), sizes["files"])
    assert content(again) == content(whole), "whatever order ranks and arrays come in"
    assert again.digest == whole.digest


@settings(deadline=None, max_examples=150)
@given(layouts(), st.fixed_dictionaries(SIZES))
def test_a_rank_brings_what_it_writes_or_sends(layout, sizes):
    whole = make_plan(layout, **sizes)
    for rank in layout:
        parts, needed = whole.parts(rank), {}
        for array in whole.arrays:
            sources = array.chunk_plan.sources
            if sources is None:
                mine = [c.box for c in array.chunk_plan.chunks if c.writer == rank]
            else:
                mine = [box for source, box in sources.pieces if source == rank]
            if mine:
                needed[array.key] = mine
        assert parts.keys() == needed.keys()
        for key, boxes in needed.items():
            assert parts[key].within(held_of(layout, key)[rank]), "no more than it has"
            ends = zip(*(tuple(zip(b.offset, b.end, strict=True)) for b in boxes), strict=True)
            extent = [(min(a for a, _ in dim), max(b for _, b in dim)) for dim in ends]
            assert [*zip(parts[key].offset, parts[key].end, strict=True)] == extent, "and no more than needed"


@settings(deadline=None, max_examples=150)
@given(layouts(range(4), "first"), layouts(range(4, 9), "second"), st.fixed_dictionaries(SIZES))
def test_ranks_that_share_nothing_plan_apart(a, b, sizes):
    """A pipeline stage that doesn't know the others makes the same plan as all of them at once."""
    together, first, second = (content(make_plan(layout, **sizes))[-1] for layout in (b | a, a, b))
    assert together == first + second


@settings(deadline=None, max_examples=150)
@given(layouts(range(3)), layouts(range(3)), st.fixed_dictionaries(SIZES), st.fixed_dictionaries(SIZES))
def test_digests_are_equal_where_the_plans_are(a, b, sizes, others):
    plans = [make_plan(layout, **given) for layout in (a, b, {**a, 7: []}) for given in (sizes, others)]
    for one, other in product(plans, plans):
        assert (one.digest == other.digest) == (content(one) == content(other))


def test_who_sends_what_is_in_the_digest():
    """One rank writes the whole array either way, but receives other parts."""
    plans = [plan_of((8, 4), [Box((0, 0), (n, 4)), Box((n, 0), (8 - n, 4))]) for n in (3, 5)]
    (one,), (other,) = (made.arrays for made in plans)
    assert (one.owner, one.grid, one.chunk_plan.chunks) == (other.owner, other.grid, other.chunk_plan.chunks)
    assert plans[0].digest != plans[1].digest


def test_another_process_has_the_same_digest():
    """Each rank is a process: nothing may depend on its random string hashes."""
    code = """
from ckpt import ArrayKey, Box, ShardSpec, make_plan
spec = lambda i, r: ShardSpec(ArrayKey(f"w.{i}", "fp32"), "float32", (8, i), Box((4 * (r % 2), 0), (4, i)))
print(make_plan({rank: [spec(i, rank) for i in range(60)] for rank in range(4)}).digest)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = lambda seed: subprocess.check_output(  # noqa: E731
        [sys.executable, "-c", code], env={**environment, "PYTHONHASHSEED": seed}
    )
    assert len({run(seed) for seed in "123"}) == 1


@settings(deadline=None)
@given(layouts(), st.data())
def test_gaps_and_overlaps_are_refused_by_name(layout, data):
    rank = data.draw(st.sampled_from(sorted(layout)))
    big = [i for i, s in enumerate(layout[rank]) if s.box.size and s.shape]
    if not big:
        return
    i = data.draw(st.sampled_from(big))
    spec = layout[rank][i]
    dim = data.draw(st.integers(0, len(spec.shape) - 1))
    grow = data.draw(st.sampled_from([-1, 1]))
    shape = tuple(n + grow * (d == dim) for d, n in enumerate(spec.box.shape))
    layout[rank][i] = replace(spec, box=Box(spec.box.offset, shape))
    others = [box for r, box in held_of(layout, spec.key).items() if r != rank]
    if spec.box in others and Box(spec.box.offset, shape).size == 0:
        return  # a copy that became empty leaves no gap
    with pytest.raises(CheckpointError, match=f"{spec.key.atom}/fp32.*exactly once"):
        make_plan(layout)


def spec(box: Box) -> ShardSpec:
    return ShardSpec(ArrayKey("w", "exp_avg"), "float32", (8, 4), box)


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([], "no rank holds anything"),
        ([Box((0, 0), (4, 4))], "the second half is held by none"),
        ([Box((0, 0), (4, 4)), Box((3, 0), (5, 4))], "one row is held twice"),
        ([Box((0, 0), (8, 4)), Box((0, 0), (4, 4))], "a part of a copy"),
        ([Box((0, 0), (4, 4)), Box((4, 2), (4, 4))], "beyond the end"),
        ([Box((0, 0), (4, 4)), Box((2, 0), (4, 4))], "the right size, but overlapping and with a gap"),
        ([Box((0, 0), (3, 4)), Box((3, 0), (3, 4)), Box((5, 0), (2, 4))], "likewise, though two adjoin"),
        ([Box((0, 0), (2, 4)), Box((4, 0), (2, 4)), Box((4, 0), (4, 4))], "likewise, from one row on"),
        ([Box((0, 0), (2, 4)), Box((0, 0), (6, 4))], "likewise, from the first row on"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_boxes_that_do_not_tile_are_refused(boxes, why):
    layout = {rank: [spec(box)] for rank, box in enumerate([*boxes, Box((0, 0), (0, 4))])}
    with pytest.raises(CheckpointError, match="w/exp_avg"):
        make_plan(layout)


@pytest.mark.parametrize("change", [{"shape": (8, 5)}, {"dtype": "float16"}, {"fine_dim": 1}], ids=str)
def test_ranks_that_disagree_about_an_array_are_named(change):
    half = Box((0, 0), (4, 4)), Box((4, 0), (4, 4))
    layout = {3: [spec(half[0])], 5: [replace(spec(half[1]), **change)]}
    for told in (layout, dict(reversed(layout.items()))):
        with pytest.raises(CheckpointError, match=r"w/exp_avg.* on rank 3 .* on rank 5"):
            make_plan(told)


def test_a_rank_that_lists_an_array_twice_is_refused():
    half = Box((0, 0), (4, 4)), Box((4, 0), (4, 4))
    with pytest.raises(CheckpointError, match="rank 0 has w/exp_avg twice"):
        make_plan({0: [spec(half[0]), spec(half[1])]})


def test_who_has_all_of_a_chunk_need_be_sent_nothing():
    halves = Box((0, 0), (4, 4)), Box((4, 0), (4, 4))
    sources = Sources(((3, halves[0]), (5, halves[1])))
    inside, across = Box((1, 0), (3, 4)), Box((3, 0), (2, 4))
    for rank, chunk, whole in [
        *[(3, inside, True), (3, halves[0], True), (3, across, False), (3, halves[1], False)],
        *[(5, halves[1], True), (5, inside, False), (5, across, False), (4, inside, False)],
    ]:
        assert sources.has_whole(rank, chunk) == whole, (rank, chunk)


def test_what_was_asked_of_sources_does_not_show():
    one, other = (Sources(((3, Box((0, 0), (8, 4))),)) for _ in range(2))
    one.of_chunk(Box((0, 0), (4, 4)))
    assert one == other
    assert (hash(one), repr(one), one.digest) == (hash(other), repr(other), other.digest)


def test_an_array_that_is_told_twice_is_refused():
    key, other = ArrayKey("w", "fp32"), ArrayKey("v", "fp32")
    arrays = [ArrayLayout(k, "float32", (8, 4), {0: Box.whole((8, 4))}) for k in (key, other, key)]
    with pytest.raises(CheckpointError, match=r"^w/fp32 is there twice; give each tensor a name of"):
        plan_arrays(arrays, [0])


def test_arrays_may_share_what_says_who_holds_them():
    """Thousands of boxes are then compared once, and the plan is the same."""
    shape, keys = (8, 64), [ArrayKey(f"w.{i}", "fp32") for i in range(5)]
    boxes = dict(enumerate(cut(shape, (4, 1))))
    shared = plan_arrays([ArrayLayout(key, "float32", shape, boxes) for key in keys], boxes)
    apart = plan_arrays([ArrayLayout(key, "float32", shape, {**boxes}) for key in keys], boxes)
    assert content(shared) == content(apart)
    assert shared.digest == apart.digest
    for made in (shared, apart):
        assert len({id(array.chunk_plan.sources) for array in made.arrays}) == 1, (
            "kept once, as memory counts"
        )


def test_copies_are_written_by_ranks_that_write_little_else():
    shape = (512, 512)
    whole = lambda name: ShardSpec(ArrayKey(name, "fp32"), "float32", shape, Box.whole(shape))  # noqa: E731
    made = make_plan({0: [whole("a"), whole("b")], 1: [whole("b")], 2: [whole("c")]}, chunk_bytes=1 << 20)
    assert [array.owner for array in made.arrays] == [0, 1, 2]
    made = make_plan({0: [whole("b")], 1: [whole("a"), whole("b")]}, chunk_bytes=1 << 20)
    assert [array.owner for array in made.arrays] == [1, 0]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_copies_share_the_writing(ranks):
    """Many arrays of mixed sizes that all ranks hold: nobody writes much more than a fair share."""
    shapes = [(rng.choice([64, 512, 4096]), rng.choice([1, 64, 1024])) for rng in [random.Random(1)] * 200]
    specs = [ShardSpec(ArrayKey(f"w.{i}", "fp32"), "float32", s, Box.whole(s)) for i, s in enumerate(shapes)]
    made = make_plan(dict.fromkeys(range(ranks), specs), chunk_bytes=1 << 20)
    written = Counter()
    for array in made.arrays:
        for chunk in array.chunk_plan.chunks:
            written[chunk.writer] += math.prod(chunk.box.shape) * 4
    assert made.bytes_written() == written
    mean = sum(written.values()) / ranks
    assert mean == sum(map(math.prod, shapes)) * 4 / ranks
    assert max(written.values()) <= 1.25 * mean + (1 << 20)
    assert min(written.values()) >= 0.75 * mean - (1 << 20)


@pytest.mark.parametrize("cuts", [(1, 1), (2, 1)], ids=str)
def test_each_copy_writes_one_range_of_a_large_array(cuts):
    """So that of its shard it need not bring more than its share."""
    made = plan_of((64, 1024), cut((64, 1024), cuts) * 4, chunk_bytes=1 << 12, gather_below=0)
    assert made.bytes_written() == dict.fromkeys(made.ranks, 64 * 1024 * 4 // len(made.ranks))
    for rank in made.ranks:
        (part,) = made.parts(rank).values()
        assert part.shape == (64 // len(made.ranks), 1024)


@settings(deadline=None, max_examples=100)
@given(layouts(), st.fixed_dictionaries(SIZES))
def test_bytes_written_are_those_of_all_arrays_once(layout, sizes):
    made = make_plan(layout, **sizes)
    arrays = {s.key: math.prod(s.shape) * DTYPES[s.dtype] for specs in layout.values() for s in specs}
    assert sum(made.bytes_written().values()) == sum(arrays.values())
    assert made.bytes_written().keys() == layout.keys(), "nought by those who write nothing"
    assert {array.key: array.nbytes for array in made.arrays} == arrays


def test_gathered_arrays_even_out_the_load():
    specs = lambda box: [ShardSpec(ArrayKey(f"b.{i}", "fp32"), "float32", (8, 64), box) for i in range(40)]  # noqa: E731
    made = make_plan({rank: specs(box) for rank, box in enumerate(cut((8, 64), (4, 1)))})
    assert Counter(array.owner for array in made.arrays) == Counter(dict.fromkeys(range(4), 10))
    assert {*made.bytes_written().values()} == {10 * 8 * 64 * 4}
    rows = plan_of((4, 64), cut((4, 64), (1, 4)), chunk_bytes=64 * 4, gather_below=1 << 10)
    assert rows.bytes_written() == dict.fromkeys(range(4), 64 * 4), "within one array, too"


def test_of_copies_that_are_gathered_the_writer_brings_its_own():
    specs = lambda box: [ShardSpec(ArrayKey(f"b.{i}", "fp32"), "float32", (8, 4), box) for i in range(4)]  # noqa: E731
    made = make_plan({rank: specs(box) for rank, box in enumerate(cut((8, 4), (2, 1)) * 2)})
    assert [array.owner for array in made.arrays] == [0, 1, 2, 3]
    senders = [[rank for rank, _ in array.chunk_plan.sources.pieces] for array in made.arrays]
    assert senders == [[0, 1], [0, 1], [2, 1], [0, 3]], "or else the first"
