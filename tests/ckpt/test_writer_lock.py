"""The lock of a run's folder: who holds it, whether that process lives, and who may take it."""

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ckpt_helpers import Arrays, cut, layout_of, run_ranks, save_arrays, shards_of
from ckpt_locks import ARRAYS, ELSEWHERE, owner, put_lock, touched

from ckpt import (
    CheckpointError,
    Retention,
    clean,
    committed_tags,
    files_for,
    make_plan,
    open_store,
    prune,
    read_latest,
    save,
)
from ckpt.stores import writer_lock
from ckpt.stores.local import LocalStore
from ckpt.stores.writer_lock import WRITER


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> str:
    return memory_url if request.param == "memory" else str(tmp_path / "run")


class Clock:
    """Time that passes while somebody sleeps, when `each` is called."""

    def __init__(self, each: Callable[[], None] = lambda: None) -> None:
        self.now, self.slept, self.each = 1000.0, 0.0, each

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert self.slept < 1000, "this would never end"
        self.now += seconds
        self.slept += seconds
        self.each()

    @contextmanager
    def ticking(self) -> Iterator["Clock"]:
        with mock.patch.object(writer_lock, "time", self):
            yield self


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    return str(caught.value)


def test_a_save_gives_it_back(run: str) -> None:
    for tag in ("t1", "t2"):
        save_arrays(run, tag, ARRAYS)
        assert WRITER not in open_store(run).names()
    with pytest.raises(CheckpointError, match="can't name a checkpoint"):
        save_arrays(run, "no tag", ARRAYS)
    assert WRITER not in open_store(run).names()


def test_a_save_that_fails_gives_it_back(run: str) -> None:
    for error in (OSError("no"), KeyboardInterrupt()):
        with mock.patch("ckpt.save.Writer", side_effect=error), pytest.raises((CheckpointError, type(error))):
            save_arrays(run, "t1", ARRAYS)
        assert WRITER not in open_store(run).names()
    save_arrays(run, "t1", ARRAYS)


@pytest.mark.parametrize("work", ["save", "prune", "clean"])
def test_a_living_process_is_named(tmp_path: Path, work: str) -> None:
    """Another one holds the lock; when it is killed, and not yet waited for, the next save begins at once."""
    run = str(tmp_path)
    for tag in ("t1", "t2"):
        save_arrays(run, tag, ARRAYS)
    told, tell = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that other tests' libraries left
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        open_store(run).hold("c" * 32, "saving t9")
        os.write(tell, b"!")
        time.sleep(60)
        os._exit(1)
    try:
        os.read(told, 1)
        calls = {
            "save": lambda: save_arrays(run, "t3", ARRAYS),
            "prune": lambda: prune(run, Retention(keep_last=1)),
            "clean": lambda: clean(run),
        }
        text = refused(calls[work])
        assert f"{run} is being written by process {pid} on {os.uname().nodename} (saving t9, since 2" in text
        assert "only one may write into a run at a time" in text
        assert committed_tags(run) == ["t1", "t2"]
    finally:
        os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but still in the table of processes
    with Clock().ticking() as clock:
        calls[work]()
    assert clock.slept == 0
    os.waitpid(pid, 0)
    assert WRITER not in open_store(run).names()


def test_one_elsewhere_that_gives_signs_of_life_is_named(run: str) -> None:
    save_arrays(run, "t1", ARRAYS)
    other = owner(**ELSEWHERE)
    put_lock(run, other.encoded())
    beats = [0]

    def beat() -> None:
        beats[0] += 1
        if run.startswith("memory"):
            open_store(run).lock_beat(other.encoded(beats[0]))  # type: ignore[attr-defined]
        else:
            touched(run)

    with Clock(beat).ticking() as clock:
        text = refused(lambda: save_arrays(run, "t2", ARRAYS))
    assert "is being written by process 123 on node7 (saving t7, since 2" in text
    assert 0 < clock.slept < 3
    assert committed_tags(run) == ["t1"]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
@pytest.mark.parametrize("what", ["deleting old checkpoints", "removing leftovers"])
def test_a_command_that_removes_is_waited_for(run: str, where: str, what: str) -> None:
    """A command beside a run that trains doesn't cost it a save; one without an end is refused in the end."""
    save_arrays(run, "t1", ARRAYS)
    here = {"pid": os.getppid(), "started": writer_lock._started(os.getppid())}
    other = owner(what=what, **(ELSEWHERE if where == "elsewhere" else here))
    put_lock(run, other.encoded())
    until = [40.0]

    def beat() -> None:
        store: Any = open_store(run)
        if clock.slept >= until[0]:
            store.lock_remove(store.lock_read())
        elif run.startswith("memory"):
            store.lock_beat(other.encoded(int(clock.slept * 10)))
        else:
            touched(run)

    with Clock(beat).ticking() as clock:
        save_arrays(run, "t2", ARRAYS)
    assert 40 <= clock.slept < 45
    assert committed_tags(run) == ["t1", "t2"]
    put_lock(run, other.encoded())
    until[0] = 10_000.0
    with Clock(beat).ticking() as clock:
        assert f"({what}, since 2" in refused(lambda: save_arrays(run, "t3", ARRAYS))
    assert 600 <= clock.slept < 610


@pytest.mark.parametrize(
    "content",
    [owner(**ELSEWHERE).encoded(), b"", b"[1]", b"\xff{"],
    ids=["a-lock", "nothing", "a-list", "bytes"],
)
def test_one_elsewhere_that_gives_none_is_taken_for_dead(run: str, content: bytes) -> None:
    save_arrays(run, "t1", ARRAYS)
    put_lock(run, content)
    with Clock().ticking() as clock:
        save_arrays(run, "t2", ARRAYS)
    dead = open_store(run).dead_seconds  # type: ignore[attr-defined]
    assert dead - 2 < clock.slept <= dead
    assert committed_tags(run) == ["t1", "t2"]


def test_one_elsewhere_whose_last_sign_is_old_is_dead_at_once(tmp_path: Path) -> None:
    """Its age is by the clock of the file system: neither machine's own is asked."""
    save_arrays(tmp_path, "t1", ARRAYS)
    for old in (owner(**ELSEWHERE), owner(pid=os.getppid(), started=writer_lock._started(os.getppid()))):
        put_lock(str(tmp_path), old.encoded())
        now = time.time()
        os.utime(tmp_path / WRITER, (now - 11, now - 11))
        with Clock().ticking() as clock:
            save_arrays(tmp_path, "t2", ARRAYS)
        assert clock.slept == 0


@pytest.mark.parametrize(
    "changes", [{"pid": 2**22 + 1}, {"started": "1"}, {"token": "d" * 32}], ids=["ended", "used-again", "own"]
)
def test_one_of_this_machine_that_ended_is_dead_at_once(run: str, changes: dict[str, Any]) -> None:
    """Its number may belong to another process by now, which began later; or this process forgot its lock."""
    save_arrays(run, "t1", ARRAYS)
    put_lock(run, owner(**changes).encoded())
    with Clock().ticking() as clock:
        save_arrays(run, "t2", ARRAYS)
    assert clock.slept == 0
    assert WRITER not in open_store(run).names()


def test_a_dead_one_s_that_cannot_be_removed_stops_nothing(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    put_lock(run, owner().encoded()) if run.startswith("memory") else save_arrays(run, "t0", ARRAYS)
    put_lock(run, owner().encoded())
    store = type(open_store(run))
    with mock.patch.object(store, "lock_remove", side_effect=PermissionError("not yours")):
        for tag in ("t1", "t2"):
            save_arrays(run, tag, ARRAYS)
    assert read_latest(run) == "t2"
    assert len([r for r in caplog.records if f"{WRITER} is left by a process that ended" in r.message]) == 1
    save_arrays(run, "t3", ARRAYS)
    assert WRITER not in open_store(run).names()


def test_it_beats_while_it_is_held(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = open_store(run)
    monkeypatch.setattr(type(store), "beat_seconds", 0.01)
    store.hold("e" * 32, "saving t1")
    first = store.lock_stamp()
    until = time.monotonic() + 20
    while store.lock_stamp() == first and time.monotonic() < until:
        time.sleep(0.01)
    assert store.lock_stamp() != first
    assert json.loads(store.read(WRITER))["token"] == "e" * 32
    store.release()
    assert not store.exists(WRITER)
    time.sleep(0.05)
    assert not store.exists(WRITER), "no sign of life comes after the end"


def test_one_that_was_taken_is_neither_beaten_nor_given_back(run: str) -> None:
    store: Any = open_store(run)
    store.hold("e" * 32, "saving t1")
    lock = store._lock
    store.lock_remove(store.read(WRITER))
    put_lock(run, owner(**ELSEWHERE).encoded())
    assert lock.is_lost()
    store.release()
    assert json.loads(store.read(WRITER))["host"] == "node7"


def test_where_files_have_no_second_name(tmp_path: Path) -> None:
    with mock.patch("os.link", side_effect=OSError(1, "Operation not permitted")):
        save_arrays(tmp_path, "t1", ARRAYS)
        put_lock(str(tmp_path), owner(pid=os.getppid(), started=writer_lock._started(os.getppid())).encoded())
        assert "is being written by process" in refused(lambda: save_arrays(tmp_path, "t2", ARRAYS))
    assert committed_tags(tmp_path) == ["t1"]


def test_a_lock_that_another_one_took_meanwhile_is_left(run: str) -> None:
    """Two see the same dead lock, and the slower one comes when the faster one has its own."""
    dead, new = owner(**ELSEWHERE).encoded(), owner(token="f" * 32).encoded()
    put_lock(run, new)
    store: Any = open_store(run)
    store.lock_remove(dead)
    assert store.read(WRITER) == new
    store.lock_remove(new)
    assert store.names() == []


def test_of_two_who_remove_a_lock_one_does(tmp_path: Path) -> None:
    """The first is stopped after it has looked; the second finds it at work, and leaves the lock to it."""
    store, dead = LocalStore(str(tmp_path), tmp_path), owner(**ELSEWHERE).encoded()
    put_lock(str(tmp_path), dead)
    unlink, removed = os.unlink, []

    def stopped(path: str) -> None:
        with mock.patch("os.unlink", removed.append):
            store.lock_remove(dead)
        unlink(path)

    with mock.patch("os.unlink", stopped):
        store.lock_remove(dead)
    assert (removed, store.names()) == ([], [])


def test_all_ranks_say_who_is_writing(run: str) -> None:
    """Only rank 0 asks for the lock; the others learn from it, and the next save of all begins."""
    arrays: Arrays = {("w", "fp32"): np.arange(12, dtype=np.float32).reshape(4, 3)}
    layout = layout_of(arrays, {("w", "fp32"): cut((4, 3), (2, 1))})
    plan = make_plan(layout, files=files_for(run))

    def work(comm: Any) -> object:
        return save(run, "t1", shards_of(arrays, layout[comm.rank]), plan=plan, comm=comm, document={})

    put_lock(run, owner(pid=os.getppid(), started=writer_lock._started(os.getppid())).encoded())
    with mock.patch.object(type(open_store(run)), "lock_create", autospec=True, return_value=False) as asked:
        results = run_ranks(2, work)
    assert asked.call_count == 1
    assert [type(result) for result in results] == [CheckpointError] * 2
    assert len({str(result) for result in results}) == 1
    assert f"is being written by process {os.getppid()} on " in str(results[0])
    store: Any = open_store(run)
    store.lock_remove(store.read(WRITER))
    assert not [result for result in run_ranks(2, work) if isinstance(result, Exception)]
