"""Reads of boxes: how much is read, where it goes, and what is read of an object that is too long."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import same, save_arrays
from ckpt_saved import CountingStore

from ckpt import ArrayKey, Box, Checkpoint, CheckpointError, open_checkpoint
from ckpt.format import SLACK
from ckpt.read import pieces
from ckpt.threads import Scratch

W = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
ARRAYS = {("w", "fp32"): W, ("v", "value"): np.ones(3)}
PAYLOAD = 10 * 16 * 4
"""Bytes of each of the four chunks of `w`."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_arrays(tmp_path, "t1", ARRAYS, planning={"chunk_bytes": PAYLOAD})
    assert open_checkpoint(tmp_path).info("w", "fp32").grid.payload == PAYLOAD
    return tmp_path


class CountedScratch(Scratch):
    """Memory whose sizes are recorded."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, size: int) -> np.ndarray:
        self.taken.append(size)
        return super().take(size)


def counting(run: Path, window: int = 1 << 20) -> tuple[Checkpoint, CountingStore, CountedScratch]:
    checkpoint = open_checkpoint(run)
    checkpoint.info("w", "fp32")  # reads the part
    checkpoint.store, checkpoint._scratch = CountingStore(checkpoint.store), CountedScratch()
    checkpoint.store.window = window
    return checkpoint, checkpoint.store, checkpoint._scratch


@pytest.mark.parametrize(
    ("box", "spare"),
    [
        (Box((0, 0), (10, 16)), [0]),  # one whole chunk: nothing besides
        (Box((0, 0), (40, 16)), [0] * 4),
        (Box((13, 0), (2, 16)), [5 * 64]),  # rows: 3 before and 5 behind are only verified
        (Box((16, 0), (2, 16)), [6 * 64]),
        (Box((8, 0), (4, 16)), [8 * 64, 8 * 64]),  # of two chunks
        (Box((11, 4), (1, 8)), [8 * 64 + 16]),  # a part of one row is contiguous too
        (Box((10, 4), (2, 8)), [PAYLOAD]),  # columns aren't: a copy is made
        (Box((5, 5), (0, 3)), []),
    ],
    ids=str,
)
def test_what_is_contiguous_goes_to_its_place_and_only_the_rest_takes_memory(run, box, spare):
    checkpoint, store, scratch = counting(run)
    assert same(checkpoint.read("w", box=box), np.ascontiguousarray(W[box.slices]))
    assert scratch.taken == spare
    assert store.read_bytes == PAYLOAD * len(spare), "whole chunks, as they are verified"


@pytest.mark.parametrize("window", [1, 7, 64, PAYLOAD, PAYLOAD + 1])
def test_windows_of_any_size_read_the_same(run, window):
    checkpoint, _, _ = counting(run, window)
    for box in (Box((0, 0), (40, 16)), Box((13, 0), (2, 16)), Box((3, 2), (30, 5)), Box((5, 0), (6, 16))):
        assert same(checkpoint.read("w", box=box), np.ascontiguousarray(W[box.slices]))


@pytest.mark.parametrize("size", [None, 0, 100, 300])
def test_nothing_is_read_after_the_first_fault(run, size):
    """Three parts are read in windows: what lies before the box, the box, and what lies behind it."""
    (path,) = (run / "t1/atoms/w/fp32").glob("c*")
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    checkpoint, store, _ = counting(run, 64)
    with pytest.raises(
        CheckpointError,
        match=r"w/fp32 chunk \[0, 0\]: .*(read \(No such file or directory\)|cut short at \d+ bytes); use",
    ):
        checkpoint.read("w", box=Box((3, 0), (2, 16)))
    calls = [call for call, _ in store.calls]
    assert calls == ["read_into"] * ((size or 0) // 64 + 1) + ["size"] * (size is not None)


def test_the_bytes_read_are_told(run):
    checkpoint, out = open_checkpoint(run), np.empty((12, 4), np.float32)
    info = checkpoint.info("w", "fp32")
    box = Box((9, 3), (12, 4))
    assert [checkpoint.read_piece(piece, out) for piece in pieces(info, box)] == [PAYLOAD] * 3
    assert same(out, np.ascontiguousarray(W[box.slices]))


def test_of_a_document_that_is_too_long_no_more_is_read_than_tells_so(run):
    with (run / "t1" / "arrays.0.json").open("ab") as file:
        file.write(bytes(SLACK))
    with pytest.raises(CheckpointError, match=r"arrays.0.json is damaged: its checksum isn't the manifest's"):
        open_checkpoint(run).read("w")
    with (run / "t1" / "arrays.0.json").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(
        CheckpointError, match=r"arrays.0.json can't be read: it has \d+ bytes, where at most"
    ):
        open_checkpoint(run).read("w")


def test_the_arrays_are_a_mapping(run):
    arrays = open_checkpoint(run).arrays
    assert len(arrays) == 2
    assert dict(arrays).keys() == {ArrayKey("w", "fp32"), ArrayKey("v", "value")}
    assert ("w", "fp32") in arrays
    assert ("w", "exp_avg") not in arrays
    assert arrays.get(ArrayKey("w", "exp_avg")) is None


def test_names_of_objects_are_full(run):
    whole, own = open_checkpoint(run), open_checkpoint(run / "t1")
    for checkpoint in (whole, own):
        assert checkpoint.url == f"{run}/t1"
        assert checkpoint.where("zarr.json") == f"{run}/t1/zarr.json"
    assert (whole.path(""), whole.path("a/b")) == ("t1", "t1/a/b")
    assert (own.path(""), own.path("a/b")) == ("", "a/b")


def test_a_copy_keeps_the_tag_that_it_was_saved_under(run):
    """So a folder that was mixed up isn't taken for another one, unless it is asked for by its own name."""
    shutil.copytree(run / "t1", run / "t2")
    with pytest.raises(
        CheckpointError, match=r"t2/manifest.json has the tag 't1', not 't2': the checkpoint was"
    ):
        open_checkpoint(run, "t2")
    for copy in (open_checkpoint(run, "t2", renamed=True), open_checkpoint(run / "t2")):
        assert copy.saved_as == "t1"
        assert copy.tag == ("t2" if copy.folder else "t1")
        assert same(copy.read("w"), W)
    assert open_checkpoint(run, "t1", renamed=True).tag == "t1"
