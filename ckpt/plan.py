"""Who writes what: a pure function of what each rank holds.

Every rank computes the same plan from the same layout, so that nothing is negotiated. The plan proves
three things before a byte moves: all ranks agree on each array's shape and type, their boxes cover it
exactly once (or are copies of each other), and each chunk has one writer. Ranks that share no array (those
of different pipeline stages) need know nothing of each other: each plans for the ranks that it shares with.

An array is written in one of two ways. *In place*: the cuts between the ranks' boxes are a regular grid,
which is what zarr's chunks are; each rank writes its own chunks, and ranks that hold copies share them.
*Gathered*: the cut is ragged, or the parts are too small to be files; one rank gets all of a chunk and
writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from heapq import heapify, heapreplace
from math import prod
from typing import Any, NamedTuple

from ckpt.box import Box, Shape, around
from ckpt.chunking import CHUNK_BYTES, GATHER_BELOW_BYTES, Cut, cut_array
from ckpt.errors import CheckpointError
from ckpt.format import itemsize
from ckpt.shards import ArrayKey, ShardSpec


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
    """For a gathered array, which rank sends which box to those who write its chunks; otherwise empty."""
    owner: int
    """The rank that writes the array's metadata."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True)
class Plan:
    """How the arrays of a layout are written; the same on all ranks of that layout."""

    arrays: tuple[ArrayPlan, ...]
    """By key."""
    ranks: tuple[int, ...]
    """Those that the plan was made for."""

    @cached_property
    def digest(self) -> str:
        """Equal where the plans are."""
        return blake2b(repr((self.ranks, self.arrays)).encode(), digest_size=16).hexdigest()

    def parts(self, rank: int) -> dict[ArrayKey, Box]:
        """What `rank` must bring: of each array the smallest box with all that it writes or sends."""
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
        """By each rank."""
        written = dict.fromkeys(self.ranks, 0)
        for plan in self.arrays:
            for chunk in plan.chunks:
                written[chunk.writer] += chunk.box.size * itemsize(plan.dtype)
        return written


Layout = Mapping[int, Sequence[ShardSpec]]
"""What each rank holds; at least all ranks that hold a part of any array in it."""


class ArrayLayout(NamedTuple):
    """One array, and what each rank holds of it: a `Layout` the other way round."""

    key: ArrayKey
    dtype: str
    shape: Shape
    boxes: Mapping[int, Box]
    """By rank. Arrays that are cut alike may share the mapping, which makes planning fast."""
    fine_dim: int | None = None


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
    """`make_plan` for those who know the layout array by array; `ranks` are all that there are."""
    arrays = sorted(arrays, key=lambda array: array.key)
    load = dict.fromkeys(sorted(ranks), 0)  # bytes given to each rank so far
    plans: dict[ArrayKey, ArrayPlan] = {}
    ragged: list[tuple[ArrayLayout, _Alike]] = []
    for array, alike in _cut_all(arrays, chunk_bytes, gather_below):
        if alike.cut.gathered:
            ragged.append((array, alike))
        else:
            plans[array.key] = _in_place(array, alike, load)
    for array, alike in ragged:  # after the others, as any holder can write these, and so even out the load
        plans[array.key] = _gathered(array, alike, load)
    assert len(plans) == len(arrays), "an array is there once"
    return Plan(tuple(plans[array.key] for array in arrays), tuple(load))


def _by_array(layout: Layout) -> list[ArrayLayout]:
    """Turn the layout round, checking that ranks mean the same array."""
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
    """What arrays of one type and shape have in common that ranks hold alike; a model has few such kinds."""

    cut: Cut
    chunks: dict[tuple[int, ...], tuple[Chunk, ...]] = field(default_factory=dict)
    """By the writers of the runs."""
    sources: dict[tuple[int, ...], tuple[tuple[int, Box], ...]] = field(default_factory=dict)
    """By the writers; by none where no rank has a copy of another's part, and so there is no choice."""

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
        """Of each box the rank that sends it: a writer, which then has it already, or else the first."""
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
    known: dict[int, int] = {}  # by the mapping's identity, as comparing thousands of boxes takes its time
    for array in arrays:
        if id(array.boxes) not in known:
            known[id(array.boxes)] = contents.setdefault(tuple(array.boxes.items()), len(contents))
        kind = (array.dtype, array.shape, array.fine_dim, known[id(array.boxes)])
        if kind not in kinds:
            size = itemsize(array.dtype)
            cut = cut_array(
                "/".join(array.key), array.shape, size, array.boxes, array.fine_dim, chunk_bytes, gather_below
            )
            kinds[kind] = _Alike(cut)
        yield array, kinds[kind]


def _in_place(array: ArrayLayout, alike: _Alike, load: dict[int, int]) -> ArrayPlan:
    """Each run of chunks goes to the least loaded of the ranks that hold copies of it."""
    cut, writers = alike.cut, []
    for runs, ranks in zip(cut.runs, cut.holders.values(), strict=True):
        if len(ranks) == 1:  # most are, of a large model; they have one run
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
    """Each chunk goes to the least loaded of those that hold a part of it."""
    cut, writers = alike.cut, []
    for run, candidates in zip(cut.runs[0], cut.candidates, strict=True):
        writers.append(min(candidates, key=load.__getitem__))  # of equals the first
        load[writers[-1]] += run.nbytes
    owner = writers[0] if writers else min(array.boxes)
    chunks, sources = alike.written_by(tuple(writers)), alike.sent_to(tuple(writers))
    return ArrayPlan(array.key, array.dtype, array.shape, cut.chunk_shape, chunks, sources, owner)
