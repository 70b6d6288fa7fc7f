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
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import cut
from ckpt_layouts import DTYPES, SIZES, check, content, held_of, layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt import ArrayKey, ArrayLayout, Box, CheckpointError, Plan, ShardSpec, make_plan
from ckpt.chunking import cut_array
from ckpt.parts import ArrayInfo
from ckpt.plan import Sources, plan_arrays
from ckpt.read import pieces


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


def plan_of(shape: tuple[int, ...], boxes: list[Box], fine_dim: int | None = None, **sizes: Any) -> Plan:
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


@pytest.mark.parametrize("cuts", [(4, 1), (1, 4), (2, 2), (3, 1)], ids=str)
def test_even_cuts_of_large_arrays_are_written_in_place(cuts):
    """`fully_shard` and DTensor cut by ceil(n / k): no byte moves, whether or not k divides n."""
    (array,) = plan_of((1100, 1024), cut((1100, 1024), cuts)).arrays
    assert array.chunk_plan.sources is None
    assert {chunk.writer for chunk in array.chunk_plan.chunks} == set(range(math.prod(cuts)))


def test_small_parts_are_gathered_and_small_wholes_are_not():
    assert plan_of((8, 4), cut((8, 4), (4, 1))).arrays[0].chunk_plan.sources is not None
    assert plan_of((8, 4), [Box.whole((8, 4))] * 4).arrays[0].chunk_plan.sources is None


def test_what_is_gathered_is_what_is_smaller_than_half_a_mebibyte():
    for rows, gathered in [(255, True), (256, False)]:
        (array,) = plan_of((4 * rows, 512), cut((4 * rows, 512), (4, 1))).arrays
        assert (array.chunk_plan.sources is not None) == gathered

    for length, gathered in [(131_071, True), (131_072, False)]:
        (array,) = plan_of((4 * length,), cut((4 * length,), (4,))).arrays
        assert (array.chunk_plan.sources is not None) == gathered


def test_chunks_are_of_four_mebibytes_from_64_of_them_on_and_of_one_at_least():
    key = ArrayKey("w", "fp32")
    for rows, expected in [
        (131_072, 1024),
        (131_071, 1024),
        (65_536, 1024),
        (32_768, 512),
        (16_384, 256),
        (8_192, 256),
    ]:
        shape = (rows, 1024)
        (array,) = make_plan({0: [ShardSpec(key, "float32", shape, Box.whole(shape))]}).arrays
        assert array.grid.chunk_shape == (expected, 1024), rows


def test_chunks_reach_over_the_bounds_of_parts_of_eight_chunks_without_a_divisor():
    """1,009 rows of 4 KiB, a prime: smaller parts are one large chunk, each where it is."""
    part = 1009 * 4096
    for size, straddles in [(part // 7, False), (part // 8 + 1, False), (part // 8, True)]:
        (array,) = plan_of((2018, 1024), cut((2018, 1024), (2, 1)), chunk_bytes=size).arrays
        assert (array.chunk_plan.sources is not None) == straddles, size
        assert (array.grid.chunk_shape == (1009, 1024)) != straddles
    (array,) = plan_of((4, 2 * 1_048_583), cut((4, 2 * 1_048_583), (1, 2)), chunk_bytes=1 << 20).arrays
    assert array.chunk_plan.sources is not None, "along the second dim, where the first is cut into ones"
    assert array.grid.chunk_shape[0] == 1
    assert array.grid.chunk_shape[1] * 4 <= 2 << 20


@pytest.mark.parametrize(
    ("rows", "parts", "made"),
    [
        (127, 16, 127),  # 7.9 times as many
        (131, 16, 1),  # 8.2 times: left whole
        (7 * 457, 56, 7),  # an eighth as many
        (8 * 577, 72, 1),  # a ninth
    ],
)
def test_parts_are_cut_into_an_eighth_to_eight_times_as_many_chunks_as_wanted(rows, parts, made):
    boxes, wanted = cut((2 * rows, 4), (2, 1)), math.ceil(rows * 16 / parts)
    (array,) = plan_of((2 * rows, 4), boxes, files="writer", chunk_bytes=wanted, gather_below=0).arrays
    assert array.grid.chunk_shape == (rows // made, 4)


def test_any_copy_may_write_what_is_gathered_but_only_the_first_what_reaches_over():
    small, large = cut((8, 4), (2, 1)) * 2, cut((2018, 1024), (2, 1)) * 2
    for shape, boxes, writers in [((8, 4), small, {0, 1, 2, 3}), ((2018, 1024), large, {0, 1})]:
        layout = ArrayLayout(ArrayKey("w", "fp32"), "float32", shape, dict(enumerate(boxes)))
        found = cut_array(layout, 500_000, 512 << 10, "array")
        assert found.gathered
        assert {rank for ranks in found.candidates for rank in ranks} == writers


def test_chunks_of_what_is_gathered_are_a_few_of_the_largest_parts():
    boxes = [Box((0, 0), (1, 256)), Box((1, 0), (1000, 256))]
    (array,) = plan_of((1001, 256), boxes, gather_below=2048).arrays
    assert array.chunk_plan.sources is not None
    assert array.grid.chunk_shape == (1001, 256)
    (array,) = plan_of((1001, 256), cut((1001, 256), (1001, 1)), gather_below=2048).arrays
    assert array.grid.chunk_shape == (4, 256)


def test_of_parts_that_do_not_fit_the_first_are_shown():
    boxes = cut((12, 4), (6, 1))[:5]
    with pytest.raises(CheckpointError, match="exactly once") as caught:
        plan_of((12, 4), boxes)
    shown = ", ".join(f"[{2 * i}, 0]+[2, 4]" for i in range(4))
    assert str(caught.value).endswith(f"of w/fp32 [12, 4] don't cover it exactly once: {shown}, ...")
    with pytest.raises(CheckpointError, match=r"\+\[2, 4\]$"):
        plan_of((12, 4), boxes[:4])


def test_chunks_are_near_the_size_wanted():
    """Cut and uncut dims, and lengths that divide badly: within 1/4 and 2 of what was asked for."""
    for rows, parts in [(4096, 1), (4096, 4), (50304, 3), (50257, 1), (6000, 7)]:
        (array,) = plan_of((rows, 512), cut((rows, 512), (parts, 1)), chunk_bytes=1 << 20).arrays
        assert (1 << 18) <= math.prod(array.grid.chunk_shape) * 4 <= (2 << 20), (rows, parts)


@pytest.mark.parametrize(
    ("shape", "cuts", "chunk"),
    [
        ((4096, 8192), (1, 1), (512, 1024)),  # 128 MiB: 8 tiles, and each again in 8
        ((4096, 8192), (8, 1), (512, 1024)),  # the same, where ranks make the second cut
        ((1024, 4096), (1, 1), (512, 512)),  # 16 MiB: 8 tiles of 2 MiB, each again in 2
        ((1024, 4096), (1, 2), (512, 512)),  # as many: 4 of each half
        ((1024, 4096), (8, 1), (128, 1024)),  # 4, as 8 would be less than 512 KiB
        ((1024, 4096), (16, 1), (64, 2048)),  # 2, likewise
        ((1024, 4096), (9, 9), (512, 512)),  # 8, as its small parts are gathered
        ((1024, 4099), (1, 1), (32, 4099)),  # a prime: tiles are equal, or not made
        ((1024, 4092), (1, 1), (256, 1023)),  # 4 divide it
        ((16384, 2064), (1, 1), (2048, 258)),  # 8 x 8
    ],
    ids=str,
)
@pytest.mark.parametrize("files", ["array", "writer"])
def test_chunks_are_narrow_along_the_fine_dim(shape, cuts, chunk, files):
    (array,) = plan_of(shape, cut(shape, cuts), 1, files=files).arrays
    gathered = array.chunk_plan.sources is not None
    assert (array.grid.chunk_shape, gathered) == (chunk, cuts == (9, 9))
    (rows,) = plan_of(shape, cut(shape, cuts), files=files).arrays
    assert rows.grid.chunk_shape[1] == (shape[1] if gathered else -(-shape[1] // cuts[1])), "else whole rows"


@pytest.mark.parametrize("saved", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("loads", [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)], ids=str)
def test_parts_in_halves_and_quarters_are_whole_chunks(saved, loads):
    """A rank that loads a half or a quarter of nine megabytes, along either dim, reads nothing in vain."""
    shape = (768, 3072)
    (array,) = plan_of(shape, cut(shape, saved), 1).arrays
    info = ArrayInfo(array.key, array.dtype, array.grid, np.empty(0, np.uint32))
    for box in cut(shape, loads):
        assert sum(array.grid.payload for _ in pieces(info, box)) == math.prod(box.shape) * 4


def test_arrays_that_are_held_alike_are_cut_by_their_own_type_and_fine_dim():
    shape, chunks = (1024, 2048), [(128, 2048), (512, 512), (64, 2048), (512, 256)]
    kinds = [("float32", None), ("float32", 1), ("float64", None), ("float64", 1)]
    box = Box.whole(shape)
    specs = [ShardSpec(ArrayKey(f"w.{i}", "fp32"), d, shape, box, fine) for i, (d, fine) in enumerate(kinds)]
    made = make_plan({0: specs}, chunk_bytes=8 << 20)
    assert [array.grid.chunk_shape for array in made.arrays] == chunks


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
