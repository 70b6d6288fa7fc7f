"""A save in which a call fails as on a sick disk: one error on all ranks, the older checkpoints whole.

`tests/ckpt/test_commit.py` has the calls of which a failure is survived; this one has more errors and cases.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
from budget import seeds
from ckpt_faults import Faults
from figures import Campaign
from situations import CASES, Case, Places, Problems, left, next_save, saving

from ckpt import CheckpointError, SaveReport

SHUFFLED = Random(1).sample([case for case in CASES if case.situation != "beside another writer"], 84)
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS)
SHORT = 0
"""Instead of an error's number: writes write less than they were asked to."""
TIMES = 2
"""Faults to try at each call."""
EACH = 150
"""Faults of each case to try, out of up to 800."""


def number_of_calls(case: Case, places: Places) -> int:
    work = saving(case, places.new(case))
    with Faults(0).active() as faults:
        results = work()
    assert not [result for result in results if isinstance(result, BaseException)], results
    return len(faults.names)


@contextmanager
def short_writes(rng: Random) -> Iterator[None]:
    """Let each write write a part, but no less than a byte."""
    real: Callable[..., int] = os.pwritev

    def some(fd: int, views: Any, offset: int) -> int:
        return real(fd, [views[0][: rng.randint(1, max(1, len(views[0])))]], offset)

    with mock.patch.object(os, "pwritev", some):
        yield


def sick(case: Case, k: int, seed: int, places: Places) -> tuple[str, Problems]:
    """Do a save on a sick disk; return what was sick, and what is wrong with how it ended."""
    rng = Random(seed)
    error, forever, part = rng.choice((*ERRORS, SHORT)), rng.random() < 0.5, rng.choice((0.0, 0.5, 0.99))
    run = places.new(case)
    work = saving(case, run)
    if error == SHORT:
        with Faults(0).active(), short_writes(rng):
            results = work()
        return "short writes", ended(run, case, results, may_fail=False) + next_save(run, case)
    with Faults(k, forever=forever, error=error, part=part).active() as faults:
        results = work()
    label = (
        f"{errno.errorcode[error]} at call {k}, {faults.names[k - 1]}{' and all later' if forever else ''}"
    )
    return label, ended(run, case, results, may_fail=True) + next_save(run, case)


def ended(run: Path, case: Case, results: list[Any], *, may_fail: bool) -> Problems:
    """Check that all ranks ended alike, and what is left."""
    errors = {str(result) for result in results if isinstance(result, CheckpointError)}
    if not errors and all(isinstance(result, SaveReport) for result in results):
        return left(run, case, returned=True)
    if len(errors) != 1 or not all(isinstance(result, CheckpointError) for result in results):
        return [("other", f"the ranks ended differently: {results}")]
    (told,) = errors
    problems: Problems = [] if may_fail else [("other", f"it failed: {told}")]
    place = run.parents[1 if case.situation == "fresh" else 0]  # a fresh run's parents are made too
    if "(rank " not in told and str(place) not in told:
        problems.append(("other", f"it names neither a rank nor a file: {told}"))
    return problems + left(run, case, exists="is committed" in told)


def test_a_call_that_fails(places: Places, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # what can't be removed is logged, thousands of times
    calls: dict[Case, int] = {}
    chosen = seeds(sample=16, everything=len(SHUFFLED) * EACH)
    if len(chosen) > len(SHUFFLED):
        calls = {case: number_of_calls(case, places) for case in SHUFFLED}
    planned = sum(min(EACH, TIMES * number) for number in calls.values()) or len(chosen)
    campaign = Campaign("a call that fails", planned)
    for seed in chosen:
        case = SHUFFLED[seed % len(SHUFFLED)]
        if case not in calls:
            calls[case] = number_of_calls(case, places)
        number = seed // len(SHUFFLED)
        if number >= TIMES * calls[case]:
            continue
        order = Random(0).sample(range(1, calls[case] + 1), calls[case])
        label, problems = sick(case, order[number % calls[case]], seed, places)
        campaign.point(seed, f"{case}, {label}", problems)
    campaign.end()
