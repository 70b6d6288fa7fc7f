"""Exports of every format, stopped in the midst: nothing half gets its name, and nothing is replaced."""

import errno
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import answer, refused, run
from whole_arrays import save_whole

from ckpt.stores import files

FORMATS = {
    "safetensors": "--format safetensors",
    "torch": "--format torch",
    "several": "--format torch --max-shard-size 1MB",
    "dcp": "--format dcp --optimizer",
    "universal": "--format deepspeed-universal",
}
SINGLE = {"safetensors": "out.safetensors", "torch": "out.pt"}


def destination(tmp_path: Path, name: str) -> Path:
    return tmp_path / SINGLE.get(name, "out")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Run with an optimizer, with arrays of several bands."""
    random = np.random.default_rng(0)
    arrays = {
        (name, state): random.random((1200, 1000)).astype(np.float32)
        for name in ("a.w", "b.w")
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }
    optimizer = {
        "type": "AdamW",
        "groups": [{"params": ["a.w", "b.w"], "lr": 0.1}],
        "scalars": {"a.w": {"step": 2.0}, "b.w": {"step": 2.0}},
    }
    save_whole(tmp_path / "run", "t1", arrays, step=2, optimizer=optimizer)
    return tmp_path / "run"


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(write: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    """Return `write_at` that writes a half of the third band, and ends there."""
    calls = []

    def write_at(fd: int, buffer: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) == 3:
            write(fd, buffer[: len(buffer) // 2], offset)
            then()
        write(fd, buffer, offset)

    return write_at


@pytest.mark.parametrize("at", ["tensors", "pickle", "sync", "rename"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_nothing(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: str
) -> None:
    if at == "tensors":
        monkeypatch.setattr(files, "write_at", half(files.write_at, full))
    elif at == "pickle":
        monkeypatch.setattr(torch, "save", full)
    elif at == "sync":
        monkeypatch.setattr(files, "sync_tree", full)
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(os, "rename", full)
        monkeypatch.setattr(Path, "rename", full)
    arguments = ("export", stored, destination(tmp_path, name), *FORMATS[name].split())
    if name == "safetensors" and at == "pickle":
        answer(*arguments)
        return
    assert "No space left on device" in refused(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_kill_leaves_no_export(stored: Path, tmp_path: Path, name: str) -> None:
    """Only a hidden remainder is there, which the next attempt replaces or names."""
    out = destination(tmp_path, name)
    arguments = ("export", stored, out, *FORMATS[name].split())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that other tests' libraries leave
        child = os.fork()
    if child == 0:
        signal.alarm(60)  # rather than hang
        files.write_at = half(files.write_at, lambda: os._exit(9))
        run(*arguments)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run", f".{out.name}.tmp"}
    if name in SINGLE:
        answer(*arguments)
    else:
        assert "another process writes" in refused(*arguments)


@pytest.mark.parametrize("name", FORMATS)
def test_what_exists_is_not_replaced(stored: Path, tmp_path: Path, name: str) -> None:
    out = destination(tmp_path, name)
    out.write_text("mine")
    assert "exists; delete it" in refused("export", stored, out, *FORMATS[name].split())
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", FORMATS)
def test_damage_leaves_nothing(stored: Path, tmp_path: Path, name: str) -> None:
    (data,) = (stored / "t1" / "atoms" / "b.w" / "fp32").glob("c.*")
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    error = refused("export", stored, destination(tmp_path, name), *FORMATS[name].split())
    assert "b.w/fp32 chunk" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
