"""The same bytes by bare system calls, and by zarr-python's own array path."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.checkpoint.ranks import Rank
from benchmarks.checkpoint.workspace import files_below

SPARE = 128 << 20
"""Excess of a rank's buffer over its shard, as files do not divide evenly over ranks."""
PAGE = 4096


class ArraySpec(NamedTuple):
    """An array of a checkpoint, from its zarr document."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def prepare(rank: Rank, nbytes: int) -> None:
    """Make a buffer of random bytes for this rank, with every page touched."""
    generator = np.random.default_rng(rank.rank)
    rank.kept["buffer"] = generator.integers(1 << 62, size=(nbytes + SPARE) // 8).view(np.uint8)


def deal(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Assign items to ranks: the largest first, each to the rank with the fewest bytes."""
    shares: list[list[int]] = [[] for _ in range(world)]
    load = [0] * world
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = load.index(min(load))
        shares[rank].append(item)
        load[rank] += sizes[item]
    return shares


def write_files(rank: Rank, folder: Path, sizes: Sequence[int], *, durable: bool) -> None:
    """Write this rank's share of files of these sizes, into a folder of its own.

    With `durable`, the files are fsynced after the last one is written, and then the folder. That is faster
    than syncing each before the next.
    """
    mine = folder / f"rank{rank.rank}"
    mine.mkdir(parents=True)
    buffer, start = memoryview(rank.kept["buffer"]), 0
    items = deal(sizes, rank.world)[rank.rank]
    for item in items:
        fd = os.open(mine / str(item), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        view = buffer[start : start + sizes[item]]
        assert len(view) == sizes[item], "SPARE is too small"
        start += -(-len(view) // PAGE) * PAGE
        while view:
            view = view[os.write(fd, view) :]
        os.close(fd)
    if durable:
        for path in [*(mine / str(item) for item in items), mine]:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


def read_files(rank: Rank, paths: Sequence[Path], sizes: Sequence[int]) -> None:
    """Read this rank's share of these files into its buffer."""
    buffer, start = memoryview(rank.kept["buffer"]), 0
    for item in deal(sizes, rank.world)[rank.rank]:
        fd = os.open(paths[item], os.O_RDONLY)
        view, done = buffer[start : start + sizes[item]], 0
        assert len(view) == sizes[item], "SPARE is too small"
        start += -(-len(view) // PAGE) * PAGE
        while done < len(view):
            got = os.preadv(fd, [view[done:]], done)
            assert got, f"{paths[item]} is cut short"
            done += got
        os.close(fd)


def copy_memory(rank: Rank, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
    """Copy these arrays, one by one, into this rank's buffer."""
    buffer, start = rank.kept["buffer"], 0
    for array in arrays:
        np.copyto(buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
        start += array.nbytes


def zarr_write(rank: Rank, folder: Path, arrays: Sequence[ArraySpec]) -> None:
    """Create and assign this rank's share of whole arrays with zarr-python."""
    import zarr
    from zarr.codecs import Crc32cCodec

    buffer, start = rank.kept["buffer"], 0
    with zarr.config.set({"array.write_empty_chunks": True}):
        for item in deal([a.nbytes for a in arrays], rank.world)[rank.rank]:
            spec = arrays[item]
            data = buffer[start : start + spec.nbytes]
            assert len(data) == spec.nbytes, "SPARE is too small"
            start += -(-len(data) // PAGE) * PAGE
            array = zarr.create_array(
                folder,
                name=spec.path,
                shape=spec.shape,
                dtype=spec.dtype,
                chunks=spec.chunk_shape,
                compressors=Crc32cCodec(),
                fill_value=float("nan"),
                chunk_key_encoding={"name": "default", "separator": "."},
            )
            array[...] = data.view(spec.dtype).reshape(spec.shape)


def array_specs(checkpoint: Path) -> list[ArraySpec]:
    """Return the arrays of a checkpoint, from its own documents."""
    members = json.loads((checkpoint / "zarr.json").read_text())["consolidated_metadata"]["metadata"]
    return [
        ArraySpec(
            path,
            document["data_type"],
            tuple(document["shape"]),
            tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
        )
        for path, document in members.items()
        if document["node_type"] == "array"
    ]


def is_chunk(path: Path) -> bool:
    """Return whether a file of a checkpoint holds elements and is not a document."""
    return path.name == "c" or path.name.startswith("c.")


def chunk_files(checkpoint: Path) -> tuple[list[Path], list[int]]:
    """Return the files with elements, and their sizes."""
    paths = [path for path in files_below(checkpoint) if is_chunk(path)]
    return paths, [path.stat().st_size for path in paths]


def file_sizes(checkpoint: Path) -> list[int]:
    """Return the size of every file, documents included."""
    return [path.stat().st_size for path in files_below(checkpoint)]
