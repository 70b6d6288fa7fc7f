"""Beginning and end of a save, as rank 0 makes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import same, save_arrays

from ckpt import CheckpointError, Retention, committed_tags, open_checkpoint, open_store, read_latest
from ckpt.array_files import file_grid
from ckpt.begin import Begun, Wish, begin
from ckpt.commit import Planned, Record, described
from ckpt.shards import ArrayKey
from ckpt.stores import Store
from ckpt.stores.local import LocalStore

ARRAYS = {("w", "fp32"): np.ones(3, np.float32)}
OTHER = {("w", "fp32"): np.zeros(3, np.float32)}
TOKEN = "a" * 32


def begun(store: Store, tag: str, *, incremental: bool = True, **changes: bool) -> Begun:
    asked = Wish(tag, TOKEN, None, **{"durable": False, "update_latest": True, **changes})
    try:
        found = begin(store, asked, incremental=incremental)
        assert store.begun(tag, TOKEN)
        assert json.loads(store.read(".writer"))["what"] == f"saving {tag}"
        store.abandon(tag, TOKEN)
        return found
    finally:
        store.release()


def test_what_a_save_knows_from_its_beginning(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert begun(store, "t1") == Begun(TOKEN, None, False, 1, True)
    assert not begun(store, "t1", update_latest=False).first, "it isn't to be named"
    save_arrays(tmp_path, "t1", ARRAYS)
    assert begun(store, "t2") == Begun(TOKEN, "t1", False, 2, False)
    assert not begun(store, "t2", update_latest=False).first
    assert begun(store, "t2", incremental=False).base is None
    (tmp_path / "latest").write_text("gone")
    assert begun(store, "t2") == Begun(TOKEN, None, False, 2, False), "then everything is written"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_what_replaces_a_durable_one_is_durable(tmp_path: Path, before: bool, asked: bool) -> None:
    save_arrays(tmp_path, "t1", ARRAYS, durable=before)
    store = open_store(tmp_path)
    assert begun(store, "t1", durable=asked).durable == (before or asked)
    assert begun(store, "t2", durable=asked).durable == asked


@pytest.mark.parametrize("asks", ["begin", "commit"])
def test_both_ends_look_whose_checkpoint_they_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    """It may have come since the beginning."""
    save_arrays(tmp_path, "t1", ARRAYS, document={"run_id": "a"})
    for place in {"begin", "commit"} - {asks}:
        monkeypatch.setattr(f"ckpt.{place}.check_owner", lambda *args: None)
    with pytest.raises(CheckpointError, match=r"t1 was saved by another run"):
        save_arrays(tmp_path, "t1", OTHER, document={"run_id": "b"})
    assert same(open_checkpoint(tmp_path).read("w"), ARRAYS["w", "fp32"])
    assert {path.name for path in tmp_path.iterdir()} == {"t1", "latest"}


def test_a_save_that_is_not_to_be_named_deletes_nothing(tmp_path: Path) -> None:
    for tag in ("t1", "t2"):
        save_arrays(tmp_path, tag, ARRAYS)
    keep = {"retention": Retention(keep_last=1), "durable": True}
    assert save_arrays(tmp_path, "t3", ARRAYS, update_latest=False, **keep).pruned == ()
    assert (committed_tags(tmp_path), read_latest(tmp_path)) == (["t1", "t2", "t3"], "t2")
    assert save_arrays(tmp_path, "t4", ARRAYS, **keep).pruned == ("t1", "t2", "t3")


def test_only_the_first_that_is_to_be_named_says_so_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit comes before `latest`, and there is no older one to fall back to."""
    written, commit = [], LocalStore.commit

    def noted(store: LocalStore, tag: str, token: str, documents: Any, **more: Any) -> None:
        written.append([tag, *documents])
        commit(store, tag, token, documents, **more)

    monkeypatch.setattr(LocalStore, "commit", noted)
    for tag, named in (("t0", False), ("t1", True), ("t2", True)):
        save_arrays(tmp_path, tag, ARRAYS, update_latest=named)
    last = ["zarr.json", "arrays.0.json", "manifest.json"]
    assert written == [["t0", *last], ["t1", *last[:2], ".latest", last[2]], ["t2", *last]]


def test_what_the_deletion_says_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep = {"retention": Retention(keep_last=1), "durable": True}
    monkeypatch.setattr("ckpt.commit.delete_old", lambda *args, **more: (["t0"], [f"{tmp_path}/x stays"]))
    assert save_arrays(tmp_path, "t1", ARRAYS, **keep).pruned == ("t0",)
    assert [record.message for record in caplog.records] == [f"{tmp_path}/x stays"]

    def damaged(*args: Any, **more: Any) -> None:
        raise CheckpointError("latest is damaged")

    monkeypatch.setattr("ckpt.commit.delete_old", damaged)
    with pytest.raises(CheckpointError, match=r"t2 is committed, but: latest is damaged"):
        save_arrays(tmp_path, "t2", ARRAYS, **keep)
    assert committed_tags(tmp_path) == ["t1", "t2"]
    monkeypatch.setattr("ckpt.commit.delete_old", None)
    assert save_arrays(tmp_path, "t3", ARRAYS).pruned == (), "nothing is asked for"


def planned(name: str, *writers: int) -> Planned:
    grid = file_grid((len(writers),), (1,), (len(writers),), 4)
    return Planned(ArrayKey(name, "fp32"), "float32", grid, np.array(writers, np.int32))


def test_each_chunk_gets_the_checksum_of_its_writer() -> None:
    """Two plans: of ranks 0 and 1, and of ranks 2 and 3."""
    sums = [np.array(values, np.uint32) for values in ([1, 2, 3], [11, 12], [21], [31, 32])]
    first, second = [planned("a", 1, 0, 0), planned("b", 0, 1)], [planned("c", 3, 2, 3)]
    arrays = first, None, second, None
    records = [Record(s, 0, 0, a) for s, a in zip(sums, arrays, strict=True)]
    groups = [{i.key.atom: i.sums.tolist() for i in group} for group in described(records)]
    assert groups == [{"a": [11, 1, 2], "b": [3, 12]}, {"c": [31, 21, 32]}]
    with pytest.raises(AssertionError, match="left out, or written twice"):
        described([*records[:3], records[3]._replace(sums=sums[3][:1])])  # numpy would take it for both
    with pytest.raises(AssertionError, match="left out, or written twice"):
        described([*records[:3], records[3]._replace(sums=np.arange(3, dtype=np.uint32))])
    twice = [planned("c", 0, 0, 0)]
    records[0], records[1] = Record(sums[0], 0, 0, twice), Record(np.empty(0, np.uint32), 0, 0, None)
    with pytest.raises(AssertionError, match="c/fp32 is in the plans of ranks that don't know each other"):
        described(records)
