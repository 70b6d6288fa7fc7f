"""Saves into a sick object store, and what each may leave in its bucket."""

import contextlib
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from ckpt_helpers import save_arrays
from object_store import CLOSED, HELD, OTHERS, REFUSALS, Fault, ObjectStore, copied
from s3fs import S3FileSystem
from situations import BEFORE, PLANNING, Case, Problems, arrays_of, held, left, saving
from turns import ended, forked

from ckpt import CheckpointError, order, read_latest

CASES = [
    Case(situation, ranks, "writer", False)
    for ranks in (1, 2, 4)
    for situation in ("next", "retention", "fresh", "after a killed one")
]
KINDS = (*REFUSALS, *CLOSED, *HELD, *OTHERS[:2])
RUN = "run"
SECONDS = 300
"""Longest life of a process that is killed: a server that shares its cores with others is slow."""
LAST = 12
"""Requests of a save that isn't done, as it is killed."""


class Buckets:
    """The states of a bucket before a save, each made once, and copies of what is left in it."""

    def __init__(self, store: ObjectStore, folder: Path) -> None:
        self.store, self.folder = store, folder
        self.url = f"{store.url}/{RUN}"
        self._made: dict[str, dict[str, bytes]] = {}
        self._requests: dict[Case, int] = {}

    def make(self, situation: str) -> None:
        """Put the bucket into the state before a save, as for a new process."""
        if situation not in self._made:
            self._made[situation] = self._new(situation)
        self.store.put_back(self._made[situation])
        order._known.clear()

    def _new(self, situation: str) -> dict[str, bytes]:
        place = self.folder / "made"
        shutil.rmtree(place, ignore_errors=True)
        for tag in BEFORE[situation]:
            planning = {**PLANNING, "files": "writer"}
            save_arrays(place / RUN, tag, arrays_of(tag, False), planning=planning, document={})
        objects = {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}
        if situation != "after a killed one":
            return objects
        case, victim = Case("next", 1, "writer", False), list[int]()
        k = self.requests(case) - LAST
        self.store.put_back(objects)
        with self.store.sick(Fault("killed before", k, victim=victim)):
            work = saving(case, self.url, new="other", tag="t3")
            victim.append(forked(lambda: len(work()), SECONDS))
            assert ended(victim[0]) == -signal.SIGKILL
        objects = self.store.objects()
        assert {f"{RUN}/.saving.t3", f"{RUN}/.writer"} < objects.keys()
        return objects

    def seen(self) -> Path:
        """Copy the bucket; return the run's folder. What is wrong with a copy is wrong with the bucket."""
        place = self.folder / "seen"
        shutil.rmtree(place, ignore_errors=True)
        return copied(self.store.objects(), place) / RUN

    def requests(self, case: Case) -> int:
        """Return the number of requests of a save."""
        if case not in self._requests:
            self.make(case.situation)
            with self.store.sick(None) as requests:
                results = saving(case, self.url)()
            assert not [result for result in results if isinstance(result, BaseException)], results
            self._requests[case] = len(requests)
        return self._requests[case]


def fault_of(rng: Random, k: int, kinds: tuple[str, ...] = KINDS) -> Fault:
    """Return a fault at a request, or from then on."""
    kind = rng.choice(kinds)
    if kind in OTHERS:  # few requests are of the kinds that these change
        return Fault(kind, 1 if rng.random() < 0.7 else k, forever=True, lag=rng.choice((1, 2, 5, 100)))
    return Fault(kind, k, forever=rng.random() < (0.2 if kind in HELD else 0.5))


@contextlib.contextmanager
def client(store: ObjectStore, fault: Fault, tries: int) -> Iterator[None]:
    """Let requests be tried so often, and be waited for no longer than the fault needs."""
    waits = store.patience() if fault.kind in HELD else contextlib.nullcontext()
    with waits, mock.patch.object(S3FileSystem, "retries", tries):
        yield


def one_error(results: list[Any], url: str) -> tuple[str | None, Problems]:
    """Return the error with which all ranks ended, None if all ended well; and what is wrong with it."""
    errors = {str(result) for result in results if isinstance(result, CheckpointError)}
    if not errors and not any(isinstance(result, BaseException) for result in results):
        return None, []
    if len(errors) != 1 or not all(isinstance(result, CheckpointError) for result in results):
        return None, [("other", f"the ranks ended differently: {results}")]
    (told,) = errors
    problems: Problems = []
    if "(rank " not in told and url not in told:
        problems.append(("other", f"it names neither a rank nor an object: {told}"))
    if told.rstrip(" ").endswith(":") or ": (" in told or "\n" in told:
        problems.append(("other", f"it says nothing: {told}"))
    return told, problems


def sick_save(case: Case, fault: Fault, tries: int, buckets: Buckets) -> Problems:
    """Do a save into a sick store; return what is wrong with how it ended."""
    buckets.make(case.situation)
    with client(buckets.store, fault, tries), buckets.store.sick(fault):
        results = saving(case, buckets.url)()
    told, problems = one_error(results, buckets.url)
    exists = None if told is None or "may be there" in told else "is committed" in told
    found = left(buckets.seen(), case, returned=told is None and not problems, exists=exists)
    if fault.kind == "done too late" and told is not None:
        # A manifest that is put after its save was given up: readers find what is missing.
        found = [p for p in found if p[0] != "torn" or not p[1].startswith(f"{case.tag} ")]
    return problems + found + next_save(case, buckets)


def next_save(case: Case, buckets: Buckets) -> Problems:
    """Save by one rank, under the same tag if it isn't committed: it must work, and take away leftovers."""
    order._known.clear()
    tag = "t4" if f"{RUN}/{case.tag}/manifest.json" in buckets.store.objects() else case.tag
    try:
        save_arrays(buckets.url, tag, arrays_of("later", case.many), document={}, planning=PLANNING)
    except CheckpointError as error:
        return [("other", f"the next save fails: {error}")]
    seen = buckets.seen()
    problems: Problems = []
    if read_latest(seen) != tag:
        problems.append(("other", "the next save's latest"))
    holds = {case.tag: "new", tag: "later"}
    for path in sorted(seen.iterdir()):
        if (path / "manifest.json").exists():
            problems += held(seen, path.name, (holds.get(path.name, path.name),), case.many)[1]
        elif path.name != "latest":
            problems.append(("other", f"{path.name} is left"))
    return problems


def attempt(work: Callable[[], Problems], url: str) -> Problems:
    """Do work that ends well or with an error of this package that names the place."""
    try:
        return work()
    except CheckpointError as error:
        return one_error([error], url)[1]
    except BaseException as error:
        return [("other", f"{type(error).__name__}: {error}")]
