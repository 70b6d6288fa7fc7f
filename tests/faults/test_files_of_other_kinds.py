"""Pipes, devices, links and folders where a checkpoint has a file: told at once, never waited for."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from whole_arrays import save_whole

from ckpt import CheckpointError, export_safetensors, open_checkpoint, read_latest, verify
from ckpt.format import MOST_DOCUMENT_BYTES
from uni3d import zero_to_fp32

ARRAYS = {("w", "fp32"): np.arange(12, dtype=np.float32).reshape(4, 3)}
PLACES = ["latest", "t1/manifest.json", "t1/arrays.0.json", "t1/atoms/w/fp32/c.0.0"]


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def link(path: Path) -> None:
    """Put a link to the same bytes elsewhere in the place of a file."""
    shutil.move(path, elsewhere := path.parents[len(path.parts) - 1 - path.parts.index("run")] / "elsewhere")
    path.symlink_to(elsewhere)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


KINDS: dict[str, Callable[[Path], None]] = {"pipe": pipe, "device": device, "link": link, "folder": folder}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_whole(tmp_path / "run", "t1", ARRAYS)
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError("it was waited for")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_told(run: Path, tmp_path: Path, kind: str, place: str) -> None:
    KINDS[kind](run / place)
    with pytest.raises(CheckpointError, match=place):
        open_checkpoint(run).read("w")
    if place == "latest":
        return
    with pytest.raises(CheckpointError, match=place):
        export_safetensors(open_checkpoint(run, "t1"), tmp_path / "out.safetensors")
    if place != "t1/manifest.json":
        assert any(place in problem.path for problem in verify(open_checkpoint(run, "t1")))
    with pytest.raises((zero_to_fp32.UnreadableError, OSError)):
        zero_to_fp32.convert(run / "t1", tmp_path / "script", safe_serialization=True)


@pytest.mark.parametrize("place", ["t1/atoms", "t1/atoms/w", "t1/atoms/w/fp32"])
def test_a_folder_that_leads_elsewhere(run: Path, tmp_path: Path, place: str) -> None:
    shutil.move(run / place, tmp_path / "elsewhere")
    (run / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"symbolic link.* use another tag"):
        open_checkpoint(run).read("w")
    with pytest.raises(CheckpointError, match=r"symbolic link.* use another tag"):
        open_checkpoint(run / "t1").read("w")


def test_a_run_and_a_tag_may_be_links(run: Path, tmp_path: Path) -> None:
    shutil.move(run / "t1", tmp_path / "moved")
    (run / "t1").symlink_to(tmp_path / "moved")
    (tmp_path / "other").symlink_to(run)
    for way in (run, tmp_path / "other", run / "t1"):
        assert (open_checkpoint(way).read("w") == ARRAYS["w", "fp32"]).all()


def test_a_manifest_without_end_is_not_read(run: Path) -> None:
    with (run / "t1" / "manifest.json").open("r+b") as file:
        file.truncate(MOST_DOCUMENT_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"manifest.json can't be read: it has 1073741825 bytes"):
        open_checkpoint(run)


def test_a_part_is_read_as_far_as_it_is_recorded(run: Path) -> None:
    with (run / "t1" / "arrays.0.json").open("r+b") as file:
        file.truncate(1 << 34)
    with pytest.raises(CheckpointError, match=r"arrays.0.json can't be read: it has 17179869184 bytes"):
        open_checkpoint(run).read("w")


def test_latest_is_told_too(run: Path) -> None:
    pipe(run / "latest")
    with pytest.raises(CheckpointError, match="latest"):
        read_latest(run)
