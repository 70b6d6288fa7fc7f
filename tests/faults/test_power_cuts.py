"""A save that a power cut ends: whatever the disk kept of what wasn't synced, a reader finds old or new."""

import os
import shutil
from pathlib import Path
from random import Random

from budget import seeds
from figures import Campaign
from power import Disk, Operation, traced
from situations import CASES, Case, Places, copy_linked, left, next_save, saving

TRACED = [case for case in CASES if case.situation != "beside another writer"]
NEXT = 0.2
"""Part of the states in which a next save is tried too."""


class Traces:
    """The operations of each save, and the disk before it."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.known: dict[tuple[Case, bool], tuple[Path, list[Operation]]] = {}
        self.states: dict[tuple[Case, bool], set[int]] = {}

    def of(self, case: Case, walk: bool) -> tuple[Path, list[Operation]]:
        if (case, walk) not in self.known:
            run = self.places.new(case)
            place = self.places.folder / "now"
            before = self.places.folder / f"traced {len(self.known)}"
            copy_linked(place, before)
            work = saving(case, run)
            with traced(place, walk=walk) as log:
                results = work()
            assert not [result for result in results if isinstance(result, BaseException)], results
            self.known[case, walk], self.states[case, walk] = (before, log), set()
        return self.known[case, walk]


def cut(seed: int, traces: Traces) -> tuple[str, list[tuple[str, str]]] | None:
    """Make a state after a power cut; return its label and problems, or None if it was had before."""
    rng = Random(seed)
    case, walk = rng.choice(TRACED), rng.random() < 0.5
    before, log = traces.of(case, walk)
    done = rng.randint(0, len(log))
    disk = Disk(before)
    for operation in log[:done]:
        disk.do(operation)
    state = disk.cut(rng)
    state.tree()
    number = hash((state.identity(), done == len(log)))
    if number in traces.states[case, walk]:
        return None
    traces.states[case, walk].add(number)
    place = traces.places.folder / "cut"
    shutil.rmtree(place, ignore_errors=True)
    state.make(place)
    run = case.run(place)
    problems = left(run, case, returned=done == len(log))
    if rng.random() < NEXT:
        if (run / ".writer").exists():
            os.utime(run / ".writer", (0, 0))  # the power was off for a while
        problems += next_save(run, case)
    last = log[done - 1][:2] if done else ()
    return f"{case}{', without syncfs' if walk else ''}, after {done} of {len(log)} calls, {last}", problems


def test_a_power_cut_after_any_call(places: Places) -> None:
    chosen = seeds(sample=40, everything=46_000)
    campaign, traces = Campaign("power cut, distinct states", len(chosen)), Traces(places)
    for seed in chosen:
        found = cut(seed, traces)
        if found is not None:
            campaign.point(seed, *found)
    campaign.end()
