"""Gathering ragged and small arrays on the ranks that write them, in a few flat exchanges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ckpt.box import Box
from ckpt.comm import Bytes, Comm
from ckpt.format import itemsize, numpy_dtype
from ckpt.plan import ArrayPlan, Chunk, Plan
from ckpt.shards import ArrayKey, Shard, UnreadShard
from ckpt.write import Write

ROUND_BYTES = 16 << 20
"""Most bytes that a rank receives per exchange, except for a single larger chunk; bounds the memory."""


Pieces = tuple[tuple[int, Box], ...]


class Gathering(NamedTuple):
    """One chunk to gather."""

    array: ArrayPlan
    chunk: Chunk
    pieces: Pieces
    """Source rank and box of each piece, in the order of sending."""


def rounds(plan: Plan) -> Iterator[list[Gathering]]:
    """Yield the chunks of gathered arrays in batches in which no rank receives more than `ROUND_BYTES`."""
    batch: list[Gathering] = []
    load: dict[int, int] = defaultdict(int)
    known: dict[object, list[Pieces]] = {}  # arrays that are cut alike share their `sources`
    for array in plan.arrays:
        if not array.sources:
            continue
        kind = (id(array.sources), array.shape, array.chunk_shape)
        if kind not in known:
            known[kind] = [_pieces(chunk, array.sources) for chunk in array.chunks]
        for chunk, pieces in zip(array.chunks, known[kind], strict=True):
            size = chunk.box.size * itemsize(array.dtype)
            if load[chunk.writer] and load[chunk.writer] + size > ROUND_BYTES:
                yield batch
                batch = []
                load.clear()
            batch.append(Gathering(array, chunk, pieces))
            load[chunk.writer] += size
    if batch:
        yield batch


def _pieces(chunk: Chunk, sources: Pieces) -> Pieces:
    found = ((source, box.intersect(chunk.box)) for source, box in sources)
    return tuple((source, piece) for source, piece in found if piece is not None)


def outgoing(
    batch: Sequence[Gathering], held: Mapping[ArrayKey, Shard | UnreadShard], comm: Comm
) -> tuple[list[Bytes], list[int]]:
    """Return this rank's bytes for each writer, in plan order, and the number of bytes from each rank."""
    parts: list[list[Bytes]] = [[] for _ in range(comm.size)]
    incoming = [0] * comm.size
    for array, chunk, pieces in batch:
        for source, box in pieces:
            if source == comm.rank:
                shard = held[array.key]
                part = shard.data[box.relative_to(shard.spec.box).slices]
                parts[chunk.writer].append(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
            if chunk.writer == comm.rank:
                incoming[source] += box.size * itemsize(array.dtype)
    return [np.concatenate(p) if p else np.empty(0, np.uint8) for p in parts], incoming


def arrived(batch: Sequence[Gathering], received: Sequence[Bytes], rank: int) -> Iterator[Write]:
    """Assemble this rank's chunks from the received pieces, which come in plan order from each rank."""
    cursor = [0] * len(received)
    for array, chunk, pieces in batch:
        if chunk.writer != rank:
            continue
        whole = np.empty(chunk.box.shape, numpy_dtype(array.dtype))
        for source, box in pieces:
            size = box.size * whole.itemsize
            piece = received[source][cursor[source] : cursor[source] + size]
            cursor[source] += size
            inside = box.relative_to(chunk.box).slices
            whole[inside or ...] = piece.view(whole.dtype).reshape(box.shape)
        yield Write(array, chunk, whole)
