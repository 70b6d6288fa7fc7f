"""Plans of random layouts: each chunk has one writer, who holds or receives all of it."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from ckpt_helpers import Ranks, cut, even_cut
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import ArrayKey, ArrayLayout, Box, CheckpointError, Plan, ShardSpec, make_plan
from ckpt.box import grid
from ckpt.plan import ArrayPlan, plan_arrays

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1}
Interval = tuple[int, int]


@st.composite
def cut_of_a_dim(draw: st.DrawFn, length: int, most: int) -> list[Interval]:
    """Draw intervals that cover a dim: whole, even, strided (cut by tensor, then ZeRO), or ragged."""
    kind = draw(st.sampled_from(["whole", "even", "strided", "ragged"]))
    if kind == "whole":
        return [(0, length)]
    if kind == "even":
        return even_cut(length, draw(st.integers(1, most)))
    if kind == "strided":
        inner = draw(st.integers(1, max(most // 2, 1)))
        return [(o + p, n) for o, m in even_cut(length, min(2, most)) for p, n in even_cut(m, inner)]
    points = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=most - 1))})
    return [(a, b - a) for a, b in pairwise(points)] or [(0, 0)]


@st.composite
def guillotine(draw: st.DrawFn, box: Box, depth: int) -> list[Box]:
    """Draw a tiling that isn't a product of intervals: each half is cut in its own way."""
    dim = draw(st.integers(0, len(box.shape) - 1)) if box.shape else 0
    if depth == 0 or not box.shape or box.shape[dim] < 2:
        return [box]
    at = draw(st.integers(1, box.shape[dim] - 1))
    low = Box(box.offset, (*box.shape[:dim], at, *box.shape[dim + 1 :]))
    offset = (*box.offset[:dim], box.offset[dim] + at, *box.offset[dim + 1 :])
    high = Box(offset, (*box.shape[:dim], box.shape[dim] - at, *box.shape[dim + 1 :]))
    return [*draw(guillotine(low, depth - 1)), *draw(guillotine(high, depth - 1))]


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...], most: int) -> list[Box]:
    """Draw at most `most` boxes, some perhaps empty, that cover the array exactly once."""
    if draw(st.booleans()):
        return draw(guillotine(Box.whole(shape), int(math.log2(most))))
    intervals: list[list[Interval]] = []
    for length in shape:
        intervals.append(draw(cut_of_a_dim(length, max(most // math.prod(map(len, intervals)), 1))))
    return [Box(tuple(o for o, _ in c), tuple(n for _, n in c)) for c in product(*intervals)]


@st.composite
def layouts(draw: st.DrawFn, ranks: range = range(12), atom: str = "layer") -> Ranks:
    """Draw the parts of a few arrays that up to 8 ranks hold: boxes, replicas, empty boxes, or nothing."""
    members = draw(st.lists(st.sampled_from(ranks), min_size=1, max_size=min(8, len(ranks)), unique=True))
    layout: Ranks = {rank: [] for rank in members}
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 12), max_size=3)))
        boxes = draw(boxes_of(shape, len(members)))
        extra = [None, Box((0,) * len(shape), (0,) * len(shape)) if shape else None, *boxes]
        held = boxes + [draw(st.sampled_from(extra)) for _ in range(len(members) - len(boxes))]
        dtype = draw(st.sampled_from([*DTYPES]))
        fine = draw(st.sampled_from([None, *range(1, len(shape))]))
        for rank, box in zip(members, draw(st.permutations(held)), strict=True):
            if box is not None:
                layout[rank].append(ShardSpec(ArrayKey(f"{atom}.{i}", "fp32"), dtype, shape, box, fine))
    return layout


SIZES = {
    "chunk_bytes": st.sampled_from([8, 32, 100, 1 << 20]),
    "gather_below": st.sampled_from([0, 8, 40, 1 << 20]),
}


def held_of(layout: Ranks, key: ArrayKey) -> dict[int, Box]:
    """Return each rank's box of an array."""
    return {rank: s.box for rank, specs in layout.items() for s in specs if s.key == key}


def check(layout: Ranks, plan: ArrayPlan) -> None:
    """Check the properties that the plan of every array must have."""
    held = held_of(layout, plan.key)
    regular = dict(grid(plan.shape, plan.chunk_shape))
    assert all(n > 0 for n in plan.chunk_shape), "zarr's chunks are never empty"
    assert {chunk.index: chunk.box for chunk in plan.chunks} == regular, "the chunks are zarr's grid"
    assert len(plan.chunks) == len(regular), "each chunk has one writer"
    times = np.zeros(plan.shape, np.int8)
    for chunk in plan.chunks:
        times[chunk.box.slices] += 1
    assert (times == 1).all(), "each element is in one chunk"
    assert plan.owner in ({chunk.writer for chunk in plan.chunks} or held), "one who writes there, if any"
    if not plan.sources:
        for chunk in plan.chunks:
            assert chunk.box.within(held[chunk.writer]), "written by one who holds all of it"
        return
    assert all(held[c.writer].intersect(c.box) for c in plan.chunks), "written by one who holds a part"
    times = np.zeros(plan.shape, np.int8)
    for source, box in plan.sources:
        assert held[source] == box, "sent by one who holds it"
        times[box.slices] += 1
    assert (times == 1).all(), "each element is sent once"


@settings(deadline=None, max_examples=250)
@given(layouts(), st.fixed_dictionaries(SIZES), st.sampled_from([4, 16, 1 << 20]))
def test_every_chunk_has_one_writer_and_every_element_is_covered(layout, sizes, tile_bytes):
    with mock.patch.dict(
        "ckpt.chunking.TILES", {8: 4 * tile_bytes, 4: tile_bytes, 2: tile_bytes}
    ):  # so that small arrays have narrow chunks too
        whole = make_plan(layout, **sizes)
        shuffled = {r: random.Random(0).sample(layout[r], len(layout[r])) for r in sorted(layout)[::-1]}
        again = make_plan(shuffled, **sizes)
        kinds = {s.key: s for specs in shuffled.values() for s in specs}.values()
        other = [ArrayLayout(s.key, s.dtype, s.shape, held_of(layout, s.key), s.fine_dim) for s in kinds]
        assert plan_arrays(other, layout, **sizes) == whole, "nor whether it is told by array or by rank"
    assert [p.key for p in whole.arrays] == sorted({s.key for specs in layout.values() for s in specs})
    for array in whole.arrays:
        check(layout, array)
    assert whole.ranks == tuple(sorted(layout))
    assert (again, again.digest) == (whole, whole.digest), "whatever order ranks and arrays come in"


@settings(deadline=None, max_examples=150)
@given(layouts(), st.fixed_dictionaries(SIZES))
def test_a_rank_brings_what_it_writes_or_sends(layout, sizes):
    whole = make_plan(layout, **sizes)
    for rank in layout:
        parts, needed = whole.parts(rank), {}
        for array in whole.arrays:
            mine = [c.box for c in array.chunks if c.writer == rank and not array.sources]
            mine += [box for source, box in array.sources if source == rank]
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
    together = make_plan(b | a, **sizes).arrays
    assert together == make_plan(a, **sizes).arrays + make_plan(b, **sizes).arrays


@settings(deadline=None, max_examples=150)
@given(layouts(range(3)), layouts(range(3)), st.fixed_dictionaries(SIZES), st.fixed_dictionaries(SIZES))
def test_digests_are_equal_where_the_plans_are(a, b, sizes, others):
    plans = [make_plan(layout, **given) for layout in (a, b, {**a, 7: []}) for given in (sizes, others)]
    for one, other in product(plans, plans):
        assert (one.digest == other.digest) == (one == other)


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


def plan_of(shape: tuple[int, ...], boxes: list[Box], fine_dim: int | None = None, **sizes: int) -> Plan:
    """Return the checked plan of one fp32 array of which rank r holds `boxes[r]`."""
    key = ArrayKey("w", "fp32")
    layout = {rank: [ShardSpec(key, "float32", shape, box, fine_dim)] for rank, box in enumerate(boxes)}
    made = make_plan(layout, **sizes)
    check(layout, made.arrays[0])
    return made


@pytest.mark.parametrize(
    ("boxes", "why"),
    [
        ([], "no rank holds anything"),
        ([Box((0, 0), (4, 4))], "the second half is held by none"),
        ([Box((0, 0), (4, 4)), Box((3, 0), (5, 4))], "one row is held twice"),
        ([Box((0, 0), (8, 4)), Box((0, 0), (4, 4))], "a part of a copy"),
        ([Box((0, 0), (4, 4)), Box((4, 2), (4, 4))], "beyond the end"),
        ([Box((0, 0), (4, 4)), Box((2, 0), (4, 4))], "the right size, but overlapping and with a gap"),
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
    with pytest.raises(CheckpointError, match=r"w/exp_avg.* on rank 3 .* on rank 5"):
        make_plan({3: [spec(half[0])], 5: [replace(spec(half[1]), **change)]})


def test_a_rank_that_lists_an_array_twice_is_refused():
    half = Box((0, 0), (4, 4)), Box((4, 0), (4, 4))
    with pytest.raises(CheckpointError, match="rank 0 has w/exp_avg twice"):
        make_plan({0: [spec(half[0]), spec(half[1])]})


@pytest.mark.parametrize("cuts", [(4, 1), (1, 4), (2, 2), (3, 1)], ids=str)
def test_even_cuts_of_large_arrays_are_written_in_place(cuts):
    """`fully_shard` and DTensor cut by ceil(n / k): no byte moves, whether or not k divides n."""
    (array,) = plan_of((1000, 1024), cut((1000, 1024), cuts)).arrays
    assert array.sources == ()
    assert {chunk.writer for chunk in array.chunks} == set(range(math.prod(cuts)))


def test_small_parts_are_gathered_and_small_wholes_are_not():
    assert plan_of((8, 4), cut((8, 4), (4, 1))).arrays[0].sources
    assert not plan_of((8, 4), [Box.whole((8, 4))] * 4).arrays[0].sources


def test_chunks_are_near_the_size_wanted():
    """Cut and uncut dims, and lengths that divide badly: within 1/4 and 2 of what was asked for."""
    for rows, parts in [(4096, 1), (4096, 4), (50304, 3), (50257, 1), (6000, 7)]:
        (array,) = plan_of((rows, 512), cut((rows, 512), (parts, 1)), chunk_bytes=1 << 20).arrays
        assert (1 << 18) <= math.prod(array.chunk_shape) * 4 <= (2 << 20), (rows, parts, array.chunk_shape)


@pytest.mark.parametrize(
    ("shape", "cuts", "chunk"),
    [
        ((1024, 4096), (1, 1), (1024, 512)),  # 8 tiles
        ((1024, 4096), (2, 1), (512, 512)),  # as many, of 1 MiB each
        ((1024, 4096), (1, 2), (1024, 512)),  # as many: 4 of each half
        ((1024, 4096), (4, 1), (256, 1024)),  # 4, as 8 would be less than 1 MiB
        ((1024, 4096), (32, 1), (32, 2048)),  # 64 in all
        ((256, 512), (1, 1), (256, 256)),  # no narrower than 256 KiB
        ((128, 512), (1, 1), (128, 512)),  # less than that
        ((1024, 4099), (1, 1), (512, 4099)),  # a prime: tiles are equal, or not made
        ((1024, 4092), (1, 1), (1024, 1023)),  # 8 don't divide it, 4 do
        ((1023, 4096), (3, 3), (1023, 512)),  # gathered, as 4096 / 3 is ragged in small parts
        ((16384, 2064), (1, 1), (8192, 258)),  # of 16 MiB after all
    ],
    ids=str,
)
def test_chunks_are_narrow_along_the_fine_dim(shape, cuts, chunk):
    gather_below = (1 << 18) if cuts != (3, 3) else (1 << 30)
    (array,) = plan_of(shape, cut(shape, cuts), 1, gather_below=gather_below).arrays
    assert array.chunk_shape == chunk
    assert bool(array.sources) == (cuts == (3, 3))
    (rows,) = plan_of(shape, cut(shape, cuts), gather_below=gather_below).arrays
    assert rows.chunk_shape[1] == (shape[1] if array.sources else -(-shape[1] // cuts[1])), "else whole rows"


def test_arrays_that_are_held_alike_are_cut_by_their_own_type_and_fine_dim():
    shape, chunks = (1024, 2048), [(1024, 2048), (1024, 256), (512, 2048), (1024, 256)]
    kinds = [("float32", None), ("float32", 1), ("float64", None), ("float64", 1)]
    box = Box.whole(shape)
    specs = [ShardSpec(ArrayKey(f"w.{i}", "fp32"), d, shape, box, fine) for i, (d, fine) in enumerate(kinds)]
    made = make_plan({0: specs}, chunk_bytes=8 << 20)
    assert [array.chunk_shape for array in made.arrays] == chunks


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_copies_share_the_writing(ranks):
    """Many arrays of mixed sizes that all ranks hold: nobody writes much more than a fair share."""
    shapes = [(rng.choice([64, 512, 4096]), rng.choice([1, 64, 1024])) for rng in [random.Random(1)] * 200]
    specs = [ShardSpec(ArrayKey(f"w.{i}", "fp32"), "float32", s, Box.whole(s)) for i, s in enumerate(shapes)]
    made = make_plan(dict.fromkeys(range(ranks), specs), chunk_bytes=1 << 20)
    written = Counter()
    for array in made.arrays:
        for chunk in array.chunks:
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
