"""Runs in a store without folders and renames, through fsspec: whole objects, the manifest last."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import fsspec
import numpy as np
import pytest
from ckpt_helpers import Arrays, cut, holding, layout_of, run_ranks, same, save_arrays, shards_of, targets_of

from ckpt import (
    CheckpointError,
    Retention,
    clean,
    committed_tags,
    load,
    make_plan,
    open_checkpoint,
    open_store,
    prune,
    read_latest,
    save,
)
from ckpt.format import file_name
from ckpt.stores.remote import RemoteStore

W, B, S = ("w", "fp32"), ("w", "exp_avg"), ("step", "value")
CHANGES = ("pipe_file", "stream", "rm", "rm_file")


def arrays_of(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        W: rng.standard_normal((256, 512), np.float32),
        B: rng.standard_normal(5, np.float32),
        S: np.array(seed),
    }


OLD, NEW = arrays_of(1), arrays_of(2)
holds = partial(holding, {"old": OLD, "new": NEW})


@pytest.fixture
def run(memory_url: str) -> str:
    return f"{memory_url}/runs/mine"


def saving(run: str, tag: str, arrays: Arrays = NEW) -> Callable[[], list[object]]:
    """Return a save on two ranks that hold halves; it returns each rank's result or exception."""
    layout = layout_of(arrays, {W: cut((256, 512), (2, 1)), B: cut((5,), (2,)), S: cut((), ()) * 2})
    shards = {rank: shards_of(arrays, specs) for rank, specs in layout.items()}
    plan = make_plan(layout, files="writer")
    return lambda: run_ranks(
        2, lambda comm: save(run, tag, shards[comm.rank], plan=plan, comm=comm, document={"step": 1})
    )


class Dead(BaseException):
    """The end of the process."""


@contextmanager
def failing(k: int, *, forever: bool, error: type[BaseException] = PermissionError) -> Iterator[list[str]]:
    """The k-th call that changes the store fails, or all from then on; yields the names of the calls."""
    calls: list[str] = []
    lock, real = threading.Lock(), RemoteStore._call

    def call(
        self: RemoteStore, method: Callable[..., object], path: str, *args: object, **kwargs: object
    ) -> object:
        if method.__name__ in CHANGES:
            with lock:
                calls.append(method.__name__)
                due = len(calls) == k or (forever and len(calls) > k)
            if due:
                raise error(f"injected into {method.__name__} of {path}")
        return real(self, method, path, *args, **kwargs)

    with mock.patch.object(RemoteStore, "_call", call):
        yield calls


def test_saved_by_two_and_read_by_three(run: str) -> None:
    assert all(not isinstance(result, Exception) for result in saving(run, "t1")())
    assert (committed_tags(run), read_latest(run)) == (["t1"], "t1")
    assert holds(run, "t1") == "new"
    names = set(open_store(run).names())
    assert names == {"latest", "t1"}, "no marker is left"
    layout = layout_of(NEW, {W: cut((256, 512), (1, 3)), B: cut((5,), (3,)), S: cut((), ()) * 3})
    targets = {rank: targets_of(specs) for rank, specs in layout.items()}
    for result in run_ranks(3, lambda comm: load(open_checkpoint(run), targets[comm.rank], comm=comm)):
        assert not isinstance(result, BaseException), result
    for rank, filled in targets.items():
        for target, expected in zip(filled, shards_of(NEW, layout[rank]), strict=True):
            assert same(target.data, expected.data)


def test_each_object_is_put_once_and_whole(run: str) -> None:
    put: list[tuple[str, int]] = []
    real = fsspec.filesystem("memory").pipe_file

    def pipe_file(path: str, data: bytes) -> None:
        put.append((path.rpartition("/runs/mine/")[2], len(data)))
        real(path, data)

    with mock.patch.object(
        fsspec.implementations.memory.MemoryFileSystem, "pipe_file", side_effect=pipe_file
    ) as m:
        m.__name__ = "pipe_file"
        saving(run, "t1")()
    paths = [path for path, _ in put]
    assert len(paths) == len(set(paths))
    assert paths[:2] == [".writer", ".saving.t1"]
    assert paths[-3:] == ["t1/.latest", "t1/manifest.json", "latest"]
    sizes = {path.removeprefix("t1/"): n for path, n in put}
    checkpoint = open_checkpoint(run)
    records = checkpoint.manifest["parts"] | checkpoint.manifest["files"]
    expected = {name: record["size"] for name, record in records.items()}
    for info in checkpoint.arrays.values():
        files = {f"{info.path}/{file_name(i)}": info.grid.file_bytes(i) for i, _ in info.grid.files()}
        expected |= files
    assert expected.items() <= sizes.items()


@pytest.mark.parametrize("forever", [False, True], ids=["one-call-fails", "all-fail-from-then-on"])
def test_a_save_in_which_a_call_fails(monkeypatch: pytest.MonkeyPatch, forever: bool) -> None:
    """Some objects are put by one request, some by several."""
    monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 1 << 16)
    k, committed, names = 0, [], set()
    while True:
        k += 1
        run = f"memory://{uuid.uuid4().hex}"
        save_arrays(run, "t1", OLD)
        with failing(k, forever=forever) as calls:
            results = saving(run, "t2")()
        names |= {*calls}
        if len(calls) < k:
            break
        if calls[k - 1 :] == ["rm_file"] and not any(isinstance(result, Exception) for result in results):
            assert (holds(run, "t2"), open_store(run).names()) == ("new", [".writer", "latest", "t1", "t2"])
            committed.append(True)  # only the lock couldn't be given back, and the next save takes it over
            continue
        errors = {str(result) for result in results}
        assert all(isinstance(result, CheckpointError) for result in results), (k, results)
        assert len(errors) == 1, "all ranks tell the same"
        committed.append("is committed" in errors.pop())
        assert committed_tags(run) == (["t1", "t2"] if committed[-1] else ["t1"])
        assert holds(run, "t1") == "old"
        save_arrays(run, "t3", NEW)
        assert (holds(run, "t3"), read_latest(run), open_store(run).leftovers()) == ("new", "t3", [])
        objects = fsspec.filesystem("memory").find(run)
        assert committed[-1] or not [path for path in objects if "/t2/" in path], "nothing of it is left"
    assert {*committed} == {False, True}
    assert names == {*CHANGES} - ({"rm"} if forever else set()), "nothing is removed without its marker"
    assert k > 15


def test_a_save_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the k-th call the process does nothing more, not even clean up."""
    monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 1 << 16)
    k, exists = 0, []
    while True:
        k += 1
        run = f"memory://{uuid.uuid4().hex}"
        save_arrays(run, "t1", OLD)
        with failing(k, forever=True, error=Dead) as calls:
            saving(run, "t2")()
        if len(calls) < k:
            break
        exists.append("t2" in committed_tags(run))
        assert holds(run, "t1") == "old"
        assert not exists[-1] or holds(run, "t2") == "new"
        if not exists[-1] and k > 2:  # after the lock and the marker
            assert open_store(run).leftovers() == [".saving.t2"], "recognised"
        open_store(run).clean()
        assert open_store(run).leftovers() == []
        assert committed_tags(run) == (["t1", "t2"] if exists[-1] else ["t1"])
        assert exists[-1] or not open_store(run).exists("t2")
    assert exists == sorted(exists), "there is one call from which on the new checkpoint exists"
    assert {*exists} == {False, True}


def test_a_deletion_that_is_killed() -> None:
    k, gone = 0, []
    while True:
        k += 1
        run = f"memory://{uuid.uuid4().hex}"
        save_arrays(run, "t1", OLD)
        save_arrays(run, "t2", NEW)
        with failing(k, forever=True) as calls:
            try:
                prune(run, Retention(keep_last=1))
            except CheckpointError as error:
                assert "t1 can't be deleted" in str(error) or "can't be written" in str(error)  # noqa: PT017
        if len(calls) < k:
            break
        gone.append("t1" not in committed_tags(run))
        assert gone[-1] or holds(run, "t1") == "old"
        assert holds(run, "t2") == "new"
        clean(run)
        left = {path.split("/")[2] for path in fsspec.filesystem("memory").find(run)} - {".writer"}
        assert left == {"t2", "latest"} or (k <= 2 and left == {"t1", "t2", "latest"})
    assert {*gone} == {False, True}


def test_a_deletion_takes_the_manifest_first(run: str) -> None:
    """A marker exists as long as the deletion goes on."""
    save_arrays(run, "t1", OLD)
    save_arrays(run, "t2", NEW)
    paths: list[str] = []
    real = RemoteStore._call

    def call(
        self: RemoteStore, method: Callable[..., object], path: str, *args: object, **kw: object
    ) -> object:
        if method.__name__ in CHANGES:
            paths.append(f"{method.__name__} {path}")
        return real(self, method, path, *args, **kw)

    with mock.patch.object(RemoteStore, "_call", call):
        prune(run, Retention(keep_last=1))
    deletion = ["pipe_file .deleting.t1", "rm_file t1/manifest.json", "rm t1", "rm_file .deleting.t1"]
    assert paths == ["pipe_file .writer", *deletion, "rm_file .writer"]


def test_a_failure_is_no_answer(run: str) -> None:
    """An unreachable store doesn't tell whether a manifest exists, so nothing is deleted."""
    save_arrays(run, "t1", OLD)
    store = open_store(run)
    store.write(".saving.t1", [b"token"], durable=False)
    with mock.patch.object(store._fs, "info", side_effect=ConnectionError("down")):
        with pytest.raises(OSError, match="down"):
            store.exists("t1/manifest.json")
        with pytest.raises(OSError, match="down"):
            store.clean()
        store.abandon("t1", "token")
    assert holds(run, "t1") == "old"


def test_a_committed_tag_is_never_overwritten(run: str) -> None:
    save_arrays(run, "t1", OLD)
    for result in saving(run, "t1")():
        assert isinstance(result, CheckpointError)
        assert "t1 is a checkpoint, and nothing can be replaced in one step in this store" in str(result)
    assert holds(run, "t1") == "old"


def test_ranks_that_do_not_share_the_store(run: str) -> None:
    """Processes don't share fsspec's `memory://`, for example."""
    with mock.patch.object(RemoteStore, "begun", return_value=False):
        for result in saving(run, "t1")():
            assert "is not the same folder as rank 0's" in str(result)
    assert committed_tags(run) == []


def test_protocols_that_are_not_there() -> None:
    for url, text in {"nosuch://bucket/run": "nosuch", "gdrive://x/run": "gdrive"}.items():
        with pytest.raises(CheckpointError, match=text):
            open_checkpoint(url)


def test_a_file_url_is_a_folder(tmp_path) -> None:
    save_arrays(f"file://{tmp_path}/run", "t1", OLD)
    assert holds(f"{tmp_path}/run", "t1") == "old"
    assert (tmp_path / "run" / "t1" / "manifest.json").is_file()
