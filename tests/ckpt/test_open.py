"""Finding a checkpoint, and the errors if there is none."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import all_ranks, layout_of, run_ranks, same, save_arrays, shards_of
from ckpt_saved import CountingStore

from ckpt import (
    Box,
    CheckpointError,
    committed_tags,
    make_plan,
    open_checkpoint,
    open_together,
    save,
    verify,
)
from ckpt.stores.local import LocalStore

ARRAYS = {("w", "fp32"): np.arange(12.0).reshape(4, 3), ("w", "exp_avg"): np.ones(3)}


@pytest.fixture
def run(tmp_path) -> Path:
    for tag in ("first", "numbers-1"):
        save_arrays(tmp_path / "run", tag, ARRAYS)
    return tmp_path / "run"


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"../first", b"gone\n", b"two words"], ids=repr)
def test_latest_that_names_nothing_says_what_there_is(run, content):
    (run / "latest").unlink()
    if content is not None:
        (run / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest.*first, numbers-1"):
        open_checkpoint(run)
    assert open_checkpoint(run, "numbers-1").tag == "numbers-1"


def test_latest_that_cannot_be_read_says_why(run):
    (run / "latest").unlink()
    (run / "latest").mkdir()
    with pytest.raises(CheckpointError, match=r"latest can't be read: Is a directory"):
        open_checkpoint(run)


def test_a_tag_that_is_not_there_lists_those_that_are(run):
    with pytest.raises(
        CheckpointError, match="no committed checkpoint 'numbers-2'; the tags there are: first, numbers-1"
    ):
        open_checkpoint(run, "numbers-2")


def test_an_array_that_is_not_there_lists_what_is(run):
    checkpoint = open_checkpoint(run)
    with pytest.raises(CheckpointError, match="no 'exp_avg_sq' of 'w': its states are exp_avg, fp32"):
        checkpoint.read("w", "exp_avg_sq")
    with pytest.raises(CheckpointError, match="no such atom"):
        checkpoint.read("v")
    for box in (Box((0, 0), (5, 1)), Box((0,), (1,)), Box((0, 0, 0), (1, 1, 1))):
        with pytest.raises(CheckpointError, match=r"w/fp32 has shape \[4, 3\].*beyond"):
            checkpoint.read("w", "fp32", box)


@pytest.mark.parametrize("folder", ["", 7, None, b"run"], ids=repr)
def test_what_is_no_folder_says_what_is_expected(folder):
    with pytest.raises(CheckpointError, match=f"the folder is {folder!r}; expected a path or URL"):
        open_checkpoint(folder)


@pytest.mark.parametrize("tag", [7, np.int64(7)], ids=repr)
def test_a_tag_may_be_a_number(run, tag):
    save_arrays(run, "7", ARRAYS)
    save_arrays(run, "8", ARRAYS)
    assert open_checkpoint(run, tag).tag == "7"


@pytest.mark.parametrize("tag", [True, 7.0, b"7", ["7"]], ids=repr)
def test_a_tag_of_another_type_is_refused(run, tag):
    with pytest.raises(CheckpointError, match=r"the tag is .*; expected a string or an integer"):
        open_checkpoint(run, tag)


def test_a_name_of_a_tied_weight_is_that_weight(run):
    checkpoint = open_checkpoint(run)
    checkpoint.manifest["aliases"] = {"head": "w"}
    assert same(checkpoint.read("head"), ARRAYS["w", "fp32"])
    assert checkpoint.info("head", "exp_avg").nbytes == 24


def test_ranks_open_one_checkpoint_together(run, monkeypatch):
    """Rank 0 finds it and reads its manifest for all; what another rank finds doesn't count."""
    found = all_ranks(3, lambda comm: open_together(comm, run if comm.rank == 0 else run / "none"))
    assert [checkpoint.url for checkpoint in found] == [f"{run}/numbers-1"] * 3
    assert all(checkpoint.tag == "numbers-1" for checkpoint in found)
    assert all(same(checkpoint.read("w"), ARRAYS["w", "fp32"]) for checkpoint in found)
    reads, read = [], LocalStore.read
    monkeypatch.setattr(LocalStore, "read", lambda *args: [reads.append(args[1]), read(*args)][1])
    all_ranks(3, lambda comm: open_together(comm, run, "first"))
    assert len([path for path in reads if "manifest" in path]) <= 2, "by rank 0"
    errors = run_ranks(3, lambda comm: open_together(comm, run, "numbers-2" if comm.rank == 0 else "first"))
    assert {type(error) for error in errors} == {CheckpointError}
    assert len({str(error) for error in errors}) == 1


STAGES = {("v", "value"): np.arange(4.0), ("w", "fp32"): np.ones((4, 3))}


def save_in_two_parts(run: Path) -> None:
    """Save two arrays from two ranks that share none, as stages of a pipeline do."""
    whole = {key: [Box.whole(array.shape)] * 2 for key, array in STAGES.items()}

    def work(comm: Any) -> None:
        own = [layout_of(STAGES, whole)[comm.rank][comm.rank]]
        plan = make_plan({comm.rank: own})
        save(run, "t1", shards_of(STAGES, own), plan=plan, comm=comm, document={}, durable=False)

    all_ranks(2, work)


def test_only_the_parts_in_use_are_read(tmp_path):
    save_in_two_parts(tmp_path)
    assert verify(open_checkpoint(tmp_path)) == []
    for key, other, name in (*STAGES, "arrays.0.json"), (*reversed(STAGES), "arrays.1.json"):
        checkpoint = open_checkpoint(tmp_path)
        checkpoint.store = counting = CountingStore(checkpoint.store)
        assert sorted(checkpoint.arrays) == sorted(STAGES)
        assert checkpoint.atoms == {"v": ["value"], "w": ["fp32"]}
        assert counting.calls == [], "which arrays there are is in the manifest"
        for _ in range(2):
            assert same(checkpoint.read(*key), STAGES[key])
        assert [path for call, path in counting.calls if call == "read"] == [f"t1/{name}"]
        (tmp_path / "t1" / name).rename(tmp_path / "elsewhere")
        checkpoint = open_checkpoint(tmp_path)
        assert same(checkpoint.read(*other), STAGES[other])
        with pytest.raises(CheckpointError, match=f"{name} can't be read: No such file"):
            checkpoint.read(*key)
        assert [p.path for p in verify(checkpoint)] == [f"{tmp_path}/t1/{name}"]
        (tmp_path / "elsewhere").rename(tmp_path / "t1" / name)


def a_file(path: Path) -> None:
    path.write_text("not a folder")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "holds no committed checkpoint"),
        (a_file, "is not a folder"),
        (lambda path: None, "is not a folder"),
        (lambda path: (path / ".saving.t1").mkdir(parents=True), "holds no committed checkpoint"),
        (lambda path: (path / "t1" / "atoms").mkdir(parents=True), "holds no committed checkpoint"),
    ],
    ids=["empty", "file", "nothing", "crashed", "no-manifest"],
)
def test_places_without_a_checkpoint(tmp_path, make: Callable[[Path], None], message):
    make(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no committed checkpoint 't1'; there are none"):
        open_checkpoint(tmp_path / "run", "t1")


def test_a_checkpoint_s_own_folder_opens_too(run, monkeypatch):
    monkeypatch.chdir(run / "numbers-1")
    checkpoint = open_checkpoint(".")
    assert checkpoint.tag == "numbers-1"
    assert same(checkpoint.read("w"), ARRAYS["w", "fp32"])


def test_a_tag_that_is_deleted_while_tags_are_listed(run, monkeypatch):
    """Retention may do so; a concurrent reader lists the remaining tags."""
    exists = LocalStore.exists

    def and_then_gone(store: LocalStore, path: str) -> bool:
        found = exists(store, path)
        if path == "first/manifest.json":
            shutil.rmtree(run / "first")
        return found

    monkeypatch.setattr(LocalStore, "exists", and_then_gone)
    assert committed_tags(run) == ["numbers-1"]


def test_a_tag_that_is_replaced_by_a_newer_one_while_it_is_opened(run, monkeypatch):
    """A reader has read `latest` when a concurrent save commits and retention deletes that tag."""
    exists = LocalStore.exists
    (run / "latest").write_text("first\n")

    def when_it_is_gone(store: LocalStore, path: str) -> bool:
        if path == "first/manifest.json" and (run / "first").exists():
            (run / "latest").write_text("numbers-1\n")
            shutil.rmtree(run / "first")
        return exists(store, path)

    monkeypatch.setattr(LocalStore, "exists", when_it_is_gone)
    assert open_checkpoint(run).tag == "numbers-1"
