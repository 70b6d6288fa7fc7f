"""Saves into an object store that fails, loads from it, and saves that are killed at a request.

`tests/ckpt/test_remote.py` has the same calls of a place in memory.
"""

import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from budget import seeds
from ckpt_helpers import cut, layout_of, same, targets_of
from figures import Campaign
from object_store import KILLS, Fault, ObjectStore
from sick_buckets import CASES, SECONDS, Buckets, attempt, client, fault_of, next_save, one_error, sick_save
from situations import Case, Problems, arrays_of, left, saving
from turns import ended, forked, in_turns

from ckpt import (
    Retention,
    clean,
    committed_tags,
    export_safetensors,
    load,
    open_checkpoint,
    open_together,
    prune,
    read_latest,
    verify,
)
from ckpt.stores.remote import RemoteStore

SHUFFLED = Random(2).sample(CASES, len(CASES))


@pytest.fixture(scope="module")
def all_buckets(object_store: ObjectStore, memory_path: Path) -> Iterator[Buckets]:
    folder = memory_path / "buckets"
    yield Buckets(object_store, folder)
    object_store.put_back({})
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def buckets(
    all_buckets: Buckets, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Buckets:
    """An object store whose requests come in the same order each time."""
    caplog.set_level(logging.CRITICAL)  # what can't be removed is logged
    monkeypatch.setattr(RemoteStore, "threads", 1)
    monkeypatch.setattr(RemoteStore, "beat_seconds", 3600.0)
    monkeypatch.setattr("ckpt.order.cores", lambda: 1)
    return all_buckets


def test_a_save_into_a_sick_store(buckets: Buckets) -> None:
    chosen = seeds(sample=3, everything=300)
    campaign = Campaign("a request of a save that fails", len(chosen))
    for seed in chosen:
        rng, case = Random(seed), SHUFFLED[seed % len(SHUFFLED)]
        fault, tries = fault_of(rng, rng.randint(1, buckets.requests(case))), rng.choice((1, 2))
        problems = sick_save(case, fault, tries, buckets)
        campaign.point(seed, f"{case}, {fault}, {tries} tries", problems)
    campaign.end()


# --- readers -------------------------------------------------------------------------------------------


def loaded(buckets: Buckets) -> Problems:
    """Load into three ranks; the numbers must be right."""
    arrays = arrays_of("t1", False)
    boxes = {key: cut(a.shape, (3, *[1] * (a.ndim - 1))) for key, a in arrays.items()}
    layout = layout_of(arrays, boxes)
    targets = {rank: targets_of(specs) for rank, specs in layout.items()}
    results = in_turns(
        3, lambda comm: load(open_together(comm, buckets.url), targets[comm.rank], comm=comm, threads=1)
    )
    told, problems = one_error(results, buckets.url)
    if told is not None or problems:
        return problems
    wrong = [
        target.spec.key
        for held in targets.values()
        for target in held
        if not same(target.data, arrays[target.spec.key][target.spec.box.slices])
    ]
    return [("wrong", f"{wrong} is loaded")] * bool(wrong)


def read_whole(buckets: Buckets) -> Problems:
    checkpoint = open_checkpoint(buckets.url, "t0")
    right = all(same(checkpoint.read(*key), a) for key, a in arrays_of("t0", False).items())
    return [("wrong", "it is read")] * (not right)


def verified(buckets: Buckets) -> Problems:
    """Verify; what can't be read is told, but nothing is called damaged or missing."""
    problems = verify(open_checkpoint(buckets.url))
    return [("other", str(p)) for p in problems if "can't be read" not in str(p) or buckets.url not in str(p)]


def listed(buckets: Buckets) -> Problems:
    tags, latest = committed_tags(buckets.url), read_latest(buckets.url)
    return [("lost", f"{tags} are listed, {latest} is the latest")] * ((tags, latest) != (["t0", "t1"], "t1"))


def exported(buckets: Buckets) -> Problems:
    paths = buckets.folder / "exported", buckets.folder / "expected"
    for path in paths:
        path.unlink(missing_ok=True)
    export_safetensors(open_checkpoint(buckets.url), paths[0])
    export_safetensors(open_checkpoint(buckets.seen()), paths[1])
    return [("wrong", "it is exported")] * (paths[0].read_bytes() != paths[1].read_bytes())


def pruned(buckets: Buckets) -> Problems:
    prune(buckets.url, Retention(keep_last=1))
    return []


def cleaned(buckets: Buckets) -> Problems:
    clean(buckets.url)
    return []


WORKS: list[tuple[Callable[[Buckets], Problems], str]] = [
    (loaded, "retention"),
    (read_whole, "retention"),
    (verified, "retention"),
    (listed, "retention"),
    (exported, "retention"),
    (pruned, "retention"),
    (cleaned, "after a killed one"),
]


def test_work_on_a_sick_store(buckets: Buckets) -> None:
    chosen = seeds(sample=3, everything=300)
    campaign = Campaign("a request of a load, a listing or a deletion that fails", len(chosen))
    requests: dict[str, int] = {}
    for seed in chosen:
        rng, (work, situation) = Random(seed), WORKS[seed % len(WORKS)]
        if work.__name__ not in requests:
            buckets.make(situation)
            with buckets.store.sick(None) as made:
                assert work(buckets) == []
            requests[work.__name__] = len(made)
        fault, tries = fault_of(rng, rng.randint(1, requests[work.__name__])), rng.choice((1, 2))
        buckets.make(situation)
        before = buckets.store.objects()
        with client(buckets.store, fault, tries), buckets.store.sick(fault):
            problems = attempt(lambda work=work: work(buckets), buckets.url)  # type: ignore[misc]
        if work in (pruned, cleaned):
            problems += at_rest(buckets, may_go="t0" if work is pruned else "")
        elif buckets.store.objects() != before:
            problems.append(("other", "a reader has changed the bucket"))
        campaign.point(seed, f"{work.__name__}, {fault}, {tries} tries", problems)
    campaign.end()


def at_rest(buckets: Buckets, may_go: str) -> Problems:
    """Check that the two checkpoints are whole, and that a save removes what is left."""
    seen = buckets.seen()
    case = Case("after a killed one", 1, "writer", False)
    problems = left(seen, case)
    return [p for p in problems if p != ("lost", may_go)] + next_save(case, buckets)


# --- kills ---------------------------------------------------------------------------------------------


def killed_save(case: Case, fault: Fault, buckets: Buckets) -> Problems:
    """Do a save in a process that is killed; return what is wrong with what it left."""
    buckets.make(case.situation)

    def child() -> int:
        return 5 if any(isinstance(result, BaseException) for result in saving(case, buckets.url)()) else 0

    with buckets.store.sick(fault):
        assert fault.victim is not None
        pid = forked(child, SECONDS)
        fault.victim.append(pid)
        end = ended(pid)
    if end != -signal.SIGKILL:
        return [("other", f"it wasn't killed, but ended with {end}")]
    return left(buckets.seen(), case) + next_save(case, buckets)


def test_a_kill_at_a_request(buckets: Buckets) -> None:
    chosen = seeds(sample=2, everything=200)
    campaign = Campaign("kill at a request of a save", len(chosen))
    for seed in chosen:
        rng, case = Random(seed), SHUFFLED[seed % len(SHUFFLED)]
        fault = Fault(rng.choice(KILLS), rng.randint(1, buckets.requests(case)), victim=[])
        campaign.point(seed, f"{case}, {fault.kind} request {fault.k}", killed_save(case, fault, buckets))
    campaign.end()


# --- a slow store --------------------------------------------------------------------------------------


def test_a_slow_store(object_store: ObjectStore, buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request takes 20 ms more, on as many threads as there are."""
    monkeypatch.setattr(RemoteStore, "threads", 16)
    buckets.make("fresh")
    with object_store.sick(Fault("slow", forever=True, seconds=0.02)):
        (first, second) = saving(Case("fresh", 2, "writer", False), buckets.url, new="t1", tag="t1")()
        assert not isinstance(first, BaseException), first
        assert not isinstance(second, BaseException), second
        assert loaded(buckets) == []
        assert verify(open_checkpoint(buckets.url)) == []
