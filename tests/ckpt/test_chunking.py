"""Chunks and files of arrays, by the boxes that ranks hold."""

import math

import numpy as np
import pytest
from ckpt_helpers import cut
from ckpt_layouts import plan_of

from ckpt import ArrayKey, ArrayLayout, Box, CheckpointError, ShardSpec, make_plan
from ckpt.chunking import cut_array
from ckpt.parts import ArrayInfo
from ckpt.read import pieces


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
        (36_036, 564),  # in 64, which are not halves
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
        (5, 2, 1),  # nearer to 2 than 5 is
    ],
)
def test_parts_are_cut_into_an_eighth_to_eight_times_as_many_chunks_as_wanted(rows, parts, made):
    boxes, wanted = cut((2 * rows, 4), (2, 1)), math.ceil(rows * 16 / parts)
    (array,) = plan_of((2 * rows, 4), boxes, files="writer", chunk_bytes=wanted, gather_below=0).arrays
    assert array.grid.chunk_shape == (rows // made, 4)


def test_a_chunk_of_a_few_rows_may_be_larger_than_wanted():
    for size, chunk in [(96, (2, 16)), (64, (1, 16)), (63, (1, 8))]:
        (array,) = plan_of((5, 16), [Box.whole((5, 16))], chunk_bytes=size).arrays
        assert array.grid.chunk_shape == chunk, "whole rows, if each is no larger"


@pytest.mark.parametrize(("wanted", "straddles"), [(808, False), (807, True)])
def test_chunks_reach_over_bounds_rather_than_be_more_than_twice_as_large(wanted, straddles):
    """An eighth of 808 rows of 16 bytes is nearest to the size wanted: 101 rows, 1,616 bytes."""
    boxes = cut((1616, 4), (2, 1))
    (array,) = plan_of((1616, 4), boxes, chunk_bytes=wanted, gather_below=0).arrays
    assert (array.chunk_plan.sources is not None) == straddles
    assert (array.grid.chunk_shape == (101, 4)) != straddles


def test_a_number_is_one_chunk_whatever_size_is_wanted():
    layout = ArrayLayout(ArrayKey("w", "fp32"), "float64", (), {0: Box.whole(())})
    found = cut_array(layout, 1, 0, "array")
    assert (found.gathered, found.chunk_shape, found.file_shape) == (False, (), ())


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_runs_are_weighed_by_their_bytes(dtype):
    """Ranks share out arrays of all types by these."""
    layout = ArrayLayout(ArrayKey("w", "fp32"), dtype, (8, 4), dict(enumerate(cut((8, 4), (2, 1)))))
    found = cut_array(layout, 1 << 20, 0, "array")
    assert [[run.nbytes for run in runs] for runs in found.runs] == [[16 * np.dtype(dtype).itemsize]] * 2


def test_any_copy_may_write_what_is_gathered_but_only_the_first_what_reaches_over():
    small, large = cut((8, 4), (2, 1)) * 2, cut((2018, 1024), (2, 1)) * 2
    for shape, boxes, writers in [((8, 4), small, {0, 1, 2, 3}), ((2018, 1024), large, {0, 1})]:
        layout = ArrayLayout(ArrayKey("w", "fp32"), "float32", shape, dict(enumerate(boxes)))
        found = cut_array(layout, 500_000, 512 << 10, "array")
        assert found.gathered
        assert {rank for ranks in found.candidates for rank in ranks} == writers


def test_who_holds_some_of_a_chunk_may_write_it():
    boxes = dict(zip((1, 8, 2, 9), cut((8, 64), (4, 1)), strict=True))
    layout = ArrayLayout(ArrayKey("w", "fp32"), "float32", (8, 64), boxes)
    for size, ranks in [(512, ((1,), (8,), (2,), (9,))), (1024, ((1, 8), (2, 9))), (2048, ((1, 2, 8, 9),))]:
        assert cut_array(layout, size, 1 << 10, "array").candidates == ranks, "in order"


def test_chunks_of_what_is_gathered_are_a_few_of_the_largest_parts():
    boxes = [Box((0, 0), (1, 256)), Box((1, 0), (1000, 256))]
    (array,) = plan_of((1001, 256), boxes, gather_below=2048).arrays
    assert array.chunk_plan.sources is not None
    assert array.grid.chunk_shape == (1001, 256)
    for least in (2048, 1025):  # two of the smallest to be written in place, or four of the parts
        (array,) = plan_of((1001, 256), cut((1001, 256), (1001, 1)), gather_below=least).arrays
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
        ((768, 4096), (1, 1), (192, 1024)),  # 12 MiB: 4, as from 16 on there are 8
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


@pytest.mark.parametrize(("most", "gathered"), [(256, False), (64, True)])
def test_files_of_one_writer_each_have_256_mebibytes_at_most_and_gathered_ones_64(most, gathered):
    for mebibytes, files in [(most, 1), (most + 1, 2)]:
        shape = (mebibytes * 256, 1024)
        boxes = [Box.whole(shape)]
        if gathered:
            boxes = [Box((0, 0), (1, 1024)), Box((1, 0), (shape[0] - 1, 1024))]
        layout = ArrayLayout(ArrayKey("w", "fp32"), "float32", shape, dict(enumerate(boxes)))
        found = cut_array(layout, 1 << 20, 512 << 10, "writer")
        assert found.gathered == gathered
        assert -(-shape[0] // found.file_shape[0]) == files, mebibytes
