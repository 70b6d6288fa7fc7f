"""Helpers of `ckpt`'s tests: ranks as threads, small checkpoints, and readers of zarr."""

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import zarr
from fsspec.core import url_to_fs
from ml_dtypes import bfloat16

from ckpt import (
    ArrayKey,
    Box,
    Plan,
    SaveReport,
    Shard,
    ShardSpec,
    Solo,
    files_for,
    load,
    make_plan,
    open_checkpoint,
    save,
    verify,
)
from ckpt.format import array_path

DOCUMENT = {"step": 3, "aliases": {"head.weight": "embed.weight"}, "client_state": {"note": "kept"}}


class ThreadComm:
    """One rank of a group of threads. If one skips a collective, the others fail after a timeout."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.board = rank, size, barrier, board

    def _all(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(30)
        everyone = pickle.loads(pickle.dumps(self.board))  # ranks share nothing
        self.barrier.wait(30)
        return everyone

    def gather(self, value: Any) -> list[Any]:
        everyone = self._all(value)
        return [] if self.rank else everyone

    def broadcast(self, value: Any) -> Any:
        return self._all(value)[0]

    def all_reduce(self, value: Any, merge: Callable[[list[Any]], Any]) -> Any:
        everyone = self._all(value)
        half = len(everyone) // 2  # in two steps, as ranks that merge along a tree do
        return merge([*([merge(everyone[:half])] if half else []), merge(everyone[half:])])

    def exchange(self, outgoing: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        assert all(o.dtype == np.uint8 and o.ndim == 1 for o in outgoing.values())
        everyone = enumerate(self._all(outgoing))
        return {rank: sent[self.rank] for rank, sent in everyone if self.rank in sent}


def run_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """Do `work(comm)` on each of `size` ranks; return each one's result, or the exception that it raised."""
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
    """Do `work(comm)` on each of `size` ranks, none of which may fail; return the results."""
    results = run_ranks(size, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def even_cut(length: int, parts: int) -> list[tuple[int, int]]:
    """Return `(offset, length)` of `parts` parts of ceil(length / parts); the last ones may be empty."""
    each = -(-length // parts)
    return [
        (min(i * each, length), min((i + 1) * each, length) - min(i * each, length)) for i in range(parts)
    ]


def cut(shape: Sequence[int], cuts: Sequence[int]) -> list[Box]:
    """Return the boxes of an array whose dim d is cut evenly into `cuts[d]` parts, last dim fastest."""
    parts = [even_cut(n, k) for n, k in zip(shape, cuts, strict=True)]
    return [Box(tuple(o for o, _ in c), tuple(n for _, n in c)) for c in product(*parts)]


Arrays = dict[tuple[str, str], np.ndarray]
Boxes = dict[tuple[str, str], list[Box]]


Ranks = dict[int, list[ShardSpec]]


def layout_of(arrays: Arrays, boxes: Boxes, fine: Mapping[tuple[str, str], int] = {}) -> Ranks:
    """Return the layout in which rank r holds `boxes[key][r]` of each array; equal boxes are replicas."""
    size = len(next(iter(boxes.values())))
    return {
        rank: [
            ShardSpec(ArrayKey(*key), str(a.dtype), a.shape, boxes[key][rank], fine.get(key))
            for key, a in arrays.items()
            if key in boxes
        ]
        for rank in range(size)
    }


def shards_of(arrays: Arrays, specs: Sequence[ShardSpec]) -> list[Shard]:
    """Return a rank's shards, with copies of its parts of the whole arrays."""
    return [Shard(s, np.array(arrays[s.key][s.box.slices], order="C")) for s in specs]


def parts_of(arrays: Arrays, specs: Sequence[ShardSpec], plan: Plan, rank: int) -> list[Shard]:
    """Return only the parts of a rank's shards that the plan expects from it."""
    parts = plan.parts(rank)
    return shards_of(arrays, [replace(s, box=parts[s.key]) for s in specs if s.key in parts])


def targets_of(specs: Sequence[ShardSpec]) -> list[Shard]:
    """Return a rank's targets, filled with a pattern that no test stores."""
    patterns = [np.frombuffer(b"\xa5" * nbytes(s), dtype_of(s.dtype)) for s in specs]
    return [Shard(s, p.reshape(s.box.shape).copy()) for s, p in zip(specs, patterns, strict=True)]


def dtype_of(name: str) -> np.dtype:
    return np.dtype(bfloat16 if name == "bfloat16" else name)


def nbytes(spec: ShardSpec) -> int:
    return spec.box.size * dtype_of(spec.dtype).itemsize


def whole(arrays: Arrays) -> Boxes:
    """Return the boxes that put every array on one rank."""
    return {key: [Box.whole(a.shape)] for key, a in arrays.items()}


def save_arrays(
    run: Any,
    tag: str,
    arrays: Arrays,
    boxes: Boxes | None = None,
    fine: Mapping[tuple[str, str], int] = {},
    planning: Mapping[str, Any] = {},
    **options: Any,
) -> SaveReport:
    """Save whole arrays, each rank holding its `boxes`; without them, from one rank.

    `planning` has further arguments of `make_plan`, `options` those of `save`.
    """
    options = {"document": DOCUMENT, "durable": False, **options}
    layout = layout_of(arrays, whole(arrays) if boxes is None else boxes, fine)
    plan = make_plan(layout, **{"files": files_for(run), **planning})

    def work(comm: Any) -> SaveReport:
        shards = shards_of(arrays, layout[comm.rank])
        return save(run, tag, shards, plan=plan, comm=comm, **options)

    return work(Solo()) if len(layout) == 1 else all_ranks(len(layout), work)[0]


def holding(candidates: Mapping[str, Arrays], run: Any, tag: str) -> str:
    """Return the name of the candidate whose numbers the tag holds."""
    checkpoint = open_checkpoint(run, tag)
    for name, arrays in candidates.items():
        if all(same(checkpoint.read(*key), expected) for key, expected in arrays.items()):
            return name
    raise AssertionError(f"{tag} holds none of {', '.join(candidates)}")


def random_array(rng: np.random.Generator, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Return random bits for integers, so that every byte counts, and random numbers for floats."""
    if dtype == "bfloat16":
        return rng.standard_normal(shape).astype(bfloat16)
    kind = np.dtype(dtype).kind
    if kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays are equal bit for bit, in shape and in dtype."""
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def files_below(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its path relative to the folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def zarr_read(folder: Path, key: tuple[str, str]) -> np.ndarray:
    """Read an array of a checkpoint as zarr-python does."""
    return np.asarray(zarr.open_array(folder / array_path(*key), mode="r")[...])


def tensorstore_read(folder: Path, key: tuple[str, str]) -> np.ndarray:
    """Read an array of a checkpoint as tensorstore does."""
    store = {"driver": "file", "path": f"{folder / array_path(*key)}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result().read().result()


def stored(array: np.ndarray) -> np.ndarray:
    """Return the array as a zarr reader without bfloat16 sees it."""
    return array.view(np.uint16) if array.dtype == bfloat16 else array


def check_read(run: Any, tag: str, arrays: Arrays, copy: Path | None = None) -> None:
    """Check that we, zarr-python and tensorstore read these arrays, and that nothing is damaged.

    `copy` is an unused folder, for the objects of a run that isn't one.
    """
    checkpoint = open_checkpoint(run, tag)
    folder = Path(run) / tag if copy is None else copied(f"{run}/{tag}", copy)
    assert {*checkpoint.arrays} == {*arrays}
    for key, expected in arrays.items():
        assert same(checkpoint.read(*key), expected), key
        assert same(zarr_read(folder, key), stored(expected)), key
        assert same(tensorstore_read(folder, key), stored(expected)), key
    assert verify(checkpoint) == []


def copied(url: str, folder: Path) -> Path:
    """Copy all objects below a URL into a folder; return it."""
    fs, root = url_to_fs(url)
    for name in fs.find(root):
        path = folder / name.removeprefix(root).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fs.cat_file(name))
    return folder


def load_in(run: Any, arrays: Arrays, boxes: Boxes) -> None:
    """Load into ranks that hold `boxes`, and check what each of them gets."""
    checkpoint, layout = open_checkpoint(run), layout_of(arrays, boxes)
    targets = {rank: targets_of(specs) for rank, specs in layout.items()}
    all_ranks(len(layout), lambda comm: load(checkpoint, targets[comm.rank], comm=comm))
    for target in (target for held in targets.values() for target in held):
        assert same(target.data, np.asarray(arrays[target.spec.key][target.spec.box.slices])), target.spec
