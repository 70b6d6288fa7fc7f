"""Resize: save on two ranks and load on another number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.checkpoint import dcp, peers, save, subject
from benchmarks.checkpoint.bench import Bench, Work
from benchmarks.checkpoint.peers import DeepSpeed
from benchmarks.checkpoint.ranks import Group, Pool
from benchmarks.checkpoint.subject import Place
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

TARGETS = (Place(1, 4, 1, 1), Place(1, 1, 1, 1))
"""Topologies that load; those to which DeepSpeed's data-parallel ZeRO-1 can be resized."""

Steps = dict[str, float]
"""Seconds of each step of one resize."""


def figures(bench: Bench) -> list[Row]:
    """Measure saves without fsync, as DeepSpeed's are, and durable ones."""
    rows = []
    with Pool(2) as savers, savers.group(2) as saving, Pool(4) as loaders:
        saving.call(subject.make_engine, save.PLACE, bench.options, step=True)
        saving.call(dcp.prepare, bench.options)
        for target in TARGETS:
            bench.workspace.make_room()
            with loaders.group(target.world) as loading:
                loading.call(subject.make_engine, target, bench.options, step=False)
                loading.call(dcp.prepare, bench.options)
                rows += _rows(bench, target, _measure(bench, saving, loading))
    return rows


def _measure(bench: Bench, saving: Group, loading: Group) -> dict[str, list[Steps]]:
    """Return the seconds of each round by arm; the arms take turns."""

    def ours(durable: bool) -> Steps:
        return _resize(bench, saving, loading, partial(subject.save, durable=durable), subject.load)

    arms: dict[str, Callable[[], Steps]] = {
        "no fsync": partial(ours, durable=False),
        "durable": partial(ours, durable=True),
        "DCP": partial(_resize, bench, saving, loading, partial(dcp.save, durable=False), dcp.load),
    }
    for arm in arms.values():  # the first creates the moments
        arm()
    if bench.deepspeed:
        arms["DeepSpeed"] = partial(_deepspeed, bench, bench.deepspeed, loading.world)
    found: dict[str, list[Steps]] = {name: [] for name in arms}
    for _ in range(bench.repeats):
        for name, one in arms.items():
            found[name].append(one())
    return found


def _rows(bench: Bench, target: Place, found: dict[str, list[Steps]]) -> list[Row]:
    figure, yardstick = (
        f"resize, 2 ranks to {target.world}: save + load",
        "save + ds_to_universal + load, no fsync",
    )
    peer = _sum(found["DeepSpeed"]) if "DeepSpeed" in found else None
    parts = {f"{arm}: {step}": Sample(tuple(steps[step] for steps in rounds))
             for arm, rounds in found.items() for step in rounds[0]}  # fmt: skip
    return [
        Row(
            figure=f"{figure}, no fsync",
            ours=_sum(found["no fsync"]),
            yardstick=peers.named(bench.deepspeed, yardstick),
            theirs=peer,
            bar=Bar("times_as_fast", 8.0),
            parts=parts,
        ),
        Row(
            figure=f"{figure}, no fsync",
            ours=_sum(found["no fsync"]),
            yardstick="DCP, save + load, sync_files=False",
            theirs=_sum(found["DCP"]),
        ),
        Row(
            figure=f"{figure}, durable",
            ours=_sum(found["durable"]),
            yardstick=peers.named(bench.deepspeed, yardstick),
            theirs=peer,
        ),
    ]


def _sum(rounds: list[Steps]) -> Sample:
    return Sample(tuple(sum(steps.values()) for steps in rounds))


def _resize(bench: Bench, saving: Group, loading: Group, write: Work, read: Work) -> Steps:
    folder = bench.workspace.fresh("resize")
    settle_disk()
    seconds = {"save": saving.time(write, folder).seconds}
    seconds["load"] = loading.time(read, folder).seconds
    settle_disk(folder)
    return seconds


def _deepspeed(bench: Bench, deepspeed: DeepSpeed, ranks: int) -> Steps:
    folder = bench.workspace.fresh("deepspeed")
    seconds = {
        "save": deepspeed.step("save", folder, 2)["seconds"],
        "convert": deepspeed.step("convert", folder)["seconds"],
        "load": deepspeed.step("load", folder, ranks)["seconds"],
    }
    settle_disk(folder)
    return seconds
