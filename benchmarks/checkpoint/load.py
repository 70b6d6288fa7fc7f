"""Load into existing tensors, on the topology that saved and on others."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.checkpoint import dcp, save, subject, yardsticks
from benchmarks.checkpoint.bench import Arm, Bench, one_folder, take_turns
from benchmarks.checkpoint.procfs import bytes_read
from benchmarks.checkpoint.ranks import Group, Pool, Rank
from benchmarks.checkpoint.subject import Place
from benchmarks.checkpoint.table import Bar, Row, Sample

TIMED = (
    Place(1, 1, 1, 0),
    Place(1, 2, 1, 1),
    Place(2, 1, 1, 1),
    Place(1, 1, 2, 1),
    Place(2, 2, 1, 1),
    Place(1, 4, 1, 1),
)
"""Topologies of the timed loads, which go between all ordered pairs."""

PAIRS = (
    Place(1, 1, 1, 0),
    Place(1, 2, 1, 0),
    Place(1, 2, 1, 1),
    Place(2, 1, 1, 2),
    Place(1, 1, 2, 3),
    Place(1, 3, 1, 3),
    Place(1, 4, 1, 1),
    Place(2, 2, 1, 1),
    Place(2, 1, 2, 0),
    Place(1, 2, 2, 2),
    Place(4, 1, 1, 0),
    Place(1, 1, 4, 1),
)
"""Topologies of the loads whose bytes are counted, between all ordered pairs. They have every ZeRO stage, and
pp, tp and dp up to 4. dp = 3 divides neither the vocabulary nor the dims that the others split."""


def figures(bench: Bench) -> list[Row]:
    """Load on the topology that saved: two ranks, everything in the page cache."""
    return [*_same_topology(bench, 3), *_same_topology(bench, 1)]


def _same_topology(bench: Bench, zero: int) -> list[Row]:
    with Pool(2) as pool, pool.group(2) as ranks:
        save.prepare(bench, ranks, Place(1, 2, 1, zero))
        ranks.call(dcp.prepare, bench.options)
        run = one_folder(bench.workspace, ranks, "ours", subject.save, durable=False)
        theirs = one_folder(bench.workspace, ranks, "dcp", dcp.save, durable=False)
        paths, sizes = yardsticks.chunk_files(run / "bench")
        _check_that_it_loads(ranks, run)
        arms: dict[str, Arm] = {
            "ours": lambda: ranks.time(subject.load, run).seconds,
            "raw": lambda: ranks.time(yardsticks.read_files, paths, sizes).seconds,
            "dcp": lambda: ranks.time(dcp.load, theirs).seconds,
            "gather": lambda: ranks.time(subject.show_parameters).seconds,
        }
        for arm in arms.values():
            arm()
        times = take_turns(arms, bench.repeats)
    figure = f"load into existing tensors, checksums verified, same topology, 2 ranks, ZeRO {zero}"
    rows = [
        Row(
            figure=figure,
            ours=times["ours"],
            yardstick=f"preadv of the same {len(paths)} files into existing memory",
            theirs=times["raw"],
            bar=Bar("times_as_fast", 0.75),
        ),
        Row(figure=figure, ours=times["ours"], yardstick="DCP", theirs=times["dcp"]),
    ]
    gathers = "gathering whole parameters, which a load ends with and the next step needs"
    if zero < 3:
        rows.append(Row(figure=figure, ours=times["ours"], yardstick=gathers, theirs=times["gather"]))
    return rows


def _check_that_it_loads(ranks: Group, run: Path) -> None:
    """Check that a load restores the state: one that does not would be fast."""
    before = ranks.call(subject.digest)
    ranks.call(subject.erase)
    assert ranks.call(subject.digest) != before, "the state was not erased"
    ranks.call(subject.load, run)
    assert ranks.call(subject.digest) == before, "the load did not restore the state"


def topology_figures(bench: Bench) -> list[Row]:
    """Load on each topology the saves of all others in `TIMED`, and compare with a load of its own save."""
    rows = []
    with Pool(4) as pool:
        runs = {place: _saved(bench, pool, place, bench.options) for place in TIMED}
        for place in TIMED:
            with pool.group(place.world) as ranks:
                ranks.call(subject.make_engine, place, bench.options, step=False)

                def arm(run: Path, ranks: Group = ranks) -> Arm:
                    return lambda: ranks.time(subject.load, run).seconds

                arms = {str(source): arm(run) for source, run in runs.items()}
                for one in arms.values():  # the first creates the moments, and all fill the cache
                    one()
                times = take_turns(arms, bench.repeats)
            same = times.pop(str(place))
            rows.append(_topology_row(place, same, times))
    return rows


def _topology_row(place: Place, same: Sample, others: dict[str, Sample]) -> Row:
    source, worst = max(others.items(), key=lambda item: item[1].median)
    return Row(
        figure=f"load on {place} what {len(others)} others saved; the slowest: {source}",
        ours=worst,
        yardstick="what it saved itself",
        theirs=same,
        bar=Bar("times_as_much", 1.1),
        parts=others,
    )


def _saved(bench: Bench, pool: Pool, place: Place, options: dict[str, object]) -> Path:
    """Write a checkpoint on this topology; return its run."""
    with pool.group(place.world) as ranks:
        ranks.call(subject.make_engine, place, options, step=True)
        return one_folder(bench.workspace, ranks, "source", subject.save, durable=False)


def byte_figures(bench: Bench) -> list[Row]:
    """Compute bytes read / bytes wanted, on the worst rank of the worst ordered pair of `PAIRS`.

    Bytes read are uni3d's own count or Linux's count of the process's read calls, whichever is larger.
    """
    ratios: dict[str, float] = {}
    with Pool(4) as pool:
        runs = {place: _saved(bench, pool, place, bench.pair_options) for place in PAIRS}
        for place in PAIRS:
            with pool.group(place.world) as ranks:
                ranks.call(subject.make_engine, place, bench.pair_options, step=False)
                ranks.call(subject.load, runs[place])  # creates the moments, and imports modules
                for source, run in runs.items():
                    ratios[f"{source} -> {place}"] = max(ranks.call(_amplification, run))
    pair, worst = max(ratios.items(), key=lambda item: item[1])
    what = (
        f"{len(ratios)} ordered pairs of {len(PAIRS)} topologies, {bench.pair_options['num_layers']} layers"
    )
    return [
        Row(
            figure=f"bytes read / bytes wanted, worst rank of {what}",
            ours=Sample((worst,), "x"),
            yardstick=f"the worst is {pair}; the median {statistics.median(ratios.values()):.4f}",
            bar=Bar("at_most", 1.1),
            parts={name: Sample((ratio,), "x") for name, ratio in ratios.items()},
        )
    ]


def _amplification(rank: Rank, run: Path) -> float:
    before = bytes_read()
    subject.load(rank, run)
    read = max(bytes_read() - before, subject.bytes_read(rank))
    return read / subject.bytes_held(rank)
