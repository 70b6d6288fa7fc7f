"""Ranks as threads, and small checkpoints: what the tests of `ckpt` share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np

from ckpt import ArrayKey, Box, Shard, ShardSpec, Solo, save

DOCUMENT = {"step": 3, "aliases": {"head.weight": "embed.weight"}, "client_state": {"note": "kept"}}


class ThreadComm:
    """One rank of a group of threads. Where one leaves a collective out, the others fail after a while."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def all_gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(10)
        everyone = deepcopy(self.board)  # ranks share nothing
        self.barrier.wait(10)
        return everyone

    def exchange(self, outgoing: list[np.ndarray], incoming_sizes: list[int]) -> list[np.ndarray]:
        assert all(o.dtype == np.uint8 and o.ndim == 1 for o in outgoing)
        assert len(outgoing) == len(incoming_sizes) == self.size
        received = [sent[self.rank] for sent in self.all_gather(outgoing)]
        assert [r.nbytes for r in received] == incoming_sizes, "the sizes announced are not those sent"
        return received


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Do `work(comm)` on each of `size` ranks; what each returned, or the exception that it raised."""
    barrier, board, results = threading.Barrier(size), [None] * size, [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadComm(rank, size, barrier, board))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def all_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """The same, where no rank may fail."""
    results = run_ranks(size, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def even_cut(length: int, parts: int) -> list[tuple[int, int]]:
    """`(offset, length)` of each of `parts` parts of ceil(length / parts); the last ones may be empty."""
    each = -(-length // parts)
    return [
        (min(i * each, length), min((i + 1) * each, length) - min(i * each, length)) for i in range(parts)
    ]


def cut(shape: Sequence[int], cuts: Sequence[int]) -> list[Box]:
    """The boxes of an array whose dim d is cut evenly into `cuts[d]` parts, last dim fastest."""
    parts = [even_cut(n, k) for n, k in zip(shape, cuts, strict=True)]
    return [Box(tuple(o for o, _ in c), tuple(n for _, n in c)) for c in product(*parts)]


Arrays = dict[tuple[str, str], np.ndarray]
Boxes = dict[tuple[str, str], list[Box]]


def layout_of(arrays: Arrays, boxes: Boxes) -> list[list[ShardSpec]]:
    """The layout in which rank r holds `boxes[key][r]` of each array; where boxes repeat, copies."""
    size = len(next(iter(boxes.values())))
    return [
        [
            ShardSpec(ArrayKey(*key), str(a.dtype), a.shape, boxes[key][rank])
            for key, a in arrays.items()
            if key in boxes
        ]
        for rank in range(size)
    ]


def shards_of(arrays: Arrays, specs: Sequence[ShardSpec]) -> list[Shard]:
    """A rank's shards, with copies of its parts of the whole arrays."""
    return [Shard(s, np.array(arrays[s.key][s.box.slices], order="C")) for s in specs]


def targets_of(specs: Sequence[ShardSpec]) -> list[Shard]:
    """A rank's targets, filled with a pattern that no test stores."""
    return [Shard(s, np.frombuffer(b"\xa5" * nbytes(s), s.dtype).reshape(s.box.shape).copy()) for s in specs]


def nbytes(spec: ShardSpec) -> int:
    return spec.box.size * np.dtype(spec.dtype).itemsize


def whole(arrays: Arrays) -> Boxes:
    """Everything on one rank."""
    return {key: [Box.whole(a.shape)] for key, a in arrays.items()}


def save_arrays(run: Any, tag: str, arrays: Arrays, boxes: Boxes | None = None, **options: Any) -> None:
    """Save whole arrays, held as `boxes` say (without them: by one rank)."""
    options = {"document": DOCUMENT, "durable": False, **options}
    layout = layout_of(arrays, whole(arrays) if boxes is None else boxes)
    work = lambda comm: save(  # noqa: E731
        run, tag, shards_of(arrays, layout[comm.rank]), layout=layout, comm=comm, **options
    )
    if len(layout) == 1:
        work(Solo())
    else:
        all_ranks(len(layout), work)


def random_array(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Random bits for integers (so every byte counts), random numbers for floats."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bit for bit, and of one shape and type."""
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
