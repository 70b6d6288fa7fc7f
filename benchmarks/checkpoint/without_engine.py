"""Save, stall and load of an FSDP2 model that no engine of uni3d has, beside the engine's and DCP's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uni3d
from benchmarks.checkpoint import dcp, subject
from benchmarks.checkpoint.bench import Bench, one_folder, take_turns
from benchmarks.checkpoint.ranks import Pool, Rank
from benchmarks.checkpoint.subject import Place
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

PLACE = Place(1, 2, 1, 3)
WITHOUT = "uni3d.Checkpointer on FSDP2, 2 ranks"


def figures(bench: Bench) -> list[Row]:
    """Measure durable saves, stalls and loads; the model and its moments are the same for DCP and ours."""
    with Pool(2) as pool, pool.group(2) as ranks:
        ranks.call(subject.make_engine, PLACE, bench.options, step=True)
        ranks.call(dcp.prepare, bench.options)
        saves = {
            "ours": bench.save_arm(ranks, "ours", save),
            "engine": bench.save_arm(ranks, "engine", subject.save, durable=True),
            "dcp": bench.save_arm(ranks, "dcp", dcp.save, durable=True),
        }
        saved = take_turns(saves, bench.repeats)
        bench.workspace.make_room()

        def stall(name: str, begin: Callable[..., None], wait: Callable[[Rank], None], **how: Any) -> float:
            seconds = max(ranks.time(begin, bench.workspace.fresh(name), **how).each)
            ranks.call(wait)
            settle_disk()
            return seconds

        stalls = {
            "ours": partial(stall, "ours", begin_save, wait_for_save),
            "engine": partial(stall, "engine", subject.begin_save, subject.wait),
            "dcp": partial(stall, "dcp", dcp.begin_save, dcp.wait, kept_stager=False),
        }
        for arm in stalls.values():  # the first of each allocates its buffers
            arm()
        stalled = take_turns(stalls, bench.repeats)
        bench.workspace.make_room()
        run = one_folder(bench.workspace, ranks, "run", save)
        engines = one_folder(bench.workspace, ranks, "engine-run", subject.save, durable=False)
        theirs = one_folder(bench.workspace, ranks, "dcp-run", dcp.save, durable=False)
        loads = {
            "ours": lambda: ranks.time(load, run).seconds,
            "engine": lambda: ranks.time(subject.load, engines).seconds,
            "dcp": lambda: ranks.time(dcp.load, theirs).seconds,
        }
        for one in loads.values():
            one()
        loaded = take_turns(loads, bench.repeats)
    rows = _rows("durable save", saved, 1.2)
    return rows + _rows("stall of an asynchronous save", stalled, 5.0) + _rows("load", loaded, 2.0)


def _rows(what: str, times: dict[str, Sample], bar: float) -> list[Row]:
    figure, ours = f"{what}, {WITHOUT}", times["ours"]
    return [
        Row(
            figure=figure,
            ours=ours,
            yardstick="the engine at ZeRO 3",
            theirs=times["engine"],
            bar=Bar("times_as_fast", 0.97),
        ),
        Row(
            figure=figure,
            ours=ours,
            yardstick="DCP on the same model",
            theirs=times["dcp"],
            bar=Bar("times_as_fast", bar),
        ),
    ]


def _keeper(rank: Rank, run: Path, *, background: bool) -> uni3d.Checkpointer:
    name = f"keeper {background=}"
    if name not in rank.kept:
        given = {key: rank.kept[key] for key in ("model", "optimizer")}
        rank.kept[name] = uni3d.Checkpointer(run, **given, async_save=background)
    keeper: uni3d.Checkpointer = rank.kept[name]
    keeper.run = run
    return keeper


def save(rank: Rank, run: Path) -> None:
    """Save durably, and return when it is committed."""
    _keeper(rank, run, background=False).save(1, tag="bench")


def begin_save(rank: Rank, run: Path) -> None:
    """Start an asynchronous, durable save; return when training may go on."""
    _keeper(rank, run, background=True).save(1, tag="bench")


def wait_for_save(rank: Rank) -> None:
    rank.kept["keeper background=True"].wait()


def load(rank: Rank, run: Path) -> None:
    with subject.quiet():
        _keeper(rank, run, background=False).load("bench")
