"""Planning of a save: which rank writes which chunk, a pure function of the parts that ranks hold.

Every rank computes the same plan from the same layout, so nothing is negotiated. Before a byte moves, the
plan proves that all ranks agree on each array's shape and dtype, that their boxes cover it exactly once (or
are replicas), and that each chunk has one writer. Ranks that share no array, as those of different pipeline
stages, plan separately.

An array is written in one of two ways. *In place*: the boxes are whole chunks of a regular grid, as zarr
needs it; each rank writes its own chunks, and replicas share them out. *Gathered*: the boxes are ragged, or
too small to be files; one rank receives all of a chunk and writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from heapq import heapify, heapreplace
from math import prod
from typing import Any

from ckpt.box import Box, Shape, around
from ckpt.chunking import CHUNK_BYTES, GATHER_BELOW_BYTES, Cut, cut_array
from ckpt.errors import CheckpointError
from ckpt.format import itemsize
from ckpt.shards import ArrayKey, ArrayLayout, ShardSpec


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of an array, and the rank that writes it."""

    index: Shape
    box: Box
    writer: int


@dataclass(frozen=True, slots=True)
class ArrayPlan:
    """Plan of one array."""

    key: ArrayKey
    dtype: str
    shape: Shape
    chunk_shape: Shape
    chunks: tuple[Chunk, ...]
    sources: tuple[tuple[int, Box], ...]
    """Gathered arrays only: the rank that sends each box to the writers of its chunks."""
    owner: int
    """The rank that writes the array's metadata."""

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

    @cached_property
    def digest(self) -> str:
        """Digest of the plan: equal for equal plans, in any process."""
        return blake2b(repr((self.ranks, self.arrays)).encode(), digest_size=16).hexdigest()

    def parts(self, rank: int) -> dict[ArrayKey, Box]:
        """Return, for each array, the smallest box that holds everything that `rank` writes or sends."""
        parts: dict[ArrayKey, Box] = {}
        for plan in self.arrays:
            if plan.sources:
                boxes = [box for source, box in plan.sources if source == rank]
            else:
                boxes = [chunk.box for chunk in plan.chunks if chunk.writer == rank]
            if boxes:
                parts[plan.key] = around(boxes)
        return parts

    def bytes_written(self) -> dict[int, int]:
        """Return the bytes that each rank writes."""
        written = dict.fromkeys(self.ranks, 0)
        for plan in self.arrays:
            for chunk in plan.chunks:
                written[chunk.writer] += chunk.box.size * itemsize(plan.dtype)
        return written


Layout = Mapping[int, Sequence[ShardSpec]]
"""Rank -> the parts that it holds; must include all ranks that hold a part of any array in it."""


def make_plan(
    layout: Layout, *, chunk_bytes: int = CHUNK_BYTES, gather_below: int = GATHER_BELOW_BYTES
) -> Plan:
    """Plan the writing of all arrays in `layout`.

    Raises:
        CheckpointError: the ranks disagree about an array, or their boxes leave gaps or overlap.
    """
    return plan_arrays(_by_array(layout), layout, chunk_bytes=chunk_bytes, gather_below=gather_below)


def plan_arrays(
    arrays: Iterable[ArrayLayout],
    ranks: Iterable[int],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    gather_below: int = GATHER_BELOW_BYTES,
) -> Plan:
    """Plan as `make_plan` does, given the layout by array; `ranks` are all the ranks."""
    arrays = sorted(arrays, key=lambda array: array.key)
    load = dict.fromkeys(sorted(ranks), 0)  # bytes given to each rank so far
    plans: dict[ArrayKey, ArrayPlan] = {}
    ragged: list[tuple[ArrayLayout, _Alike]] = []
    for array, alike in _cut_all(arrays, chunk_bytes, gather_below):
        if alike.cut.gathered:
            ragged.append((array, alike))
        else:
            plans[array.key] = _in_place(array, alike, load)
    for array, alike in ragged:  # last, as any holder can write these: they even out the load
        plans[array.key] = _gathered(array, alike, load)
    assert len(plans) == len(arrays), "each array is listed once"
    return Plan(tuple(plans[array.key] for array in arrays), tuple(load))


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
    chunks: dict[tuple[int, ...], tuple[Chunk, ...]] = field(default_factory=dict)
    """Writers of the runs -> the chunks."""
    sources: dict[tuple[int, ...], tuple[tuple[int, Box], ...]] = field(default_factory=dict)
    """Writers of the runs -> the sources; the key is empty if there are no replicas and so no choice."""

    def written_by(self, writers: tuple[int, ...]) -> tuple[Chunk, ...]:
        if writers not in self.chunks:
            runs = (run for runs in self.cut.runs for run in runs)
            self.chunks[writers] = tuple(
                Chunk(index, box, writer)
                for run, writer in zip(runs, writers, strict=True)
                for index, box in run.chunks
            )
        return self.chunks[writers]

    def sent_to(self, writers: tuple[int, ...]) -> tuple[tuple[int, Box], ...]:
        """Return the rank that sends each box: a writer that holds it anyway, or else the first."""
        holders = self.cut.holders
        key = writers if len(self.cut.ranks) > len(holders) else ()
        if key not in self.sources:
            self.sources[key] = tuple(
                (next((w for w in writers if w in ranks), ranks[0]), box) for box, ranks in holders.items()
            )
        return self.sources[key]


def _cut_all(
    arrays: Iterable[ArrayLayout], chunk_bytes: int, gather_below: int
) -> Iterator[tuple[ArrayLayout, _Alike]]:
    kinds: dict[Any, _Alike] = {}
    contents: dict[Any, int] = {}
    known: dict[int, int] = {}  # by identity of the mapping, as comparing thousands of boxes is slow
    for array in arrays:
        if id(array.boxes) not in known:
            known[id(array.boxes)] = contents.setdefault(tuple(array.boxes.items()), len(contents))
        kind = (array.dtype, array.shape, array.fine_dim, known[id(array.boxes)])
        if kind not in kinds:
            kinds[kind] = _Alike(cut_array(array, chunk_bytes, gather_below))
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
    chunks = alike.written_by(tuple(writers))
    return ArrayPlan(array.key, array.dtype, array.shape, cut.chunk_shape, chunks, (), chunks[0].writer)


def _gathered(array: ArrayLayout, alike: _Alike, load: dict[int, int]) -> ArrayPlan:
    """Give each chunk to the least loaded of the ranks that hold a part of it."""
    cut, writers = alike.cut, []
    for run, candidates in zip(cut.runs[0], cut.candidates, strict=True):
        writers.append(min(candidates, key=load.__getitem__))  # on a tie, the first
        load[writers[-1]] += run.nbytes
    owner = writers[0] if writers else min(array.boxes)
    chunks, sources = alike.written_by(tuple(writers)), alike.sent_to(tuple(writers))
    return ArrayPlan(array.key, array.dtype, array.shape, cut.chunk_shape, chunks, sources, owner)
