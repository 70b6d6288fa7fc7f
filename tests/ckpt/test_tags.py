"""Listing checkpoints in their order, and deleting them by a retention."""

from __future__ import annotations

import json
import os
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from ckpt_faults import Faults
from ckpt_helpers import Arrays, same, save_arrays
from hypothesis import given
from hypothesis import strategies as st

from ckpt import (
    CheckpointError,
    Retention,
    clean,
    committed_tags,
    open_checkpoint,
    open_store,
    prune,
    read_latest,
)
from ckpt.format import encode_manifest

ARRAYS: Arrays = {("w", "fp32"): np.arange(1000, dtype=np.float32)}
BEGIN = datetime(2025, 1, 31, 12, tzinfo=UTC)


def save_at(run: object, tag: str, step: int, minute: int = 0) -> None:
    created = (BEGIN + timedelta(minutes=minute)).isoformat(timespec="seconds")
    save_arrays(run, tag, ARRAYS, document={"step": step, "created": created})


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory_url: str) -> str:
    return memory_url if request.param == "memory" else str(tmp_path / "run")


def test_the_order_is_that_of_the_saves_whatever_the_files_say(tmp_path):
    for minute, step in enumerate((8, 9, 10, 11, 6)):  # at last somebody went back to step 5
        save_at(tmp_path, f"s{step}", step, minute)
    expected = ["s8", "s9", "s10", "s11", "s6"]
    assert committed_tags(tmp_path) == expected
    for age, tag in enumerate(expected):  # as after a copy in any order
        os.utime(tmp_path / tag / "manifest.json", (10_000 - age, 10_000 - age))
    assert committed_tags(tmp_path) == expected
    assert prune(tmp_path, Retention(keep_last=2)) == ["s8", "s9", "s10"]


def without_numbers(run: Path) -> None:
    """Rewrite the manifests as a writer that doesn't number its commits."""
    for path in run.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["crc32c"], manifest["commit"]
        path.write_bytes(encode_manifest(manifest))


def test_neither_clocks_nor_steps_decide(tmp_path):
    """The clock went back, and another run of the script began at step 0."""
    for step in (500, 501, 502):
        save_at(tmp_path, f"s{step}", step, step)
    for step in (10, 11, 12):
        save_at(tmp_path, f"s{step}", step, step)
        prune(tmp_path, Retention(keep_last=2))
    assert committed_tags(tmp_path) == ["s11", "s12"]


def test_without_numbers_time_and_then_the_step_decide(tmp_path):
    for step in (9, 11, 10):
        save_at(tmp_path, f"s{step}", step)
    save_at(tmp_path, "s1", 1, -1)
    assert committed_tags(tmp_path) == ["s9", "s11", "s10", "s1"]
    without_numbers(tmp_path)
    assert committed_tags(tmp_path) == ["s1", "s9", "s10", "s11"]


def test_those_without_a_number_are_put_where_their_time_says(tmp_path):
    for minute in (0, 10, 20):
        save_at(tmp_path, f"m{minute}", 1, minute)
    without_numbers(tmp_path)
    for minute in (5, 15, 3):  # by a writer that numbers them, whose clock is set back at last
        save_at(tmp_path, f"m{minute}", 1, minute)
    assert committed_tags(tmp_path) == ["m0", "m5", "m10", "m15", "m3", "m20"]


def test_a_replaced_tag_is_the_newest(tmp_path):
    for step in (1, 2, 1):
        save_at(tmp_path, f"s{step}", step)
    assert committed_tags(tmp_path) == ["s2", "s1"]
    numbers = [open_checkpoint(tmp_path, tag).manifest["commit"] for tag in ("s2", "s1")]
    assert numbers == [2, 3]


def test_what_a_retention_keeps(run):
    for step in range(1, 8):
        save_at(run, f"s{step}", step, step)
    retention = Retention(keep_last=2, keep_every=3)
    assert prune(run, retention, dry_run=True) == ["s1", "s2", "s4", "s5"]
    assert len(committed_tags(run)) == 7
    assert prune(run, retention) == ["s1", "s2", "s4", "s5"]
    assert committed_tags(run) == ["s3", "s6", "s7"]
    assert prune(run, retention) == []
    assert prune(run, Retention()) == []
    assert open_store(run).leftovers() == []
    for tag in committed_tags(run):
        assert same(open_checkpoint(run, tag).read("w"), ARRAYS["w", "fp32"])


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 5)))
def test_the_rule(steps, last, every):
    tags = [f"t{i}" for i in range(len(steps))]
    dropped = Retention(keep_last=last, keep_every=every).dropped(tags, steps)
    for i, (tag, step) in enumerate(zip(tags, steps, strict=True)):
        newer = len(tags) - i - 1
        keeps = newer < last or (every is not None and step % every == 0)
        assert (tag in dropped) == (not keeps)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"keep_last": 0}, "keep_last is 0"),
        ({"keep_last": 2, "keep_every": -1}, "keep_every is -1"),
        ({"keep_every": 5}, "give keep_last too"),
    ],
)
def test_retentions_that_make_no_sense(given, text):
    with pytest.raises(ValueError, match=text):
        Retention(**given)


def test_nothing_is_deleted_for_what_may_not_be_on_the_disk(tmp_path):
    save_at(tmp_path, "s1", 1)
    with pytest.raises(CheckpointError, match="a save that isn't durable can't delete older checkpoints"):
        save_arrays(tmp_path, "s2", ARRAYS, durable=False, retention=Retention(keep_last=1))
    assert committed_tags(tmp_path) == ["s1"]


def test_the_latest_is_kept_even_if_it_is_old(run):
    for step in (1, 2, 3):
        save_at(run, f"s{step}", step, step)
    if run.startswith("memory"):
        open_store(run).write("latest", [b"s1\n"], durable=False)
    else:
        (Path(run) / "latest").write_text("s1\n")
    assert prune(run, Retention(keep_last=1)) == ["s2"]
    assert committed_tags(run) == ["s1", "s3"]


def test_a_damaged_checkpoint_does_not_count_and_is_left(tmp_path):
    for step in (1, 2, 3):
        save_at(tmp_path, f"s{step}", step, step)
    manifest = tmp_path / "s3" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    assert prune(tmp_path, Retention(keep_last=1)) == ["s1"]
    assert committed_tags(tmp_path) == ["s2", "s3"]


def test_somebody_s_copies_are_never_deleted(tmp_path):
    for step in (1, 2):
        save_at(tmp_path, f"s{step}", step, step)
    shutil.copytree(tmp_path / "s1", tmp_path / "best")
    shutil.copytree(tmp_path / "s1", tmp_path / "my copy")
    assert committed_tags(tmp_path) == ["best", "s1", "s2"], "a name with a space is no tag"
    with pytest.raises(CheckpointError, match=r"has the tag 's1', not 'best'.*name its own folder"):
        open_checkpoint(tmp_path, "best")
    assert open_checkpoint(tmp_path, "best", renamed=True).tag == "best"
    assert open_checkpoint(tmp_path / "best").tag == "s1", "its own folder may have any name"
    assert prune(tmp_path, Retention(keep_last=1)) == ["s1"]
    assert committed_tags(tmp_path) == ["best", "s2"]
    assert (tmp_path / "my copy" / "manifest.json").exists()


def test_without_a_latest_nothing_is_deleted(tmp_path):
    for step in (1, 2):
        save_at(tmp_path, f"s{step}", step, step)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match="has no file 'latest'"):
        prune(tmp_path, Retention(keep_last=1))
    assert committed_tags(tmp_path) == ["s1", "s2"]


@pytest.mark.parametrize("forever", [False, True], ids=["one-call-fails", "all-fail-from-then-on"])
def test_a_deletion_in_which_a_call_fails(tmp_path, forever):
    """Each checkpoint is whole or gone, and leftovers are cleaned up."""
    k, gone = 0, []
    while True:
        k += 1
        run = tmp_path / str(k)
        for step in (1, 2):
            save_at(run, f"s{step}", step, step)
        with Faults(k, forever=forever).active() as faults:
            try:
                prune(run, Retention(keep_last=1))
            except CheckpointError as error:
                assert re.search("s1 can't be deleted|can't be (read|written)", str(error))  # noqa: PT017
        if not faults.struck:
            break
        gone.append("s1" not in committed_tags(run))
        for tag in committed_tags(run):
            assert same(open_checkpoint(run, tag).read("w"), ARRAYS["w", "fp32"])
        assert read_latest(run) == "s2"
        clean(run)
        assert {p.name for p in run.iterdir()} <= {"s1", "s2", "latest"}
    assert {*gone} == {False, True}


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [("a", "a", False), ("a", "b", True), ("a", None, False), (None, "b", False), (7, "b", False)],
    ids=str,
)
def test_another_run_s_checkpoint_is_not_replaced(tmp_path, before, now, refused):
    """One that doesn't name its run may be, and so may any by a save that doesn't."""
    named = [{} if run_id is None else {"run_id": run_id} for run_id in (before, now)]
    save_arrays(tmp_path, "t1", ARRAYS, document=named[0])
    new = {("w", "fp32"): np.zeros(5, np.float32)}
    if refused:
        with pytest.raises(
            CheckpointError, match=r"t1 was saved by another run \(a; this one is b\): resume"
        ):
            save_arrays(tmp_path, "t1", new, document=named[1])
    else:
        save_arrays(tmp_path, "t1", new, document=named[1])
    assert same(open_checkpoint(tmp_path).read("w"), (ARRAYS if refused else new)["w", "fp32"])
    save_arrays(tmp_path, "t2", new, document=named[1])
