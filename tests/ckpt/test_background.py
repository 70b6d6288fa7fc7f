"""A save in the background: its error reaches its owner, those who read the run, and the process's exit."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import save_arrays

from ckpt import CheckpointError, open_checkpoint, read_latest
from ckpt.background import Background, check_last_save, identity, join_all

ARRAYS = {("w", "fp32"): np.ones(3, np.float32)}


def fail() -> None:
    raise CheckpointError("disk full")


def test_a_result_is_returned_once(tmp_path: Path) -> None:
    background: Background[int] = Background("a save")
    assert background.wait() is None, "there was none"
    background.start(lambda: 7, run=tmp_path)
    assert [background.wait(), background.wait()] == [7, None]
    assert not background.failed


def test_an_error_is_raised_once(tmp_path: Path) -> None:
    background: Background[None] = Background("a save")
    background.start(fail, run=tmp_path)
    join_all()
    assert background.failed
    with pytest.raises(CheckpointError, match="disk full"):
        background.wait()
    assert not background.failed
    assert background.wait() is None


def test_one_at_a_time(tmp_path: Path) -> None:
    background, go_on = Background[Any]("a save"), threading.Event()
    background.start(go_on.wait, run=tmp_path)
    with pytest.raises(AssertionError, match="one at a time"):
        background.start(fail, run=tmp_path)
    go_on.set()
    assert background.wait() is True


def test_where_there_is_no_thread_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised by `wait`, like one of the work; then the next save may begin."""

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    background: Background[int] = Background("a save")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        background.start(lambda: 7, run=tmp_path)
    assert background.failed
    with pytest.raises(RuntimeError, match="can't start new thread"):
        background.wait()
    background.start(lambda: 8, run=tmp_path)
    assert background.wait() == 8


def test_what_opens_a_run_waits_but_a_save_s_own_thread_doesn_t(tmp_path: Path) -> None:
    background, go_on, waited = Background[None]("a save"), threading.Event(), threading.Event()

    def work() -> None:
        assert go_on.wait(30)
        save_arrays(tmp_path, "t1", ARRAYS)  # opens the run in the background's own thread

    def read() -> None:
        assert open_checkpoint(tmp_path).tag == "t1"
        waited.set()

    background.start(work, run=tmp_path)
    reader = threading.Thread(target=read)
    reader.start()
    assert not waited.wait(0.05)
    go_on.set()
    assert waited.wait(30)
    reader.join()
    assert background.wait() is None


def test_readers_of_the_run_are_told_until_its_owner_is(tmp_path: Path) -> None:
    """Else they would get an older checkpoint than the one that was asked for."""
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        save_arrays(folder, "t1", ARRAYS)
    background: Background[None] = Background("a save")
    background.start(fail, run=f"{tmp_path}/./run/")
    join_all()
    for reader in (read_latest, open_checkpoint, lambda folder: check_last_save(f"file://{folder}")):
        with pytest.raises(CheckpointError, match=r"the last save into .*run failed: disk full; save again"):
            reader(run)
    assert open_checkpoint(run, "t1").tag == "t1", "an older one is there if it is named"
    assert read_latest(other) == "t1"
    with pytest.raises(CheckpointError):
        background.wait()
    assert read_latest(run) == "t1"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("run", "./run/", True),
        ("run", "file://run", True),
        ("local://run", Path("run"), True),
        ("run", "runs", False),
        ("s3://bucket/run", "s3://bucket/run/", True),
        ("s3://bucket/run", "gs://bucket/run", False),
        ("s3://bucket/run", "bucket/run", False),
    ],
    ids=str,
)
def test_names_of_one_run(one: Any, other: Any, same: bool) -> None:
    assert (identity(one) == identity(other)) == same


def test_a_link_to_a_run_is_the_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert identity(tmp_path / "link") == identity(tmp_path / "run")


def test_an_error_that_nobody_heard_of_fails_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exits: list[int] = []
    hooks: list[Callable[[], None]] = []
    monkeypatch.setattr("atexit.register", hooks.append)
    monkeypatch.setattr("os._exit", exits.append)
    background: Background[None] = Background("the last save")
    (at_exit,) = hooks
    at_exit()
    assert (exits, capsys.readouterr().err) == ([], "")
    background.start(fail, run=tmp_path)
    join_all()
    at_exit()
    assert (exits, capsys.readouterr().err) == ([1], "the last save failed: disk full\n")
    with pytest.raises(CheckpointError):
        background.wait()
    at_exit()
    assert exits == [1]


@pytest.mark.parametrize(("end", "code"), [("", 1), ("background._error = None", 0)], ids=["failed", "not"])
def test_the_exit_of_a_real_process(end: str, code: int) -> None:
    """The interpreter waits for the thread, which is still at work when the script is at its end."""
    script = f"""
import time
from ckpt.background import Background
background = Background("the last save")
def work():
    time.sleep(0.2)
    print("written")
    raise OSError("disk full")
background.start(work, run="run")
if {bool(end)}:
    background._thread.join()
{end}
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "written\n")
    assert done.stderr == ("the last save failed: disk full\n" if code else "")
