"""Signs of life that fail or come too late, and places and systems that don't tell all of a lock."""

import json
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ckpt_helpers import save_arrays
from ckpt_locks import ARRAYS, ELSEWHERE, owner, put_lock

from ckpt import open_store
from ckpt.stores import writer_lock
from ckpt.stores.local import LocalStore
from ckpt.stores.writer_lock import WRITER, this_process


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> str:
    return memory_url if request.param == "memory" else str(tmp_path / "run")


def beats_of(store: Any) -> threading.Thread:
    """Return the thread that gives the signs of life of the store's lock."""
    (thread,) = [t for t in threading.enumerate() if getattr(t, "_target", None) == store._lock._beat]
    return thread


def test_no_sign_of_life_is_given_for_another_one(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = open_store(run)
    monkeypatch.setattr(type(store), "beat_seconds", 0.01)
    store.hold("e" * 32, "saving t1")
    beats, other = beats_of(store), owner(**ELSEWHERE).encoded()
    with store._lock._mutex:
        store.lock_remove(store.read(WRITER))
        put_lock(run, other)
        stamp = store.lock_stamp()
    beats.join(20)
    assert not beats.is_alive(), "it has found out"
    assert (store.lock_stamp(), store.read(WRITER)) == (stamp, other)
    store.release()
    assert store.read(WRITER) == other


def test_a_sign_of_life_that_fails_is_followed_by_another(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = open_store(run)
    real, tries = type(store).lock_beat, list[int]()
    enough = threading.Event()

    def beat(store: Any, content: bytes) -> None:
        tries.append(json.loads(content)["beat"])
        if len(tries) <= 2:
            raise OSError("no answer")
        real(store, content)
        enough.set()

    monkeypatch.setattr(type(store), "beat_seconds", 0.01)
    monkeypatch.setattr(type(store), "lock_beat", beat)
    store.hold("e" * 32, "saving t1")
    first = store.lock_stamp()
    assert enough.wait(20)
    assert tries[:3] == [1, 2, 3]
    assert store.lock_stamp() != first
    store.release()
    assert not store.exists(WRITER)


def test_the_age_of_a_lock_that_the_place_does_not_tell_is_none(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_arrays(run, "t1", ARRAYS)
    store: Any = open_store(run)
    assert store.lock_age("b" * 32) == 0.0, "there is no lock"
    put_lock(run, owner(**ELSEWHERE).encoded())
    if run.startswith("memory"):
        monkeypatch.setattr(store._fs, "modified", mock.Mock(side_effect=ConnectionError("down")))
    else:
        unlink = os.unlink  # the holder sweeps the probe away
        monkeypatch.setattr(os, "unlink", lambda path: [unlink(path), unlink(path)])
    assert store.lock_age("b" * 32) == 0.0
    assert store.names() == [WRITER, "latest", "t1"]


@pytest.mark.parametrize("what", ["only-read", "no-locks"])
def test_a_lock_is_removed_where_it_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Where it is another user's file in a folder of ours, or the file system knows no such locks."""
    dead = owner(**ELSEWHERE).encoded()
    put_lock(str(tmp_path), dead)
    real, flags_seen = os.open, list[int]()

    def opened(path: Any, flags: int, *more: Any) -> int:
        flags_seen.append(flags & os.O_ACCMODE)
        if flags & os.O_ACCMODE == os.O_RDWR and what == "only-read":
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags, *more)

    def no_locks(*args: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(os, "open", opened)
    if what == "no-locks":
        monkeypatch.setattr("fcntl.flock", no_locks)
    store = LocalStore(str(tmp_path), tmp_path)
    store.lock_remove(b"another's")
    assert store.names() == [WRITER]
    store.lock_remove(dead)
    assert store.names() == []
    assert flags_seen == [os.O_RDWR] * 2 if what == "no-locks" else [os.O_RDWR, os.O_RDONLY] * 2


def test_without_linux_s_proc_little_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a machine but its name, nor of a process but whether there is one of its number."""

    def hidden(path: Path, *args: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    here = this_process("a" * 32, "saving t7")
    monkeypatch.setattr(Path, "read_text", hidden)
    monkeypatch.setattr(Path, "read_bytes", hidden)
    assert writer_lock.machine.__wrapped__() == os.uname().nodename
    started = writer_lock._started
    assert started(os.getpid()) == writer_lock.UNKNOWN
    assert started(2**22 + 1) is None
    assert started(2**80) == writer_lock.UNKNOWN, "a number that the system can't have is no proof"
    monkeypatch.setattr(os, "kill", mock.Mock(side_effect=PermissionError))
    assert started(1) == writer_lock.UNKNOWN, "another user's"
    assert not here._replace(pid=1).has_ended
    assert not here._replace(pid=1, started=writer_lock.UNKNOWN).has_ended
