"""Who writes what: a pure function of what each rank holds.

Every rank computes the same plan from the same layout, so that nothing is negotiated. The plan proves
three things before a byte moves: all ranks agree on each array's shape and type, their boxes cover it
exactly once (or are copies of each other), and each chunk has one writer.

An array is written in one of two ways. *In place*: the cuts between the ranks' boxes are a regular grid,
which is what zarr's chunks are; each rank writes its own chunks, and ranks that hold copies share them.
*Gathered*: the cut is ragged, or the parts are too small to be files; one rank gets all and writes it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ckpt.box import Box, Shape, grid
from ckpt.errors import CheckpointError

GATHER_BELOW_BYTES = 256 << 10
"""A rank's part of an array that is smaller than this isn't worth a file of its own."""

CHUNK_BYTES = 16 << 20
"""Chunks are cut to about this size: large enough to stream, small enough to share and to read in part."""


class ArrayKey(NamedTuple):
    """One array of a checkpoint: a state (`fp32`, `exp_avg`, ...) of an atom."""

    atom: str
    state: str


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """What one rank holds of one array."""

    key: ArrayKey
    dtype: str
    """A numpy name: `float32`, `int64`, ..."""
    shape: Shape
    """Of the whole array."""
    box: Box
    """The rank's part; empty where it holds nothing of it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    index: Shape
    box: Box
    writer: int


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    """How one array is written."""

    key: ArrayKey
    dtype: str
    shape: Shape
    chunk_shape: Shape
    chunks: tuple[Chunk, ...]
    sources: tuple[tuple[int, Box], ...]
    """For a gathered array, which rank sends which box to the writer; otherwise empty."""


Layout = Sequence[Sequence[ShardSpec]]
"""What each rank holds, by rank."""


class _Array(NamedTuple):
    dtype: str
    shape: Shape
    holders: Mapping[Box, list[int]]

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


def make_plan(
    layout: Layout, *, chunk_bytes: int = CHUNK_BYTES, gather_below: int = GATHER_BELOW_BYTES
) -> list[ArrayPlan]:
    """Plan the writing of all arrays in `layout`, by key.

    Raises:
        CheckpointError: the ranks disagree about an array, or their boxes leave gaps or overlap.
    """
    arrays = _by_array(layout)
    load = [0] * len(layout)  # bytes given to each rank so far
    plans: dict[ArrayKey, ArrayPlan] = {}
    ragged: list[ArrayKey] = []
    for key, array in arrays.items():
        cuts = _cut_points(key, array)
        chunk_shape = _chunk_shape(array, cuts, chunk_bytes, gather_below)
        if chunk_shape is None:
            ragged.append(key)
        else:
            plans[key] = _in_place(key, array, chunk_shape, load)
    for key in ragged:  # after the others, as these can go to any holder and so even out the load
        plans[key] = _gathered(key, arrays[key], chunk_bytes, load)
    return [plans[key] for key in arrays]


def _by_array(layout: Layout) -> dict[ArrayKey, _Array]:
    """Collect the holders of each box of each array, checking that ranks mean the same array."""
    arrays: dict[ArrayKey, tuple[ShardSpec, int, dict[Box, list[int]]]] = {}
    for rank, specs in enumerate(layout):
        for spec in specs:
            first, first_rank, holders = arrays.setdefault(spec.key, (spec, rank, defaultdict(list)))
            if (spec.dtype, spec.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"{'/'.join(spec.key)} is {first.dtype}{list(first.shape)} on rank {first_rank} "
                    f"but {spec.dtype}{list(spec.shape)} on rank {rank}; they must be parts of one array"
                )
            if spec.box.size:
                holders[spec.box].append(rank)
        keys = [spec.key for spec in specs]
        if len(set(keys)) != len(keys):
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise CheckpointError(
                f"rank {rank} has {'/'.join(twice)} twice; a rank holds one box of an array"
            )
    return {
        key: _Array(spec.dtype, spec.shape, dict(sorted(holders.items())))
        for key, (spec, _, holders) in sorted(arrays.items())
    }


def _cut_points(key: ArrayKey, array: _Array) -> list[list[int]]:
    """Where the boxes end in each dim, the array's own end left out; proves that they tile the array."""
    whole = Box.whole(array.shape)
    boxes = list(array.holders)
    intervals = [sorted({(b.offset[d], b.shape[d]) for b in boxes}) for d in range(len(array.shape))]
    fits = sum(b.size for b in boxes) == whole.size and all(b.within(whole) for b in boxes)
    # Boxes that are all combinations of adjoining intervals are disjoint; otherwise compare them in pairs.
    product = len(boxes) == math.prod(len(dim) for dim in intervals) and all(
        a[0] + a[1] == b[0] for dim in intervals for a, b in pairwise(dim)
    )
    tiles = fits and (product or not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i]))
    if not tiles:
        held = ", ".join(f"{list(b.offset)}+{list(b.shape)}" for b in boxes[:4])
        raise CheckpointError(
            f"the ranks' parts of {'/'.join(key)} {list(array.shape)} don't cover it exactly once: "
            f"{held}{', ...' if len(boxes) > 4 else ''}"
        )
    return [
        sorted({o + n for o, n in dim if o + n < size} | {o for o, _ in dim if o > 0})
        for dim, size in zip(intervals, array.shape, strict=True)
    ]


def _chunk_shape(array: _Array, cuts: list[list[int]], chunk_bytes: int, gather_below: int) -> Shape | None:
    """The largest grid of which every box is whole chunks, cut down to `chunk_bytes`; None to gather."""
    if not array.holders:
        return None
    pitch = tuple(math.gcd(*cut) if cut else max(n, 1) for cut, n in zip(cuts, array.shape, strict=True))
    split = len(array.holders) > 1
    if split and math.prod(pitch) * array.itemsize < gather_below:
        return None
    return _cut_down(pitch, [bool(cut) for cut in cuts], array.itemsize, chunk_bytes)


def _cut_down(pitch: Shape, is_cut: list[bool], itemsize: int, chunk_bytes: int) -> Shape:
    """Shrink a chunk to about `chunk_bytes`, first dims first, still meeting the cuts between boxes."""
    shape = list(pitch)
    for dim, length in enumerate(pitch):
        size = math.prod(shape) * itemsize
        if size <= chunk_bytes:
            break
        parts = min(-(-size // chunk_bytes), length)
        if is_cut[dim]:  # boxes end at multiples of `length`, so only its divisors keep to them
            parts = _nearest_divisor(length, parts)
        shape[dim] = -(-length // parts)
        if shape[dim] > 1:  # a chunk that is still too large is better than one that isn't whole rows
            break
    return tuple(shape)


def _nearest_divisor(length: int, wanted: int) -> int:
    """The divisor of `length` nearest to `wanted` by ratio, within a factor of 8; 1 if there is none."""
    near = [p for p in range(max(1, wanted // 8), min(length, 8 * wanted) + 1) if length % p == 0]
    return min(near, key=lambda p: max(p / wanted, wanted / p), default=1)


def _in_place(key: ArrayKey, array: _Array, chunk_shape: Shape, load: list[int]) -> ArrayPlan:
    chunks = []
    for box, ranks in array.holders.items():
        for index, chunk_box in grid(array.shape, chunk_shape, box):
            writer = min(ranks, key=lambda rank: (load[rank], rank))
            load[writer] += chunk_box.size * array.itemsize
            chunks.append(Chunk(index, chunk_box, writer))
    return ArrayPlan(key, array.dtype, array.shape, chunk_shape, tuple(chunks), ())


def _gathered(key: ArrayKey, array: _Array, chunk_bytes: int, load: list[int]) -> ArrayPlan:
    """One writer for the whole array: the least loaded of those that hold a part of it."""
    candidates = {rank for ranks in array.holders.values() for rank in ranks} or {0}
    writer = min(candidates, key=lambda rank: (load[rank], rank))
    load[writer] += math.prod(array.shape) * array.itemsize
    pitch = tuple(max(n, 1) for n in array.shape)
    chunk_shape = _cut_down(pitch, [False] * len(pitch), array.itemsize, chunk_bytes)
    chunks = tuple(Chunk(index, box, writer) for index, box in grid(array.shape, chunk_shape))
    sources = tuple((writer if writer in ranks else ranks[0], box) for box, ranks in array.holders.items())
    return ArrayPlan(key, array.dtype, array.shape, chunk_shape, chunks, sources)
