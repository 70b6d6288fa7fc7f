"""Runs in an S3 server that does what S3 may do, and what fsspec's memory doesn't."""

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ckpt_helpers import Arrays, check_read, save_arrays
from marks import slow
from object_store import Fault, ObjectStore

from ckpt import CheckpointError, Retention, clean, committed_tags, open_checkpoint, open_store, prune, verify
from ckpt.format import MANIFEST
from ckpt.stores.remote import RemoteStore

W = ("w", "fp32")
OLD: Arrays = {W: np.arange(600, dtype=np.float32).reshape(20, 30), ("step", "value"): np.array(1)}
NEW: Arrays = {W: OLD[W] + 1, ("step", "value"): np.array(2)}


@pytest.fixture
def run(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An unused place. No sign of life is among its requests, so that they can be counted."""
    monkeypatch.setattr(RemoteStore, "beat_seconds", 3600.0)
    yield f"{object_store.url}/{uuid.uuid4().hex}"
    object_store.put_back({})


def test_each_object_of_a_save_is_put_once_and_nothing_is_compared(
    object_store: ObjectStore, run: str
) -> None:
    save_arrays(run, "t1", OLD)
    with object_store.sick(None) as requests:
        save_arrays(run, "t2", OLD)
    put = [request for request in requests if request.startswith("PUT") and "/t2/" in request]
    assert len(put) == len({*put}) > 5
    compared = [request for request in requests if "/t1/" in request and MANIFEST not in request]
    assert compared == [], "no object has a second name, so none need be compared"


def test_an_empty_array_and_an_empty_file(run: str, tmp_path: Any) -> None:
    arrays = {**OLD, ("none", "value"): np.empty((0, 3), np.float32)}
    save_arrays(run, "t1", arrays, files={"note.txt": b""})
    check_read(run, "t1", arrays, tmp_path)
    assert open_checkpoint(run).document("note.txt") == b""


@pytest.mark.parametrize("kind", ["403", slow("503"), slow("unread")])
def test_an_error_names_the_object(object_store: ObjectStore, run: str, kind: str) -> None:
    store = open_store(run)
    calls = (lambda: store.read("a/b"), lambda: store.write("a/b", [b"x"], durable=True))
    with object_store.sick(Fault(kind, forever=True)):
        for call in calls:
            with pytest.raises(OSError, match=f"'{run}/a/b'"):
                call()
        with pytest.raises(CheckpointError, match=f"{run} can't be read: [a-zA-Z]{{4}}"):
            committed_tags(run)


def test_a_committed_tag_that_listings_do_not_show_is_not_overwritten(
    object_store: ObjectStore, run: str, tmp_path: Any
) -> None:
    with object_store.sick(Fault("stale listings", forever=True, lag=1000)):
        save_arrays(run, "t1", OLD)
        assert committed_tags(run) == [], "they show an empty bucket"
        with pytest.raises(CheckpointError, match="t1 is a checkpoint, and nothing can be replaced"):
            save_arrays(run, "t1", NEW)
    check_read(run, "t1", OLD, tmp_path)


def test_a_marker_that_is_listed_but_gone_deletes_nothing(run: str, monkeypatch: Any) -> None:
    save_arrays(run, "t1", OLD)
    store = open_store(run)
    monkeypatch.setattr(store, "names", lambda: [".deleting.t1", ".saving.t1", "latest", "t1"])
    store.clean()
    assert verify(open_checkpoint(run, "t1")) == []


def test_objects_that_the_store_does_not_remove(object_store: ObjectStore, run: str) -> None:
    """S3 tells of them in an answer that says 200, and fsspec keeps quiet."""
    save_arrays(run, "t1", OLD)
    save_arrays(run, "t2", NEW)
    with object_store.sick(Fault("deletion in parts", forever=True)):
        prune(run, Retention(keep_last=1))
    assert (committed_tags(run), open_store(run).leftovers()) == (["t2"], [".deleting.t1"])
    assert clean(run) == [".deleting.t1"]
    save_arrays(run, "t1", NEW)
    assert committed_tags(run) == ["t2", "t1"]


def request_of(object_store: ObjectStore, run: str, what: str) -> int:
    """Return the number of a put in a save into an empty run."""
    with object_store.sick(None) as requests:
        save_arrays(f"{run}-before", "t1", OLD)
    (k,) = [i for i, request in enumerate(requests, start=1) if re.fullmatch(f"PUT .*{what}", request)]
    return k


def test_a_manifest_that_is_put_when_the_save_has_failed(run: str, tmp_path: Any) -> None:
    """Its client had given it up, and said so. Readers get errors, and the next save removes it."""
    real, late = RemoteStore.put_new, list[Callable[[], None]]()

    def put(store: RemoteStore, path: str, content: bytes) -> None:
        if not path.endswith(MANIFEST):
            return real(store, path, content)
        late.append(lambda: real(store, path, content))
        raise OSError(f"no answer for {path}")

    refused = pytest.raises(CheckpointError, match=r"no answer for t1/manifest\.json")
    with mock.patch.object(RemoteStore, "put_new", put), refused:
        save_arrays(run, "t1", OLD)
    assert committed_tags(run) == []
    late.pop()()
    with pytest.raises(CheckpointError, match="can't be read"):
        open_checkpoint(run, "t1").read(*W)
    save_arrays(run, "t2", NEW)
    assert (committed_tags(run), open_store(run).names()) == (["t2"], ["latest", "t2"])
    save_arrays(run, "t1", NEW)
    check_read(run, "t1", NEW, tmp_path)


def test_a_copy_in_the_place_of_a_save_that_has_failed_is_left(
    object_store: ObjectStore, run: str, tmp_path: Any
) -> None:
    k = request_of(object_store, run, "t1/zarr.json")
    with object_store.sick(Fault("403", k)), pytest.raises(CheckpointError):
        save_arrays(run, "t1", OLD)
    assert open_store(run).leftovers() == [".saving.t1"]
    name = run.removeprefix("s3://")
    open_store(run)._fs.cp(f"{name}-before/t1", f"{name}/t1", recursive=True)  # type: ignore[attr-defined]
    clean(run)
    assert open_store(run).names() == ["t1"]
    check_read(run, "t1", OLD, tmp_path)


PART = 5 << 20
"""S3's least size of a part."""


@pytest.mark.parametrize("kind", ["500", slow("answer lost")])
def test_an_object_in_several_requests_is_whole_or_not_there(
    object_store: ObjectStore, run: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that can't be put doesn't end the object before its end, and no part of it is kept."""
    monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", PART)
    store, parts = open_store(run), [bytes([i]) * (PART // 2 + 1) for i in range(5)]
    with object_store.sick(None) as requests:
        store.write("whole", parts, durable=True)
    assert store.size("whole") == sum(map(len, parts))
    for k in range(1, len(requests) + 1):
        with object_store.sick(Fault(kind, k)):
            try:
                store.write("o", parts, durable=True)
            except OSError:
                assert kind != "500" or not store.exists("o"), requests[k - 1]
        assert not store.exists("o") or store.read("o") == b"".join(parts)
        assert kind != "500" or object_store.uploads() == [], requests[k - 1]
        if store.exists("o"):
            store.remove("o")  # type: ignore[attr-defined]
    assert len(requests) == 5  # to begin, three parts, to end
