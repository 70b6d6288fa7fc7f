"""Memory of saving and loading beyond the state itself, on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import save, subject
from benchmarks.checkpoint.bench import Bench
from benchmarks.checkpoint.procfs import MIB, peak_over_start
from benchmarks.checkpoint.ranks import Pool, Rank
from benchmarks.checkpoint.table import Bar, Row, Sample

NOTHING_MIB = 16.0
"""Limit of a second save's extra memory, for plans and checksums; a shard is 50 times as large."""


def figures(bench: Bench) -> list[Row]:
    """Measure the peak of resident memory over that at the start, as the maximum of the two ranks.

    Each of `--repeats` rounds has new processes, which hold no buffers of an earlier one.
    """
    peaks: dict[str, list[float]] = {}
    shard = 0.0
    for _ in range(bench.repeats):
        with Pool(2) as pool, pool.group(2) as ranks:
            ranks.call(subject.make_engine, save.PLACE, bench.options, step=True)
            shard = max(ranks.call(subject.bytes_held)) / MIB
            run = bench.workspace.fresh("run")
            for name, work in {
                "save": partial(subject.save, durable=True),
                "load": subject.load,
                "async save": _save_in_background,
                "second async save": _save_in_background,
            }.items():
                where = run if name in ("save", "load") else bench.workspace.fresh("run")
                peaks.setdefault(name, []).append(max(ranks.call(_peak_mib, work, where)))
    found = {name: Sample(tuple(values), "MiB") for name, values in peaks.items()}
    return _rows(found, shard)


def _rows(found: dict[str, Sample], shard: float) -> list[Row]:
    rank_shard, one = Sample((shard,), "MiB"), Bar("times_as_much", 1.0)
    return [
        Row(
            figure="extra memory of a save, not asynchronous",
            ours=found["save"],
            yardstick="a rank's shard",
            theirs=rank_shard,
            bar=one,
        ),
        Row(
            figure="extra memory of an asynchronous save, the first, until it is committed",
            ours=found["async save"],
            yardstick="a rank's shard",
            theirs=rank_shard,
            bar=one,
        ),
        Row(
            figure="what the second asynchronous save takes beyond that",
            ours=found["second async save"],
            bar=Bar("at_most", NOTHING_MIB),
        ),
        Row(figure="extra memory of a load", ours=found["load"], bar=Bar("at_most", 128)),
    ]


def _peak_mib(rank: Rank, work: Callable[..., Any], folder: Path) -> float:
    with peak_over_start() as peak:
        work(rank, folder)
    return peak[0] / MIB


def _save_in_background(rank: Rank, folder: Path) -> None:
    subject.begin_save(rank, folder)
    subject.wait(rank)
