"""Gathering ragged and small arrays on the ranks that write them, in a few flat exchanges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ckpt.comm import Bytes
from ckpt.format import itemsize, numpy_dtype
from ckpt.plan import ArrayPlan, Chunk, ChunkPlan, Plan, Sources
from ckpt.shards import ArrayKey, Shard, UnreadShard
from ckpt.write import Write

ROUND_BYTES = 16 << 20
"""Most bytes that a rank receives per exchange, except for one larger chunk or file; bounds the memory."""


class Gathering(NamedTuple):
    """One chunk to gather."""

    array: ArrayPlan
    chunk: Chunk
    sources: Sources
    """Where the chunk's pieces come from."""


def rounds(plan: Plan) -> Iterator[list[Gathering]]:
    """Yield the chunks to gather in batches in which no rank receives more than `ROUND_BYTES`.

    A chunk that its writer has whole is in none. Where each file has one writer, all its chunks are in one
    batch.
    """
    batch: list[Gathering] = []
    load: dict[int, int] = defaultdict(int)
    for array in plan.arrays:
        sources = array.chunk_plan.sources
        if sources is None:
            continue
        for chunks in _units(array.chunk_plan, by_file=plan.files == "writer"):
            writer = chunks[0].writer
            if plan.files == "array" and sources.has_whole(writer, chunks[0].box):
                continue
            size = sum(c.box.size for c in chunks) * itemsize(array.dtype)
            if load[writer] and load[writer] + size > ROUND_BYTES:
                yield batch
                batch = []
                load.clear()
            batch += [Gathering(array, chunk, sources) for chunk in chunks]
            load[writer] += size
    if batch:
        yield batch


def _units(chunk_plan: ChunkPlan, *, by_file: bool) -> Iterator[list[Chunk]]:
    """Yield the chunks that one rank must have at the same time."""
    if not by_file:
        yield from ([chunk] for chunk in chunk_plan.chunks)
        return
    found = {chunk.index: chunk for chunk in chunk_plan.chunks}
    for file, _ in chunk_plan.grid.files():
        yield [found[index] for index in chunk_plan.grid.chunks(file)]


def outgoing(
    batch: Sequence[Gathering], held: Mapping[ArrayKey, Shard | UnreadShard], rank: int
) -> dict[int, Bytes]:
    """Return this rank's bytes for each writer, in plan order."""
    parts: dict[int, list[Bytes]] = defaultdict(list)
    for array, chunk, sources in batch:
        sent = sources.parts.get(rank)
        box = None if sent is None else sent.intersect(chunk.box)
        if box is not None:
            shard = held[array.key]
            part = shard.data[box.relative_to(shard.spec.box).slices]
            parts[chunk.writer].append(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
    return {writer: np.concatenate(pieces) for writer, pieces in parts.items()}


def arrived(batch: Sequence[Gathering], received: Mapping[int, Bytes], rank: int) -> Iterator[Write]:
    """Assemble this rank's chunks from the received pieces, which come in plan order from each rank."""
    cursor: dict[int, int] = defaultdict(int)
    for array, chunk, sources in batch:
        if chunk.writer != rank:
            continue
        whole = np.empty(chunk.box.shape, numpy_dtype(array.dtype))
        for source, box in sources.of_chunk(chunk.box):
            size = box.size * whole.itemsize
            piece = received[source][cursor[source] : cursor[source] + size]
            cursor[source] += size
            inside = box.relative_to(chunk.box).slices
            whole[inside or ...] = piece.view(whole.dtype).reshape(box.shape)
        yield Write(array, chunk, whole)
