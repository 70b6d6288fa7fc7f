"""Planning of a save: which rank writes which chunk, a pure function of the parts that ranks hold.

Every rank computes the same plan from the same layout, so nothing is negotiated. Before a byte moves, the
plan proves that all ranks agree on each array's shape and dtype, that their boxes cover it exactly once (or
are replicas), and that each chunk has one writer. Ranks that share no array, as those of different pipeline
stages, plan separately.

A chunk is written in one of two ways. *In place*: a rank has all of it; most boxes are whole chunks of a
regular grid, as zarr needs it, and replicas share them out. *Gathered*: the boxes are ragged, or smaller than
a chunk; one rank receives all of a chunk and writes it.

Arrays that are cut alike and have the same writers share one `ChunkPlan`, so that planning and its use take
time per array, not per array and rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from heapq import heapify, heapreplace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.array_files import FileGrid, file_grid
from ckpt.box import Box, Shape, around
from ckpt.chunking import CHUNK_BYTES, SMALLEST_CHUNK_BYTES, Cut, cut_array
from ckpt.errors import CheckpointError
from ckpt.format import itemsize
from ckpt.shards import ArrayKey, ArrayLayout, Files, ShardSpec


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of an array, and the rank that writes it."""

    index: Shape
    box: Box
    writer: int


Pieces = tuple[tuple[int, Box], ...]
"""Parts of an array, each with the rank that brings it."""


@dataclass(frozen=True)
class Sources:
    """Origins of the parts of arrays that are gathered alike."""

    pieces: Pieces
    _of_chunk: dict[Box, Pieces] = field(default_factory=dict, compare=False, repr=False)

    def of_chunk(self, chunk: Box) -> Pieces:
        """Return the pieces of a chunk, in the order of sending."""
        if chunk not in self._of_chunk:
            found = ((source, box.intersect(chunk)) for source, box in self.pieces)
            self._of_chunk[chunk] = tuple((source, piece) for source, piece in found if piece is not None)
        return self._of_chunk[chunk]

    def has_whole(self, rank: int, chunk: Box) -> bool:
        """Return whether the rank has all of a chunk, so that nothing is sent."""
        return rank in self.parts and chunk.within(self.parts[rank])

    @cached_property
    def parts(self) -> dict[int, Box]:
        """Rank -> the box that it sends, which is all that it holds."""
        return dict(self.pieces)

    @cached_property
    def digest(self) -> bytes:
        return blake2b(repr(self.pieces).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks, files and writers of arrays that are cut alike."""

    grid: FileGrid
    chunks: tuple[Chunk, ...]
    """All chunks, in C order."""
    sources: Sources | None
    """Gathered arrays only."""

    @cached_property
    def by_writer(self) -> dict[int, list[Chunk]]:
        """Rank -> the chunks that it writes."""
        found: dict[int, list[Chunk]] = defaultdict(list)
        for chunk in self.chunks:
            found[chunk.writer].append(chunk)
        return dict(found)

    @cached_property
    def writers(self) -> npt.NDArray[np.int32]:
        """Writer of each chunk, in C order."""
        return np.array([chunk.writer for chunk in self.chunks], np.int32)

    @cached_property
    def parts(self) -> dict[int, Box]:
        """Rank -> the smallest box that holds everything that it writes or sends."""
        if self.sources is not None:
            return self.sources.parts
        return {
            rank: around([chunk.box for chunk in chunks]) if len(chunks) > 1 else chunks[0].box
            for rank, chunks in self.by_writer.items()
        }

    @cached_property
    def digest(self) -> bytes:
        content = (self.grid, self.chunks, self.sources and self.sources.digest)
        return blake2b(repr(content).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    """Plan of one array."""

    key: ArrayKey
    dtype: str
    chunk_plan: ChunkPlan
    owner: int
    """The rank that writes the array's metadata."""

    @property
    def grid(self) -> FileGrid:
        return self.chunk_plan.grid

    @property
    def shape(self) -> Shape:
        return self.chunk_plan.grid.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Plan:
    """Plan of all arrays of a layout; the same on all of the layout's ranks."""

    arrays: tuple[ArrayPlan, ...]
    """Sorted by key."""
    ranks: tuple[int, ...]
    """Ranks that the plan was made for."""
    files: Files
    """Content of each planned file."""

    @cached_property
    def digest(self) -> str:
        """Digest of the plan: equal for equal plans, in any process."""
        digest = blake2b(repr((self.ranks, self.files)).encode(), digest_size=16)
        for array in self.arrays:
            digest.update(repr((array.key, array.dtype, array.owner)).encode() + array.chunk_plan.digest)
        return digest.hexdigest()

    def parts(self, rank: int) -> dict[ArrayKey, Box]:
        """Return, for each array, the smallest box that holds everything that `rank` writes or sends."""
        return {
            array.key: array.chunk_plan.parts[rank] for array in self.arrays if rank in array.chunk_plan.parts
        }

    def bytes_written(self) -> dict[int, int]:
        """Return the bytes that each rank writes."""
        written = dict.fromkeys(self.ranks, 0)
        for plan in self.arrays:
            for rank, chunks in plan.chunk_plan.by_writer.items():
                written[rank] += sum(chunk.box.size for chunk in chunks) * itemsize(plan.dtype)
        return written


Layout = Mapping[int, Sequence[ShardSpec]]
"""Rank -> the parts that it holds; must include all ranks that hold a part of any array in it."""


def make_plan(
    layout: Layout,
    *,
    files: Files = "array",
    chunk_bytes: int = CHUNK_BYTES,
    gather_below: int = SMALLEST_CHUNK_BYTES,
) -> Plan:
    """Plan the writing of all arrays in `layout`.

    Raises:
        CheckpointError: the ranks disagree about an array, or their boxes leave gaps or overlap.
    """
    arrays = _by_array(layout)
    return plan_arrays(arrays, layout, files=files, chunk_bytes=chunk_bytes, gather_below=gather_below)


def plan_arrays(
    arrays: Iterable[ArrayLayout],
    ranks: Iterable[int],
    *,
    files: Files = "array",
    chunk_bytes: int = CHUNK_BYTES,
    gather_below: int = SMALLEST_CHUNK_BYTES,
) -> Plan:
    """Plan as `make_plan` does, given the layout by array; `ranks` are all the ranks."""
    arrays = sorted(arrays, key=lambda array: array.key)
    load = dict.fromkeys(sorted(ranks), 0)  # bytes given to each rank so far
    plans: dict[ArrayKey, ArrayPlan] = {}
    ragged: list[tuple[ArrayLayout, _Alike]] = []
    for array, alike in _cut_all(arrays, chunk_bytes, gather_below, files):
        if alike.cut.gathered:
            ragged.append((array, alike))
        else:
            plans[array.key] = _in_place(array, alike, load)
    for array, alike in ragged:  # last, as any holder can write these: they even out the load
        plans[array.key] = _gathered(array, alike, load)
    if len(plans) < len(arrays):
        twice = next(a for a, b in pairwise(arrays) if a.key == b.key)
        raise CheckpointError(f"{'/'.join(twice.key)} is there twice; give each tensor a name of its own")
    return Plan(tuple(plans[array.key] for array in arrays), tuple(load), files)


def _by_array(layout: Layout) -> list[ArrayLayout]:
    """Regroup a layout by array, checking that ranks agree on each array."""
    arrays: dict[ArrayKey, tuple[ShardSpec, dict[int, Box]]] = {}
    for rank, specs in sorted(layout.items()):
        for spec in specs:
            first, boxes = arrays.setdefault(spec.key, (spec, {}))
            if (spec.dtype, spec.shape, spec.fine_dim) != (first.dtype, first.shape, first.fine_dim):
                raise CheckpointError(
                    f"{'/'.join(spec.key)} is {first.dtype}{list(first.shape)} on rank {min(boxes)} "
                    f"but {spec.dtype}{list(spec.shape)} on rank {rank}; they must be parts of one array"
                )
            if rank in boxes:
                raise CheckpointError(
                    f"rank {rank} has {'/'.join(spec.key)} twice; a rank holds one box of an array"
                )
            boxes[rank] = spec.box
    return [ArrayLayout(k, s.dtype, s.shape, boxes, s.fine_dim) for k, (s, boxes) in arrays.items()]


@dataclass(frozen=True, slots=True)
class _Alike:
    """Plan shared by arrays of one dtype and shape that ranks hold alike; a model has few such kinds."""

    cut: Cut
    grid: FileGrid
    chunk_plans: dict[tuple[int, ...], ChunkPlan] = field(default_factory=dict)
    """Writers of the runs -> the chunks with their writers."""
    sources: dict[tuple[int, ...], Sources] = field(default_factory=dict)
    """Writers of the runs -> the sources; the key is empty if there are no replicas and so no choice."""

    def written_by(self, writers: tuple[int, ...]) -> ChunkPlan:
        if writers not in self.chunk_plans:
            runs = (run for runs in self.cut.runs for run in runs)
            chunks = [
                Chunk(index, box, writer)
                for run, writer in zip(runs, writers, strict=True)
                for index, box in run.chunks
            ]
            chunks.sort(key=lambda chunk: chunk.index)
            sources = self._sent_to(writers) if self.cut.gathered else None
            self.chunk_plans[writers] = ChunkPlan(self.grid, tuple(chunks), sources)
        return self.chunk_plans[writers]

    def _sent_to(self, writers: tuple[int, ...]) -> Sources:
        """Return the rank that sends each box: a writer that holds it anyway, or else the first."""
        holders = self.cut.holders
        key = writers if len(self.cut.ranks) > len(holders) else ()
        if key not in self.sources:
            chosen = set(writers)
            senders = (next((r for r in ranks if r in chosen), ranks[0]) for ranks in holders.values())
            self.sources[key] = Sources(tuple(zip(senders, holders, strict=True)))
        return self.sources[key]


def _cut_all(
    arrays: Iterable[ArrayLayout], chunk_bytes: int, gather_below: int, files: Files
) -> Iterator[tuple[ArrayLayout, _Alike]]:
    kinds: dict[Any, _Alike] = {}
    contents: dict[Any, int] = {}
    known: dict[int, int] = {}  # by identity of the mapping, as comparing thousands of boxes is slow
    for array in arrays:
        if id(array.boxes) not in known:
            known[id(array.boxes)] = contents.setdefault(tuple(array.boxes.items()), len(contents))
        kind = (array.dtype, array.shape, array.fine_dim, known[id(array.boxes)])
        if kind not in kinds:
            cut = cut_array(array, chunk_bytes, gather_below, files)
            grid = file_grid(array.shape, cut.chunk_shape, cut.file_shape, itemsize(array.dtype))
            kinds[kind] = _Alike(cut, grid)
        yield array, kinds[kind]


def _in_place(array: ArrayLayout, alike: _Alike, load: dict[int, int]) -> ArrayPlan:
    """Give each run of chunks to the least loaded of its replicas."""
    cut, writers = alike.cut, []
    for runs, ranks in zip(cut.runs, cut.holders.values(), strict=True):
        if len(ranks) == 1:  # most boxes of a large model; they have one run
            writers.append(ranks[0])
            load[ranks[0]] += runs[0].nbytes
            continue
        queue = [(load[rank], rank) for rank in ranks]
        heapify(queue)
        for run in runs:
            given, writer = queue[0]
            load[writer] = given + run.nbytes
            heapreplace(queue, (load[writer], writer))
            writers.append(writer)
    return ArrayPlan(array.key, array.dtype, alike.written_by(tuple(writers)), writers[0])


def _gathered(array: ArrayLayout, alike: _Alike, load: dict[int, int]) -> ArrayPlan:
    """Give each run of chunks to the least loaded of the ranks that hold a part of it."""
    cut, writers = alike.cut, []
    for run, candidates in zip(cut.runs[0], cut.candidates, strict=True):
        writers.append(min(candidates, key=load.__getitem__))  # on a tie, the first
        load[writers[-1]] += run.nbytes
    owner = writers[0] if writers else min(array.boxes)
    return ArrayPlan(array.key, array.dtype, alike.written_by(tuple(writers)), owner)
