"""Choice of an array's chunks, given the boxes that ranks hold.

zarr's chunks are a regular grid, clipped at the array's end. If the ranks' boxes end on such a grid, each box
is a number of whole chunks, which its rank can write without the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ckpt.box import Box, Shape, grid
from ckpt.errors import CheckpointError
from ckpt.format import itemsize
from ckpt.shards import ArrayLayout

GATHER_BELOW_BYTES = 256 << 10
"""Smallest part of an array that is worth a file of its own."""

CHUNK_BYTES = 16 << 20
"""Approximate chunk size: large enough to stream, small enough to share out and to read in part."""

TILES = {8: 1 << 20, 4: 256 << 10, 2: 256 << 10}
"""Number of tiles along `ShardSpec.fine_dim` -> smallest tile in bytes. Large arrays can then be read in
eighths, while small ones don't become too many files."""
MOST_TILES = 64
"""Most tiles of an array, over all ranks. The parts of an array that many ranks share are small already."""


_Chunks = list[tuple[Shape, Box]]


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent chunks with one writer."""

    nbytes: int
    chunks: tuple[tuple[Shape, Box], ...]
    """Grid index and box of each."""


@dataclass(frozen=True, slots=True)
class Cut:
    """An array's plan except for its writers."""

    holders: Mapping[Box, tuple[int, ...]]
    """Non-empty box -> the ranks that hold it, in the order of the boxes."""
    ranks: tuple[int, ...]
    """All ranks that hold a non-empty box, in order."""
    gathered: bool
    """True if chunks must be gathered, because boxes aren't whole chunks or are too small to be files."""
    chunk_shape: Shape
    runs: tuple[tuple[Run, ...], ...]
    """All chunks. In place: for each box, up to one run per holder. Gathered: one entry, a run per chunk."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """Gathered arrays only: for each chunk, the ranks that hold a part of it."""


def cut_array(array: ArrayLayout, chunk_bytes: int, gather_below: int) -> Cut:
    """Choose the chunks of one array. See `ckpt.plan` for the rest.

    Raises:
        CheckpointError: the boxes leave gaps or overlap.
    """
    shape, size = array.shape, itemsize(array.dtype)
    found: dict[Box, list[int]] = defaultdict(list)
    ranks = tuple(sorted(rank for rank, box in array.boxes.items() if box.size))
    for rank in ranks:
        found[array.boxes[rank]].append(rank)
    holders = {box: tuple(found[box]) for box in sorted(found, key=lambda box: (box.offset, box.shape))}
    ends = _cut_points("/".join(array.key), shape, list(holders))
    pitch = tuple(math.gcd(*cut) if cut else max(n, 1) for cut, n in zip(ends, shape, strict=True))
    gathered = not holders or (len(holders) > 1 and math.prod(pitch) * size < gather_below)
    if gathered:  # chunk it as if one rank held all of it
        pitch, ends = tuple(max(n, 1) for n in shape), [[] for _ in shape]
    pitch = _narrowed(pitch, shape, array.fine_dim, size, 1 if gathered else len(holders))
    chunk_shape = _cut_down(pitch, [bool(cut) for cut in ends], size, chunk_bytes)
    if gathered:
        chunks = list(grid(shape, chunk_shape))
        candidates = tuple(_touching(holders, chunk) for _, chunk in chunks)
        single = tuple(_run([chunk], size) for chunk in chunks)
        return Cut(holders, ranks, True, chunk_shape, (single,), candidates)
    runs = tuple(
        tuple(_run(run, size) for run in _shares(list(grid(shape, chunk_shape, box)), len(sharers)))
        for box, sharers in holders.items()
    )
    return Cut(holders, ranks, False, chunk_shape, runs)


def _touching(holders: Mapping[Box, tuple[int, ...]], chunk: Box) -> tuple[int, ...]:
    return tuple(sorted({rank for box, ranks in holders.items() if box.intersect(chunk) for rank in ranks}))


def _cut_points(name: str, shape: Shape, boxes: list[Box]) -> list[list[int]]:
    """Return the inner bounds of the boxes in each dim, after proving that the boxes tile the array."""
    intervals = [sorted({(b.offset[d], b.shape[d]) for b in boxes}) for d in range(len(shape))]
    within = all(o >= 0 and o + n <= size for dim, size in zip(intervals, shape, strict=True) for o, n in dim)
    fits = within and sum(b.size for b in boxes) == math.prod(shape)
    # A product of adjoining intervals is disjoint. Other boxes are compared in pairs, which is quadratic.
    product = len(boxes) == math.prod(len(dim) for dim in intervals) and all(
        a[0] + a[1] == b[0] for dim in intervals for a, b in pairwise(dim)
    )
    tiles = fits and (product or not any(a.intersect(b) for i, a in enumerate(boxes) for b in boxes[:i]))
    if not tiles:
        held = ", ".join(f"{list(b.offset)}+{list(b.shape)}" for b in boxes[:4])
        raise CheckpointError(
            f"the ranks' parts of {name} {list(shape)} don't cover it exactly once: "
            f"{held}{', ...' if len(boxes) > 4 else ''}"
        )
    return [
        sorted({o + n for o, n in dim if o + n < size} | {o for o, _ in dim if o > 0})
        for dim, size in zip(intervals, shape, strict=True)
    ]


def _narrowed(pitch: Shape, shape: Shape, dim: int | None, element_size: int, boxes: int) -> Shape:
    """Cut a chunk along `dim`, the array's `fine_dim`, into equal tiles if they are large enough."""
    if dim is None:
        return pitch
    nbytes = math.prod(pitch) * element_size
    cut = max(1, -(-shape[dim] // pitch[dim]))  # tiles that the ranks' cut already makes
    for tiles, least in TILES.items():
        parts = tiles // cut
        if parts and pitch[dim] % parts == 0 and nbytes >= parts * least and boxes * parts <= MOST_TILES:
            return (*pitch[:dim], pitch[dim] // parts, *pitch[dim + 1 :])
    return pitch


def _cut_down(pitch: Shape, is_cut: list[bool], element_size: int, chunk_bytes: int) -> Shape:
    """Shrink a chunk to about `chunk_bytes`, first dims first, keeping the boxes whole chunks."""
    shape = list(pitch)
    for dim, length in enumerate(pitch):
        size = math.prod(shape) * element_size
        if size <= chunk_bytes:
            break
        parts = min(-(-size // chunk_bytes), length)
        if is_cut[dim]:  # boxes end at multiples of `length`, so only divisors fit
            parts = _nearest_divisor(length, parts)
        shape[dim] = -(-length // parts)
        if shape[dim] > 1:  # rather too large a chunk than one that isn't whole rows
            break
    return tuple(shape)


def _nearest_divisor(length: int, wanted: int) -> int:
    """Return the divisor of `length` nearest to `wanted` by ratio, within a factor of 8; 1 if none is."""
    near = [p for p in range(max(1, wanted // 8), min(length, 8 * wanted) + 1) if length % p == 0]
    return min(near, key=lambda p: max(p / wanted, wanted / p), default=1)


def _shares(chunks: _Chunks, n: int) -> Iterator[_Chunks]:
    """Split chunks into up to `n` runs of adjacent ones, so that each of `n` replicas writes one range."""
    n = min(n, len(chunks))
    ends = [round(i * len(chunks) / n) for i in range(n + 1)]
    return (chunks[a:b] for a, b in pairwise(ends))


def _run(chunks: _Chunks, element_size: int) -> Run:
    return Run(sum(box.size for _, box in chunks) * element_size, tuple(chunks))
