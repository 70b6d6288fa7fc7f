"""Resize: save on two ranks and load on another number of ranks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.checkpoint import save, subject
from benchmarks.checkpoint.bench import Bench
from benchmarks.checkpoint.ranks import Group, Pool
from benchmarks.checkpoint.subject import Place
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

TARGETS = (Place(1, 4, 1, 1), Place(1, 1, 1, 1))
"""Topologies that load; those to which DeepSpeed's data-parallel ZeRO-1 can be resized."""

PUBLISHED = {4: (0.66 + 12 + 2.7, 0.90 + 15 + 2.9), 1: (0.66 + 12 + 2.2, 0.90 + 15 + 2.7)}
"""Seconds of DeepSpeed 0.19.8's save, ds_to_universal and load, by number of loading ranks: least and most of
3, on another machine of this shape, with the same model except for its norms (`benchmarks/RESULTS.md`)."""


Steps = dict[str, float]
"""Seconds of each step of one resize."""


def figures(bench: Bench) -> list[Row]:
    """Measure saves without fsync, as DeepSpeed's are, and durable ones."""
    rows = []
    with Pool(2) as savers, savers.group(2) as saving, Pool(4) as loaders:
        saving.call(subject.make_engine, save.PLACE, bench.options, step=True)
        for target in TARGETS:
            bench.workspace.make_room()
            with loaders.group(target.world) as loading:
                loading.call(subject.make_engine, target, bench.options, step=False)
                _resize(bench, saving, loading, durable=False)  # creates the moments
                arms: dict[str, Callable[[], Steps]] = {
                    "no fsync": partial(_resize, bench, saving, loading, durable=False),
                    "durable": partial(_resize, bench, saving, loading, durable=True),
                }
                if bench.deepspeed:
                    arms["deepspeed"] = partial(_deepspeed, bench, target.world)
                found: dict[str, list[Steps]] = {name: [] for name in arms}
                for _ in range(bench.repeats):
                    for name, arm in arms.items():
                        found[name].append(arm())
            rows += _rows(target, found)
    return rows


def _rows(target: Place, found: dict[str, list[Steps]]) -> list[Row]:
    peer = Sample(PUBLISHED[target.world], published="published")
    if "deepspeed" in found:
        peer = _sum(found["deepspeed"])
    figure = f"resize, 2 ranks to {target.world}: save + load"
    return [
        Row(
            figure=f"{figure}, {kind}",
            ours=_sum(found[kind]),
            yardstick="DeepSpeed ZeRO-1: save + ds_to_universal + load, no fsync",
            theirs=peer,
            bar=bar,
            parts=_parts("ours", found[kind]) | _parts("DeepSpeed", found.get("deepspeed", [])),
        )
        for kind, bar in (("no fsync", Bar("times_as_fast", 8.0)), ("durable", None))
    ]


def _sum(rounds: list[Steps]) -> Sample:
    return Sample(tuple(sum(steps.values()) for steps in rounds))


def _parts(whose: str, rounds: list[Steps]) -> dict[str, Sample]:
    names = rounds[0] if rounds else []
    return {f"{whose}: {name}": Sample(tuple(steps[name] for steps in rounds)) for name in names}


def _resize(bench: Bench, saving: Group, loading: Group, *, durable: bool) -> Steps:
    run = bench.workspace.fresh("resize")
    settle_disk()
    seconds = {"save": saving.time(subject.save, run, durable=durable).seconds}
    seconds["load"] = loading.time(subject.load, run).seconds
    settle_disk(run)
    return seconds


def _deepspeed(bench: Bench, ranks: int) -> Steps:
    return deepspeed_figures(bench, "resize", str(ranks))


def deepspeed_figures(bench: Bench, *what: str) -> dict[str, float]:
    """Run `deepspeed_arm.py` once; return its seconds and MiB by name."""
    assert bench.deepspeed is not None, "only with an interpreter that has it"
    folder = bench.workspace.fresh("deepspeed")
    settle_disk()
    arm = Path(__file__).with_name("deepspeed_arm.py")
    command = [bench.deepspeed, str(arm), str(folder), json.dumps(bench.options), *what]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    settle_disk(folder)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds
