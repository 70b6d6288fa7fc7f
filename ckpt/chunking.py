"""Choice of an array's chunks and files, given the boxes that ranks hold.

zarr's chunks are a regular grid, clipped at the array's end. If the ranks' boxes end on such a grid, each box
is a number of whole chunks, which its rank can write without the others. If large boxes end on none (a third
of 32,000 rows is 10,667, a prime), the few chunks that reach over a bound are gathered.
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
from ckpt.shards import ArrayLayout, Files

CHUNK_BYTES = 4 << 20
"""Approximate size of a chunk of a large array. A reader verifies whole chunks: small ones let it read a part
with little in vain, large ones keep the manifest small."""
CHUNKS = 64
"""Number of chunks of an array from which on they are of that size. Smaller arrays have smaller chunks, down
to `LEAST_CHUNK_BYTES`: else a rank that wants a quarter of ten megabytes would read half of them."""
LEAST_CHUNK_BYTES = 1 << 20

SMALLEST_CHUNK_BYTES = 512 << 10
"""Smallest part of an array that is a chunk of its own: smaller parts are gathered. It keeps the manifest
under 1 MiB for 100 GB, and gathering to arrays of which a rank holds little."""

FILE_BYTES = 256 << 20
"""Largest file where each has one writer."""
GATHERED_FILE_BYTES = 64 << 20
"""The same for arrays that are gathered, as their writer holds all of a file in memory."""

STRADDLED = 8
"""Number of chunks in a rank's part of an array from which on chunks may reach over its bounds."""

TILES = (8, 4, 2)
"""Numbers of tiles along `ShardSpec.fine_dim` to try: a large array can then be read in eighths."""

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
    """True if chunks must be gathered, because boxes aren't whole chunks or are smaller than a chunk. Those
    that their writer has whole are written in place all the same."""
    chunk_shape: Shape
    file_shape: Shape
    runs: tuple[tuple[Run, ...], ...]
    """All chunks. In place: for each box, up to one run per holder. Gathered: one entry, a run for each chunk
    or, if a file has one writer, for each file."""
    candidates: tuple[tuple[int, ...], ...] = ()
    """Gathered arrays only: for each run, the ranks that hold a part of it."""


def cut_array(array: ArrayLayout, chunk_bytes: int, gather_below: int, files: Files) -> Cut:
    """Choose the chunks and files of one array. See `ckpt.plan` for the rest.

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
        part = max((box.size for box in holders), default=1) * size
        # Small parts make small chunks, so that a rank which loads such a part reads little in vain.
        chunk_bytes = min(chunk_bytes, max(2 * gather_below, 4 * part))
    chunk_bytes = min(chunk_bytes, max(LEAST_CHUNK_BYTES, math.prod(shape) * size // CHUNKS))
    is_cut = [bool(cut) for cut in ends]
    tile = _narrowed(pitch, shape, array.fine_dim, size, gather_below)
    chunk_shape = _cut_down(tile, is_cut, size, chunk_bytes)
    dim = next((d for d, n in enumerate(chunk_shape) if n > 1), 0)  # where `_cut_down` has stopped
    no_divisor = is_cut[dim] if shape else False
    too_large = no_divisor and math.prod(chunk_shape) * size > 2 * chunk_bytes
    straddles = files == "array" and too_large and math.prod(pitch) * size >= STRADDLED * chunk_bytes
    if straddles:
        tile, is_cut[dim] = (*tile[:dim], shape[dim], *tile[dim + 1 :]), False
        chunk_shape = _cut_down(tile, is_cut, size, chunk_bytes)
    most = math.inf if files == "array" else GATHERED_FILE_BYTES if gathered else FILE_BYTES
    whole = shape if files == "array" else pitch
    file_shape = _file_shape(whole, chunk_shape, is_cut, size, most)
    grain = chunk_shape if files == "array" else file_shape  # what one rank writes

    def run(parts: _Chunks) -> Run:
        chunks = [c for _, part in parts for c in grid(shape, chunk_shape, part)]
        return Run(sum(box.size for _, box in chunks) * size, tuple(chunks))

    if gathered or straddles:
        if straddles:  # the others stay out of it, so that a chunk within a box is where it is written
            holders = {box: sharers[:1] for box, sharers in holders.items()}
        parts = list(grid(shape, grain))
        candidates = tuple(_touching(holders, part) for _, part in parts)
        return Cut(
            holders, ranks, True, chunk_shape, file_shape, (tuple(run([p]) for p in parts),), candidates
        )
    runs = tuple(
        tuple(run(share) for share in _shares(list(grid(shape, grain, box)), len(sharers)))
        for box, sharers in holders.items()
    )
    return Cut(holders, ranks, False, chunk_shape, file_shape, runs)


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


def _narrowed(pitch: Shape, shape: Shape, dim: int | None, element_size: int, least: int) -> Shape:
    """Cut a chunk along `dim`, the array's `fine_dim`, into equal tiles of at least `least` bytes.

    There are so few that about as many fit along another dim: other topologies cut it there.
    """
    if dim is None:
        return pitch
    nbytes, whole = math.prod(pitch) * element_size, math.prod(shape) * element_size
    cut = max(1, -(-shape[dim] // pitch[dim]))  # tiles that the ranks' cut already makes
    for tiles in TILES:
        parts = tiles // cut
        fits = nbytes >= parts * least and whole >= tiles * tiles * least // 2
        if parts and pitch[dim] % parts == 0 and fits:
            return (*pitch[:dim], pitch[dim] // parts, *pitch[dim + 1 :])
    return pitch


def _file_shape(whole: Shape, chunk: Shape, is_cut: list[bool], element_size: int, most: float) -> Shape:
    """Return the shape of a file that covers `whole`, or of one of at most about `most` bytes."""
    counts = [max(1, -(-n // c)) for n, c in zip(whole, chunk, strict=True)]
    for dim, count in enumerate(counts):
        nbytes = math.prod(counts) * math.prod(chunk) * element_size
        if nbytes <= most:
            break
        parts = min(math.ceil(nbytes / most), count)
        if is_cut[dim]:  # files mustn't reach into the next rank's box
            parts = next(p for p in range(parts, count + 1) if count % p == 0)
        counts[dim] = -(-count // parts)
    return tuple(n * c for n, c in zip(counts, chunk, strict=True))


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
        elif length % (halves := 1 << (parts - 1).bit_length()) == 0:
            parts = halves  # other topologies cut in halves and quarters, which are whole chunks then
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
