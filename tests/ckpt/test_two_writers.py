"""Two writers of one run: the second is refused, and where it isn't, no committed checkpoint is ever torn."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
from ckpt_faults import Faults
from ckpt_helpers import Arrays, holding, save_arrays
from marks import matrix, slow

from ckpt import (
    CheckpointError,
    Retention,
    clean,
    committed_tags,
    open_checkpoint,
    open_store,
    prune,
    read_latest,
    verify,
)
from ckpt.stores.local import LocalStore
from ckpt.stores.remote import RemoteStore
from ckpt.stores.writer_lock import Owner

FIXED = np.arange(100, dtype=np.float32)


def arrays_of(seed: int) -> Arrays:
    return {("w", "fp32"): np.full((9, 5), seed, np.float32), ("fixed", "fp32"): FIXED}


OLD, FIRST, OTHER = arrays_of(0), arrays_of(1), arrays_of(2)
CONTENT = {"old": OLD, "first": FIRST, "other": OTHER}

OTHERS: dict[str, Callable[[Any], object]] = {
    "same-tag": lambda run: save_arrays(run, "t2", OTHER),
    "another-tag": lambda run: save_arrays(run, "t3", OTHER),
    "clean": clean,
    "prune": lambda run: prune(run, Retention(keep_last=1)),
}


class Meeting:
    """One moment of a first writer's save, at which another one acts."""

    def __init__(self, run: Any, other: Callable[[Any], object], *, takes_over: bool) -> None:
        self.run, self.other, self.takes_over = run, other, takes_over
        self.met = False
        self.error = ""

    def __call__(self) -> None:
        """Do it, as a process would that takes the first for dead, or as one that doesn't."""
        self.met = True
        try:
            if self.takes_over:
                with mock.patch.object(Owner, "has_ended", True):
                    self.other(self.run)
            else:
                self.other(self.run)
        except CheckpointError as error:
            self.error = str(error)

    def check(self, first: str, *, replaces: bool) -> None:
        """Check what is left; `first` is the error of the first save, or empty."""
        tags = committed_tags(self.run)
        found = {tag: holding(CONTENT, self.run, tag) for tag in tags}
        assert not [problem for tag in tags for problem in verify(open_checkpoint(self.run, tag), threads=1)]
        if tags:
            assert read_latest(self.run) in tags
        saves = self.other in (OTHERS["same-tag"], OTHERS["another-tag"])
        if not first and not (self.takes_over and self.other is OTHERS["prune"]):
            assert found["t2"] in ("first", "other"), "a save that returned is there"
        if not self.error and self.takes_over and saves:
            tag = "t2" if self.other is OTHERS["same-tag"] else "t3"
            assert found[tag] in ("first", "other")
        if self.error and first:  # an object that was put while it was to be removed can stop both
            assert self.takes_over, f"{first}; and the other: {self.error}"
            assert "t2" not in found
        elif self.error:
            assert found["t2"] == "first"
        assert found.get("t1", "old") == "old"
        assert "t1" in found or self.other is OTHERS["prune"]


def save_first(run: Any) -> str:
    try:
        save_arrays(run, "t2", FIRST, durable=True)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("takes_over", [False, True], ids=["refused", "takes-over"])
@pytest.mark.parametrize("replaces", [slow(False), matrix(True)], ids=["new-tag", "replaces"])
@pytest.mark.parametrize("other", ["another-tag", slow("same-tag"), matrix("clean"), matrix("prune")])
def test_another_writer_at_any_call(memory_path: Path, other: str, replaces: bool, takes_over: bool) -> None:
    """Stop the first before each call that changes the disk; the other acts; the first goes on."""
    k, refused, failed = 0, set(), set()
    while True:
        k += 1
        run = memory_path / f"two-{other}-{replaces}-{takes_over}-{k}"
        save_arrays(run, "t1", OLD)
        if replaces:
            save_arrays(run, "t2", OLD)
            save_arrays(run, "t1", OLD)
        meeting = Meeting(run, OTHERS[other], takes_over=takes_over)
        with Faults(k, at_fault=meeting, goes_on=True).active():
            first = save_first(run)
        if not meeting.met:
            break
        meeting.check(first, replaces=replaces)
        refused.add(meeting.error)
        failed.add(first)
        save_arrays(run, "t9", OTHER)
        left = {path.name for path in run.iterdir()} - {"t1", "t2", "t3", "t9", "latest"}
        assert left == set(), "nothing of either is left"
    assert k > 20
    assert takes_over or any("is being written by this process (saving t2" in text for text in refused)
    if takes_over and other != "prune":
        assert any("another save has begun since this one of" in text for text in failed)


class AtRequest:
    """Calls `act` before the k-th request that changes an object store."""

    def __init__(self, k: int, act: Callable[[], None]) -> None:
        self.k, self.act, self.calls = k, act, list[str]()
        self._counting = threading.Lock()

    def patched(self) -> Any:
        real, whole = RemoteStore._call, self

        def call(store: RemoteStore, method: Callable[..., Any], path: str, *args: Any, **more: Any) -> Any:
            if method.__name__ in ("pipe_file", "stream", "rm", "rm_file"):
                with whole._counting:
                    whole.calls.append(path)
                    nth = len(whole.calls)
                if nth == whole.k:
                    whole.act()
            return real(store, method, path, *args, **more)

        return mock.patch.object(RemoteStore, "_call", call)


@pytest.mark.parametrize("takes_over", [False, True], ids=["refused", "takes-over"])
@pytest.mark.parametrize("other", [slow("another-tag"), slow("clean"), "same-tag"])
def test_another_writer_at_any_request(memory_url: str, other: str, takes_over: bool) -> None:
    """The same in an object store. Of the same tag, what is torn is so visibly, and the first fails."""
    k, failed = 0, set()
    while True:
        k += 1
        run = f"{memory_url}/{other}-{takes_over}-{k}"
        save_arrays(run, "t1", OLD)
        meeting = Meeting(run, OTHERS[other], takes_over=takes_over)
        with AtRequest(k, meeting).patched():
            first = save_first(run)
        if not meeting.met:
            break
        failed.add(first)
        if other == "same-tag" and takes_over and not meeting.error:
            assert holding(CONTENT, run, "t1") == "old"
            if verify(open_checkpoint(run, "t2"), threads=1):
                assert "another save has begun since this one of" in first
            else:
                assert holding(CONTENT, run, "t2") in ("first", "other")
        else:
            meeting.check(first, replaces=False)
        save_arrays(run, "t9", OTHER)
        left = {path.split("/")[3] for path in fsspec.filesystem("memory").find(run)}
        assert left <= {"t1", "t2", "t3", "t9", "latest"}
        assert "t2" not in left or "t2" in committed_tags(run), "nothing of a failed save is left"
        fsspec.filesystem("memory").rm(run, recursive=True)
    assert k > 10
    assert any("another save has begun since" in text for text in failed) == takes_over


def test_a_manifest_that_is_put_after_another_save_has_begun_is_taken_back(memory_url: str) -> None:
    save_arrays(memory_url, "t1", OLD)
    begun = RemoteStore.begun
    looked: list[bool] = []

    def look(store: RemoteStore, tag: str, token: str) -> bool:
        looked.append(begun(store, tag, token))
        if looked == [True, True]:  # by the ranks at the beginning, and directly before the manifest
            open_store(memory_url).begin(tag, "another")
        return looked[-1]

    with mock.patch.object(RemoteStore, "begun", look):
        assert "another save has begun since this one of" in save_first(memory_url)
    assert committed_tags(memory_url) == ["t1"]
    assert not open_store(memory_url).exists("t2/manifest.json")


def test_a_failed_save_abandons_only_what_is_its_own(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for tag, token in ("t1", "a" * 32), ("t1", "b" * 32):
        store.begin(tag, token)
        (tmp_path / store.staging(tag, token) / "data").write_text(token)
        store.abandon(tag, "c" * 32)
        assert store.begun(tag, token)
    assert not store.begun("t1", "a" * 32), "the second began anew"
    store.abandon("t1", "b" * 32)
    assert store.names() == []


def test_ranks_of_a_dead_job_cannot_write_into_the_next_one_s_save(tmp_path: Path) -> None:
    """They have the name of their own save's folder, which is gone."""
    store = open_store(tmp_path)
    store.begin("t1", "a" * 32)
    store.begin("t1", "b" * 32)
    late = f"{store.staging('t1', 'a' * 32)}/c"
    with pytest.raises(FileNotFoundError):
        store.write(late, [b"late"], durable=False)
    with pytest.raises(FileNotFoundError):
        store.write_into(late, [(0, [b"late"])], durable=False)
    assert [*(tmp_path / store.staging("t1", "b" * 32)).iterdir()] == []


def test_saves_of_one_process_at_the_same_time_take_turns_or_fail(tmp_path: Path) -> None:
    results: list[str] = []

    def work(tag: str) -> None:
        for _ in range(5):
            try:
                save_arrays(tmp_path, tag, FIRST)
            except CheckpointError as error:
                results.append(str(error))
            else:
                results.append("")

    threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "" in results
    assert [text for text in results if text and "is being written by this process" not in text] == []
    for tag in committed_tags(tmp_path):
        assert verify(open_checkpoint(tmp_path, tag), threads=1) == []
    assert {path.name[0] for path in tmp_path.iterdir()} <= {"t", "l"}


def test_a_save_is_renamed_while_another_one_removes_it(tmp_path: Path) -> None:
    """The first is about to rename its folder when the other begins to remove it, and is stopped half-way."""
    save_arrays(tmp_path, "t1", OLD)
    half_way, go_on = threading.Event(), threading.Event()
    unlink, put = os.unlink, LocalStore._put_in_place
    others: list[threading.Thread] = []

    def slow(path: Any, **more: Any) -> None:
        unlink(path, **more)
        if threading.current_thread() in others and "dir_fd" in more and not half_way.is_set():
            half_way.set()
            assert go_on.wait(30)

    def other() -> None:
        with mock.patch.object(Owner, "has_ended", True):
            clean(tmp_path)

    def put_in_place(store: LocalStore, *args: Any) -> None:
        others.append(threading.Thread(target=other))
        others[0].start()
        assert half_way.wait(30)
        put(store, *args)

    with mock.patch("os.unlink", slow), mock.patch.object(LocalStore, "_put_in_place", put_in_place):
        assert "another save has begun since this one of" in save_first(tmp_path)
        go_on.set()
        others[0].join()
    assert (committed_tags(tmp_path), read_latest(tmp_path)) == (["t1"], "t1")
    save_arrays(tmp_path, "t2", FIRST)
    assert {path.name for path in tmp_path.iterdir()} == {"t1", "t2", "latest"}


def test_a_manifest_is_never_put_over_another_save_s(memory_url: str) -> None:
    """The store has no conditional put, so the marker is looked at directly before the manifest."""
    save_arrays(memory_url, "t1", OLD)
    theirs: list[bytes] = []
    write = RemoteStore.write

    def written(store: RemoteStore, path: str, *args: Any, **more: Any) -> None:
        write(store, path, *args, **more)
        if path == "t2/arrays.0.json" and not theirs:  # the last one before the manifest
            theirs.append(b"")
            with mock.patch.object(Owner, "has_ended", True):
                save_arrays(memory_url, "t2", OTHER)
            theirs[0] = store.read("t2/manifest.json")

    def plain(signature: Any) -> Any:
        return mock.Mock(parameters={})

    with (
        mock.patch("ckpt.stores.remote.inspect.signature", plain),
        mock.patch.object(RemoteStore, "write", written),
    ):
        assert "another save has begun since this one of" in save_first(memory_url)
    assert open_store(memory_url).read("t2/manifest.json") == theirs[0]
    assert holding(CONTENT, memory_url, "t2") == "other"


@pytest.mark.parametrize("other", ["another-tag", "clean"])
def test_a_removal_that_fails_half_way_lets_nobody_commit_the_rest(memory_url: str, other: str) -> None:
    """The first is taken for dead while it writes, and what takes it for dead breaks off."""
    save_arrays(memory_url, "t1", OLD)
    real, broken = RemoteStore._call, [0]

    def call(store: RemoteStore, method: Callable[..., Any], path: str, *args: Any, **more: Any) -> Any:
        if method.__name__ == "rm" and not broken[0]:
            broken[0] = 1
            for name in store._fs.find(store.where(path))[:1]:
                store._fs.rm_file(name)
            raise OSError("the connection is gone")
        return real(store, method, path, *args, **more)

    def act() -> None:
        with (
            mock.patch.object(Owner, "has_ended", True),
            mock.patch.object(RemoteStore, "_call", call),
            contextlib.suppress(CheckpointError),
        ):
            OTHERS[other](memory_url)

    put = RemoteStore.commit

    def commit(*args: Any, **more: Any) -> None:
        act()
        put(*args, **more)

    with mock.patch.object(RemoteStore, "commit", commit):
        first = save_first(memory_url)
    assert broken == [1]
    assert "another save has begun since this one of" in first
    assert "t2" not in committed_tags(memory_url)
