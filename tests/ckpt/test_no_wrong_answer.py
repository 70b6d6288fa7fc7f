"""Answers of a place that are wrong or missing: no first save is lost, no failure taken for an answer."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ckpt_faults import recorded
from ckpt_helpers import Arrays, save_arrays
from fsspec.core import url_to_fs
from fsspec.implementations.memory import MemoryFileSystem

from ckpt import (
    CheckpointError,
    Retention,
    committed_tags,
    open_checkpoint,
    prune,
    read_latest,
    verify,
)
from ckpt.stores import files
from ckpt.stores.local import LocalStore
from ckpt.stores.remote import RemoteStore

ARRAYS: Arrays = {("w", "fp32"): np.arange(12, dtype=np.float32), ("b", "fp32"): np.ones(3, np.float32)}


class Killed(BaseException):
    """The end of the process."""


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> str:
    return memory_url if request.param == "memory" else str(tmp_path / "run")


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        work()
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the first save ----------------------------------------------------------------------------------


def save_until_latest(run: str, tag: str) -> None:
    """Save, but end when `latest` would be written."""
    real = RemoteStore._put_surely

    def put(store: RemoteStore, path: str, *args: Any) -> None:
        if path == "latest":
            raise Killed
        real(store, path, *args)

    with (
        mock.patch.object(files, "replace_file", side_effect=Killed),
        mock.patch.object(RemoteStore, "_put_surely", put),
        pytest.raises(Killed),
    ):
        save_arrays(run, tag, ARRAYS)


def test_a_first_save_that_ended_before_latest_is_found(run: str) -> None:
    save_until_latest(run, "t1")
    assert read_latest(run) == "t1"
    assert open_checkpoint(run).tag == "t1"
    save_until_latest(run, "t2")
    assert (read_latest(run), committed_tags(run)) == ("t2", ["t1", "t2"])
    save_arrays(run, "t3", ARRAYS)
    assert read_latest(run) == "t3"


def test_a_save_that_was_not_to_be_named_is_never_taken(run: str) -> None:
    save_arrays(run, "t1", ARRAYS, update_latest=False)
    assert "has no file 'latest'" in refusal(lambda: read_latest(run))
    save_until_latest(run, "t2")
    assert read_latest(run) == "t2"
    save_arrays(run, "t3", ARRAYS, update_latest=False)
    assert "has no file 'latest'" in refusal(lambda: read_latest(run))


def test_a_latest_that_was_lost_is_not_made_up(tmp_path: Path) -> None:
    """The checkpoints that are there may be older than the one that `latest` named."""
    for tag in ("t1", "t2"):
        save_arrays(tmp_path, tag, ARRAYS)
    (tmp_path / "latest").unlink()
    assert "has no file 'latest'" in refusal(lambda: read_latest(tmp_path))
    assert not [*tmp_path.rglob(".latest")]


def test_a_mark_that_was_left_names_nothing_older_than_another(tmp_path: Path) -> None:
    with mock.patch("os.unlink", side_effect=OSError("not now")):
        save_arrays(tmp_path, "t1", ARRAYS)
    assert (tmp_path / "t1" / ".latest").exists()
    assert verify(open_checkpoint(tmp_path), threads=1) == []
    save_arrays(tmp_path, "t2", ARRAYS)
    assert not (tmp_path / "t2" / ".latest").exists()
    shutil.copytree(tmp_path / "t1", tmp_path / "zz")  # a copy has no say
    (tmp_path / "latest").unlink()
    assert "has no file 'latest'" in refusal(lambda: read_latest(tmp_path))


def test_a_latest_that_comes_while_it_is_looked_for_is_read(tmp_path: Path) -> None:
    """The first save ends between two looks."""
    save_arrays(tmp_path, "t1", ARRAYS)
    latest, reads = (tmp_path / "latest").read_text(), [0]
    (tmp_path / "latest").unlink()
    real = LocalStore.read

    def read(store: LocalStore, path: str, *most: int) -> bytes:
        reads[0] += path == "latest"
        if reads[0] == 2:
            (tmp_path / "latest").write_text(latest)
        return real(store, path, *most)

    with mock.patch.object(LocalStore, "read", read):
        assert read_latest(tmp_path) == "t1"


# --- a tag and its folder ----------------------------------------------------------------------------


def test_swapped_folders_and_manifests_are_refused(run: str) -> None:
    for tag in ("t1", "t2"):
        save_arrays(run, tag, ARRAYS)
    fs, root = url_to_fs(run)
    older = fs.cat_file(f"{root}/t1/manifest.json")
    fs.pipe_file(f"{root}/t2/manifest.json", older)  # the arrays are the same, but not what the script saved
    for tag in (None, "t2"):
        assert "has the tag 't1', not 't2'" in refusal(lambda tag=tag: open_checkpoint(run, tag))  # type: ignore[misc]
    assert open_checkpoint(run, "t2", renamed=True).manifest["tag"] == "t1"
    assert open_checkpoint(f"{run}/t2").tag == "t1"
    assert open_checkpoint(run, "t1").tag == "t1"


# --- failures that are no answers --------------------------------------------------------------------


@contextmanager
def unseen(path: str) -> Iterator[None]:
    """This process may not look at a file."""
    stat = os.stat

    def denied(asked: Any, *args: Any, **more: Any) -> Any:
        if str(asked).endswith(path):
            raise PermissionError(13, "Permission denied", str(asked))
        return stat(asked, *args, **more)

    with mock.patch("os.stat", denied):
        yield


def test_what_may_not_be_seen_is_not_taken_for_missing(tmp_path: Path) -> None:
    for tag in ("t1", "t2"):
        save_arrays(tmp_path, tag, ARRAYS, document={"run_id": "a"})
    calls: list[Callable[[], object]] = [
        lambda: read_latest(tmp_path),
        lambda: open_checkpoint(tmp_path),
        lambda: open_checkpoint(tmp_path, "t2"),
        lambda: committed_tags(tmp_path),
        lambda: prune(tmp_path, Retention(keep_last=1)),
        lambda: save_arrays(tmp_path, "t2", ARRAYS, document={"run_id": "a"}),
    ]
    with unseen("t2/manifest.json"):
        for call in calls:
            assert "Permission denied" in refusal(call)
    assert committed_tags(tmp_path) == ["t1", "t2"]


def failing_at(k: int, name: str, error: Exception) -> Any:
    """Let the k-th request of a kind fail."""
    real, calls = getattr(MemoryFileSystem, name), [0]

    def call(self: Any, *args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == k:
            raise error
        return real(self, *args, **more)

    return mock.patch.object(MemoryFileSystem, name, call)


@pytest.mark.parametrize("error", [OSError(503, "Slow\nDown"), RuntimeError("two\nlines")], ids=repr)
def test_a_store_that_does_not_answer_is_a_checkpoint_error(memory_url: str, error: Exception) -> None:
    """It is one line, as it goes into logs, whatever the package of the protocol raises."""
    save_arrays(memory_url, "t0", ARRAYS)
    told = set()
    works: list[Callable[[], object]] = [
        lambda: read_latest(memory_url),
        lambda: committed_tags(memory_url),
        lambda: open_checkpoint(memory_url),
        lambda: prune(memory_url, Retention(keep_last=1)),
    ]
    for name in ("info", "ls", "modified", "cat_file", "pipe_file", "rm_file"):
        for k in range(1, 7):
            save_arrays(memory_url, f"{name}-{k}", ARRAYS)
            for work in works:
                with failing_at(k, name, error):
                    try:
                        work()
                    except CheckpointError as found:
                        told.add((name, str(found)))
            assert read_latest(memory_url) == f"{name}-{k}"
            prune(memory_url, Retention(keep_last=1))
    assert {name for name, _ in told} == {"info", "ls", "modified", "cat_file", "pipe_file", "rm_file"}
    assert not [text for _, text in told if "\n" in text]


@contextmanager
def answers_lost(path: str, *, also_reads: bool = False) -> Iterator[None]:
    """Requests that change this object are done, but their answers are lost."""
    real = RemoteStore._call

    def call(store: RemoteStore, method: Any, asked: str, *args: Any, **more: Any) -> Any:
        if also_reads and asked == path and method.__name__ == "cat_file":
            raise TimeoutError("no answer")
        result = real(store, method, asked, *args, **more)
        if asked == path and method.__name__ == "pipe_file":
            raise TimeoutError("no answer")
        return result

    with mock.patch.object(RemoteStore, "_call", call):
        yield


@pytest.mark.parametrize("path", ["t1/manifest.json", "latest"])
def test_an_object_that_was_put_though_the_answer_was_lost(memory_url: str, path: str) -> None:
    with answers_lost(path):
        save_arrays(memory_url, "t1", ARRAYS)
    assert (read_latest(memory_url), committed_tags(memory_url)) == ("t1", ["t1"])
    assert verify(open_checkpoint(memory_url), threads=1) == []


def test_a_commit_of_which_nothing_is_known_says_so(memory_url: str) -> None:
    with answers_lost("t1/manifest.json", also_reads=True):
        text = refusal(lambda: save_arrays(memory_url, "t1", ARRAYS))
    assert "t1/manifest.json may be there: putting it failed (no answer), and so did looking for it" in text
    assert committed_tags(memory_url) == ["t1"], "and nothing of it is removed"
    assert verify(open_checkpoint(memory_url), threads=1) == []


@pytest.mark.parametrize("replaces", [False, True])
def test_a_rename_that_was_done_though_the_answer_was_lost(tmp_path: Path, replaces: bool) -> None:
    """A network's file system may say so when it was asked twice."""
    save_arrays(tmp_path, "t1" if replaces else "t0", ARRAYS)
    new: Arrays = {("w", "fp32"): np.ones(5, np.float32)}
    rename, exchange = Path.rename, files.exchange_folders

    def then_lost(real: Callable[..., object]) -> Callable[..., None]:
        def call(a: Path, b: Path) -> None:
            real(a, b)
            raise FileNotFoundError(2, "No such file or directory", str(a))

        return call

    with (
        mock.patch.object(Path, "rename", then_lost(rename)),
        mock.patch.object(files, "exchange_folders", then_lost(exchange)),
    ):
        save_arrays(tmp_path, "t1", new)
    assert read_latest(tmp_path) == "t1"
    assert open_checkpoint(tmp_path).read("w").tolist() == [1.0] * 5


def test_a_server_that_sends_whole_objects(memory_url: str) -> None:
    """It ignores the header `Range`, as plain servers of files do."""
    array = np.arange(30_000, dtype=np.float32).reshape(300, 100)
    save_arrays(memory_url, "t1", {("w", "fp32"): array}, planning={"chunk_bytes": 1 << 12})
    real = MemoryFileSystem.cat_file

    def whole(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        return real(self, path, **more)  # type: ignore[no-any-return]

    with mock.patch.object(MemoryFileSystem, "cat_file", whole):
        checkpoint = open_checkpoint(memory_url)
        assert len(checkpoint.info("w", "fp32").sums) > 10
        assert np.array_equal(checkpoint.read("w"), array)
        assert verify(checkpoint, threads=1) == []
        assert committed_tags(memory_url) == ["t1"]


# --- durability --------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["durable", "not-durable"])
def test_what_replaces_a_durable_checkpoint_is_durable(tmp_path: Path, before: bool) -> None:
    """Without its own bytes on the disk, a power cut after the exchange could take both."""
    save_arrays(tmp_path, "t1", ARRAYS, durable=before)
    with recorded() as calls:
        save_arrays(tmp_path, "t1", ARRAYS, durable=False)
    names = {name for name, _, _ in calls}
    assert ({"sync_tree", "sync"} <= names) == before
    assert open_checkpoint(tmp_path).manifest["durable"] == before
    with recorded() as calls:
        save_arrays(tmp_path, "t2", ARRAYS, durable=False)
    assert not {"sync_tree", "sync"} & {name for name, _, _ in calls}
