"""Random layouts for `ckpt`'s tests, and the properties that every plan must have."""

import math
from itertools import pairwise, product
from typing import Any

import numpy as np
from ckpt_helpers import Ranks, even_cut
from hypothesis import strategies as st

from ckpt import ArrayKey, Box, Plan, ShardSpec, make_plan
from ckpt.box import grid
from ckpt.plan import ArrayPlan

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
    "files": st.sampled_from(["array", "writer"]),
}
"""Options of `make_plan`."""


def held_of(layout: Ranks, key: ArrayKey) -> dict[int, Box]:
    """Return each rank's box of an array."""
    return {rank: s.box for rank, specs in layout.items() for s in specs if s.key == key}


def content(plan: Plan) -> tuple:
    """Return all that a plan says, to be compared with another's."""
    arrays = []
    for a in plan.arrays:
        sources = a.chunk_plan.sources
        arrays.append((a.key, a.dtype, a.owner, a.grid, a.chunk_plan.chunks, sources and sources.pieces))
    return plan.ranks, plan.files, arrays


def check(layout: Ranks, plan: ArrayPlan) -> None:
    """Check the properties that the plan of every array must have."""
    held, chunks = held_of(layout, plan.key), plan.chunk_plan.chunks
    regular = dict(grid(plan.shape, plan.grid.chunk_shape))
    assert all(n > 0 for n in plan.grid.chunk_shape), "zarr's chunks are never empty"
    assert all(c <= max(n, 1) for c, n in zip(plan.grid.chunk_shape, plan.shape, strict=True)), "nor larger"
    assert all(f % c == 0 for f, c in zip(plan.grid.file_shape, plan.grid.chunk_shape, strict=True))
    assert {chunk.index: chunk.box for chunk in chunks} == regular, "the chunks are zarr's grid"
    assert [plan.grid.number(chunk.index) for chunk in chunks] == [*range(len(regular))], "in C order"
    assert plan.chunk_plan.writers.tolist() == [chunk.writer for chunk in chunks]
    assert plan.chunk_plan.by_writer == {
        w: [c for c in chunks if c.writer == w] for w in {*plan.chunk_plan.writers.tolist()}
    }
    times = np.zeros(plan.shape, np.int8)
    for chunk in chunks:
        times[chunk.box.slices] += 1
    assert (times == 1).all(), "each element is in one chunk"
    assert plan.owner in ({chunk.writer for chunk in chunks} or held), "one who writes there, if any"
    if plan.chunk_plan.sources is None:
        for chunk in chunks:
            assert chunk.box.within(held[chunk.writer]), "written by one who holds all of it"
        return
    pieces = plan.chunk_plan.sources.pieces
    times = np.zeros(plan.shape, np.int8)
    for source, box in pieces:
        assert held[source] == box, "sent by one who holds it"
        times[box.slices] += 1
    assert (times == 1).all(), "each element is sent once"
    for chunk in chunks:
        expected = [(source, part) for source, box in pieces if (part := box.intersect(chunk.box))]
        assert list(plan.chunk_plan.sources.of_chunk(chunk.box)) == expected


def plan_of(shape: tuple[int, ...], boxes: list[Box], fine_dim: int | None = None, **sizes: Any) -> Plan:
    """Return the checked plan of one fp32 array of which rank r holds `boxes[r]`."""
    key = ArrayKey("w", "fp32")
    layout = {rank: [ShardSpec(key, "float32", shape, box, fine_dim)] for rank, box in enumerate(boxes)}
    made = make_plan(layout, **sizes)
    check(layout, made.arrays[0])
    return made
