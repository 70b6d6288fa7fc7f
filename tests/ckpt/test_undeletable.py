"""Leftovers and checkpoints that can't be deleted are reported once, by their path, and stop nothing."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ckpt_helpers import Arrays, save_arrays

from ckpt import CheckpointError, Retention, clean, committed_tags, open_store, prune, read_latest
from ckpt.stores import writer_lock
from ckpt.stores.remote import RemoteStore

ARRAYS: Arrays = {("w", "fp32"): np.arange(12, dtype=np.float32)}
KEEP_1 = Retention(keep_last=1)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "_said", set())


def save(run: Any, tag: str, **options: Any) -> Any:
    return save_arrays(run, tag, ARRAYS, durable=True, **options)


@contextmanager
def immutable(*names: str, folders: tuple[str, ...] = ()) -> Iterator[None]:
    """Files of these names can't be removed, nor can folders that begin so be renamed, as another user's."""
    unlink, rename = os.unlink, os.rename

    def not_unlink(path: Any, **more: Any) -> None:
        if os.path.basename(path) in names:
            raise PermissionError(errno.EPERM, "Operation not permitted", path)
        unlink(path, **more)

    def not_rename(old: Any, new: Any) -> None:
        if os.path.basename(old).startswith(folders or ("/",)):
            raise PermissionError(errno.EPERM, "Operation not permitted", old)
        rename(old, new)

    with mock.patch("os.unlink", not_unlink), mock.patch("os.rename", not_rename):
        yield


@pytest.mark.parametrize("name", [".saving.t0", ".deleting.t0", f".saving.t0.{'a' * 32}"])
@pytest.mark.parametrize("folders", [(), (".saving.t0", ".deleting.t0")], ids=["file", "folder"])
def test_a_leftover_that_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, folders: tuple[str, ...]
) -> None:
    save(tmp_path, "t0")
    (tmp_path / name / "atoms").mkdir(parents=True)
    (tmp_path / name / "atoms" / "stuck").write_text("another user's")
    (tmp_path / name / "mine").write_text("x")
    with immutable("stuck", folders=folders):
        for tag in ("t1", "t2", "t3", "t2"):
            save(tmp_path, tag)
        assert read_latest(tmp_path) == "t2"
        (said,) = [record.message for record in caplog.records]
        (left,) = open_store(tmp_path).leftovers()
        assert f"{tmp_path}/{left} can't be removed" in said
        assert "Operation not permitted" in said
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/{left} can't be removed"):
            clean(tmp_path)
    assert (tmp_path / left / "atoms" / "stuck").exists()
    save(tmp_path, "t4")
    assert open_store(tmp_path).leftovers() == [], "as soon as it can be"


def test_a_checkpoint_that_cannot_be_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It can't even be renamed: it stays one, and the others are deleted all the same."""
    for tag in ("t0", "t1", "t2"):
        save(tmp_path, tag)
    with immutable(folders=("t0",)):
        assert [save(tmp_path, tag, retention=KEEP_1).pruned for tag in ("t3", "t4")] == [
            ("t1", "t2"),
            ("t3",),
        ]
        assert committed_tags(tmp_path) == ["t0", "t4"]
        (said,) = [record.message for record in caplog.records]
        assert f"{tmp_path}/t0 can't be deleted" in said
        with pytest.raises(CheckpointError, match=f"{tmp_path}/t0 can't be deleted"):
            prune(tmp_path, KEEP_1)
    assert save(tmp_path, "t5", retention=KEEP_1).pruned == ("t0", "t4")


def test_a_checkpoint_that_cannot_even_be_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is neither counted nor deleted, and the others are as ever."""
    for tag in ("t0", "t1", "t2"):
        save(tmp_path, tag)
    stat = os.stat

    def denied(path: Any, *args: Any, **more: Any) -> Any:
        if str(path).endswith("t1/manifest.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *args, **more)

    with mock.patch("os.stat", denied):
        assert save(tmp_path, "t3", retention=KEEP_1).pruned == ("t0", "t2")
        assert save(tmp_path, "t4", retention=KEEP_1).pruned == ("t3",)
    (said,) = [record.message for record in caplog.records]
    assert f"{tmp_path}/t1 can't be read" in said
    assert committed_tags(tmp_path) == ["t1", "t4"]


def test_a_checkpoint_of_which_a_file_cannot_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for tag in ("t1", "t2"):
        save(tmp_path, tag)
    (tmp_path / "t1" / "stuck").write_text("x")
    with immutable("stuck"):
        assert save(tmp_path, "t3", retention=KEEP_1).pruned == ("t1", "t2")
        assert save(tmp_path, "t4", retention=KEEP_1).pruned == ("t3",)
    assert committed_tags(tmp_path) == ["t4"]
    (said,) = [record.message for record in caplog.records]
    assert f"{tmp_path}/.deleting.t1." in said
    assert clean(tmp_path) == [Path(said.partition(" can't be")[0]).name]
    assert {path.name for path in tmp_path.iterdir()} == {"t4", "latest"}


def test_a_replaced_checkpoint_of_which_a_file_cannot_be_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, "t1")
    (tmp_path / "t1" / "stuck").write_text("x")
    with immutable("stuck"):
        for _ in range(3):
            save(tmp_path, "t1")
    assert all("can't be removed" in record.message for record in caplog.records)
    assert 1 <= len(caplog.records) <= 2, "once under each name"
    save(tmp_path, "t1")
    assert {path.name for path in tmp_path.iterdir()} == {"t1", "latest"}


@contextmanager
def denied(*paths: str) -> Iterator[None]:
    """Objects can't be removed by which these paths, relative to the run, begin."""
    real = RemoteStore._call

    def call(store: RemoteStore, method: Any, path: str, *args: Any, **more: Any) -> Any:
        if method.__name__ in ("rm", "rm_file") and path.startswith(paths):
            raise PermissionError(f"denied: {path}")
        return real(store, method, path, *args, **more)

    with mock.patch.object(RemoteStore, "_call", call):
        yield


@pytest.mark.parametrize("marker", [".saving.t0", ".deleting.t0"])
def test_objects_that_stay(memory_url: str, caplog: pytest.LogCaptureFixture, marker: str) -> None:
    store = open_store(memory_url)
    for path in (marker, "t0/atoms/c"):
        store.write(path, [b"x"], durable=False)
    with denied("t0"):
        for tag in ("t1", "t2"):
            save(memory_url, tag)
        with pytest.raises(CheckpointError, match="t0 exists and is not a checkpoint"):
            save(memory_url, "t0")
        (said,) = [record.message for record in caplog.records]
        assert f"{memory_url}/{marker} can't be finished: denied: t0" in said
        with pytest.raises(CheckpointError, match="can't be cleaned: denied: t0"):
            clean(memory_url)
    assert clean(memory_url) == [marker]
    save(memory_url, "t0")


def test_checkpoints_in_a_store_that_stay(memory_url: str, caplog: pytest.LogCaptureFixture) -> None:
    for tag in ("t0", "t1", "t2"):
        save(memory_url, tag)
    with denied("t0/manifest.json"):
        assert save(memory_url, "t3", retention=KEEP_1).pruned == ("t1", "t2")
    with denied("t0"):
        assert save(memory_url, "t4", retention=KEEP_1).pruned == ("t3",)
    assert committed_tags(memory_url) == ["t0", "t4"]
    assert {r.message.partition(" can't be")[0].rpartition("/")[2] for r in caplog.records} >= {"t0"}
    assert save(memory_url, "t5", retention=KEEP_1).pruned == ("t4",), "the next save finishes t0's deletion"
    assert open_store(memory_url).names() == ["latest", "t5"]
