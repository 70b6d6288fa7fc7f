"""Write and read ten thousand atoms of 16 numbers by `ckpt` alone; zarr-python does a tenth of them.

Run as a program it measures, in a process without torch, and prints JSON:
`python -m benchmarks.checkpoint.tiny FOLDER REPEATS`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

import ckpt
from benchmarks.checkpoint.bench import Bench
from benchmarks.checkpoint.table import Bar, Row, Sample

SHAPE = (16,)
ATOMS = 10_000
ZARR_ATOMS = 1_000


def figures(bench: Bench) -> list[Row]:
    """Measure milliseconds for each atom, in one process."""
    folder = bench.workspace.fresh("tiny")
    command = [sys.executable, "-m", "benchmarks.checkpoint.tiny", str(folder), str(bench.repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = {name: Sample(tuple(values), "ms") for name, values in json.loads(done.stdout).items()}
    yardstick = f"zarr-python, {ZARR_ATOMS:,} atoms"
    return [
        Row(
            figure=f"{ATOMS:,} tiny atoms, each to write (durable=False)",
            ours=found["write"],
            yardstick=yardstick,
            theirs=found["zarr write"],
            bar=Bar("at_most", 0.3),
        ),
        Row(
            figure=f"{ATOMS:,} tiny atoms, each to read",
            ours=found["read"],
            yardstick=yardstick,
            theirs=found["zarr read"],
            bar=Bar("at_most", 0.1),
        ),
    ]


def measure(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return `{arm: milliseconds for each atom, one for each round}`."""
    written, read = _shards(1.0), _shards(0.0)
    arms: dict[str, tuple[Callable[[Path], None], int]] = {
        "write": (partial(_write, written), ATOMS),
        "read": (partial(_read, read), ATOMS),
        "zarr write": (_zarr_write, ZARR_ATOMS),
        "zarr read": (_zarr_read, ZARR_ATOMS),
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(repeats + 1):
        for name, (work, count) in arms.items():
            place = folder / f"{turn}-{count}"
            start = time.perf_counter()
            work(place)
            seconds = time.perf_counter() - start
            if turn:  # the first round imports modules
                found[name].append(seconds * 1e3 / count)
            os.sync()
    return found


def _shards(fill: float) -> list[ckpt.Shard]:
    box = ckpt.Box((0,), SHAPE)
    return [
        ckpt.Shard(
            ckpt.ShardSpec(ckpt.ArrayKey(f"layers.{i}.bias", "fp32"), "float32", SHAPE, box),
            np.full(SHAPE, fill, np.float32),
        )
        for i in range(ATOMS)
    ]


def _write(shards: list[ckpt.Shard], run: Path) -> None:
    plan = ckpt.make_plan({0: [shard.spec for shard in shards]})
    ckpt.save(run, "bench", shards, plan=plan, comm=ckpt.Solo(), document={}, durable=False)


def _read(targets: list[ckpt.Shard], run: Path) -> None:
    targets[-1].data.fill(0.0)
    ckpt.load(ckpt.open_checkpoint(run), targets, comm=ckpt.Solo())
    assert targets[-1].data[-1] == 1.0, "the load restored nothing"


def _zarr_write(folder: Path) -> None:
    data = np.ones(SHAPE, np.float32)
    for i in range(ZARR_ATOMS):
        array = zarr.create_array(
            folder,
            name=f"atoms/layers.{i}.bias/fp32",
            shape=SHAPE,
            dtype="float32",
            chunks=SHAPE,
            compressors=Crc32cCodec(),
            fill_value=float("nan"),
            chunk_key_encoding={"name": "default", "separator": "."},
        )
        array[...] = data


def _zarr_read(folder: Path) -> None:
    group = zarr.open_group(folder, mode="r")
    for i in range(ZARR_ATOMS):
        _ = group[f"atoms/layers.{i}.bias/fp32"][...]  # type: ignore[index]


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
