"""A save whose process is killed at each of its calls to the file system: the old or the new, and whole."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from budget import seeds
from ckpt_faults import Faults
from figures import Campaign
from situations import CASES, Case, Places, left, next_save, saver, saving
from turns import ended, forked, in_processes

SHUFFLED = Random(0).sample(CASES, len(CASES))
EACH = 200
"""Kills of each case to try, out of up to 800."""
PARTS = (0.0, 0.5, 0.99)
"""Parts of a write that are done before the process dies in it."""
ALL = -1
Point = tuple[int, int, float]
"""Rank that dies (ALL: all of them, as one process), number of its call, part of a write."""


def points(case: Case, places: Places) -> list[Point]:
    """List the kills of a case that are tried, in a mixed order that is always the same."""
    work = saving(case, places.new(case))
    with Faults(0).active() as faults:
        results = work()
    assert not [result for result in results if isinstance(result, BaseException)], results
    found, calls = list[Point](), Counter[int]()
    for k, (name, thread) in enumerate(zip(faults.names, faults.threads, strict=True), start=1):
        rank = int(thread.removeprefix("rank "))
        calls[rank] += 1
        for part in PARTS if name == "pwritev" else PARTS[:1]:
            found.append((ALL, k, part))
            if case.ranks > 1 and case.situation != "beside another writer":
                found.append((rank, calls[rank], part))
    return Random(0).sample(found, min(EACH, len(found)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_all(k: int, part: float, work: Callable[[], list[Any]]) -> int:
    """Do a save in a child process that dies at its k-th call; return how it ended."""

    def child() -> int:
        with Faults(k, at_fault=die, part=part).active():
            return 5 if any(isinstance(result, BaseException) for result in work()) else 0

    return ended(forked(child))


def kill_one(case: Case, run: Path, point: Point) -> list[int]:
    """Do a save in a process for each rank, one of which dies; return how each ended."""
    who, k, part = point
    work = saver(case, run)

    def rank(comm: Any) -> int:
        try:
            with Faults(k if comm.rank == who else 0, at_fault=die, part=part).active():
                work(comm)
        except Exception:
            return 5
        return 0

    return in_processes(case.ranks, rank)


def beside(case: Case, run: Path, seed: int) -> int:
    """Begin another process's save into the same run."""
    work = saving(Case("next", 1, case.files, case.many), run, new="other", tag="t3")

    def child() -> int:
        time.sleep(Random(seed).choice((0, 0.001, 0.003, 0.01)))
        with Faults(0).active():
            (result,) = work()
        return 5 if isinstance(result, BaseException) else 0

    return forked(child)


def kill(case: Case, point: Point, places: Places, seed: int) -> list[tuple[str, str]] | None:
    """Do a save that is killed; return what is wrong with what it left, or None if it wasn't."""
    who, k, part = point
    run, problems, others = places.new(case), [], tuple[str, ...]()
    if who != ALL:
        ends = kill_one(case, run, point)
        if ends[who] != -signal.SIGKILL:
            return None
        odd = [end for rank, end in enumerate(ends) if rank != who and end not in (0, 5)]
        problems += [("other", f"another rank ended with {end}") for end in odd]
    elif case.situation == "beside another writer":
        other = beside(case, run, seed)
        end = kill_all(k, part, saving(case, run))
        others = ("t3",)
        if (code := ended(other)) not in (0, 5):
            problems.append(("other", f"the other writer ended with {code}"))
        if end != -signal.SIGKILL:
            return None if end in (0, 5) else [("other", f"it ended with {end}")]
    else:
        end = kill_all(k, part, saving(case, run))
        if end != -signal.SIGKILL:
            return [("other", f"it wasn't killed, but ended with {end}")]
    problems += left(run, case, beside=others)
    return problems + next_save(run, case)


def test_a_kill_at_each_call(places: Places) -> None:
    known: dict[Case, list[Point]] = {}
    chosen = seeds(sample=24, everything=len(SHUFFLED) * EACH)
    if len(chosen) > len(SHUFFLED):
        known = {case: points(case, places) for case in SHUFFLED}
    campaign = Campaign("kill at each call of a save", sum(map(len, known.values())) or len(chosen))
    for seed in chosen:
        case = SHUFFLED[seed % len(SHUFFLED)]
        if case not in known:
            known[case] = points(case, places)
        number = seed // len(SHUFFLED)
        if number >= len(known[case]):
            continue
        point = known[case][number]
        problems = kill(case, point, places, seed)
        if problems is not None:
            campaign.point(seed, f"{case}, {point}", problems)
    campaign.end()
