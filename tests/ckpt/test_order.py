"""Heads of manifests, the order that they give, and the number of the next commit."""

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ckpt_helpers import save_arrays
from ckpt_saved import CountingStore

from ckpt import open_store
from ckpt.order import Head, head_of, heads_of, next_commit, note_commit
from ckpt.stores import Store
from ckpt.stores.local import LocalStore

ARRAYS = {("w", "fp32"): np.ones(3, np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path)


def put(store: Store, tag: str, *lines: str) -> None:
    """Put a manifest that has these lines behind its first."""
    folder = Path(store.url) / tag
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text("\n".join(['{"crc32c": "00000000",', *lines, "}"]))


def numbered(store: Store, tag: str, commit: int, created: str = "") -> None:
    put(store, tag, f' "tag": "{tag}",', f' "commit": {commit},', f' "created": "{created}",')


def test_a_head_is_what_the_first_lines_say(store: Store) -> None:
    lines = [' "tag": "t1",', ' "commit": 7,', ' "durable": false,', ' "step": 12,']
    put(store, "t1", *lines, ' "created": "2026-01-02",', ' "run_id": "a",')
    when = store.committed_at("t1")
    assert head_of(store, "t1") == Head("t1", True, 7, False, 12, "2026-01-02", "a", when)
    assert head_of(store, "t2") is None
    put(store, "t2", *lines)
    head = head_of(store, "t2")
    assert head is not None
    assert (head.tag, head.own, head.run_id, head.created) == ("t2", False, None, "")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [' "tag": 3,', ' "commit": "7",', ' "durable": 0,', ' "step": true,', ' "run_id": 5,'],
        [' "tag": 007,', ' "commit": 007,', ' "step": -1,', ' "run_id": false', ' "commit": 1.5,'],
        ['{"tag": "t1", "commit": 7}', ' "commit": [7],', "x" * 5000, ' "commit": 7,', ' "tag": "t1",'],
    ],
    ids=["nothing", "types", "numbers", "places"],
)
def test_a_head_that_says_nothing_else(store: Store, lines: list[str]) -> None:
    put(store, "t1", *lines)
    expected = Head("t1", False, 0, True, 0, "", None, store.committed_at("t1"))
    head = head_of(store, "t1")
    assert head is not None
    assert head._replace(created="") == expected


def test_of_two_lines_the_first_counts(store: Store) -> None:
    put(store, "t1", ' "commit": 7,', ' "commit": 8,', ' "durable": true,', ' "durable": false,')
    head = head_of(store, "t1")
    assert head is not None
    assert (head.commit, head.durable) == (7, True)


def test_a_manifest_that_cannot_be_read_is_an_error_unless_it_is_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for the oldest, or for nobody's, a checkpoint could be deleted or replaced."""
    for number, tag in enumerate(("t1", "t2", "t3"), 1):
        numbered(store, tag, number)
    read, told = LocalStore.read_into, list[str]()

    def broken(self: LocalStore, path: str, *more: Any) -> int:
        if path.startswith("t3/"):
            raise OSError("no answer")
        return read(self, path, *more)

    monkeypatch.setattr(LocalStore, "read_into", broken)
    with pytest.raises(OSError, match="no answer"):
        heads_of(store)
    heads = heads_of(store, unseen=lambda tag, error: told.append(tag))
    assert ([head.tag for head in heads], told) == (["t1", "t2"], ["t3"])


def test_what_may_not_be_seen_is_an_error_unless_it_is_asked_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, tag in enumerate(("t1", "t2", "t3"), 1):
        numbered(store, tag, number)
    exists, told = LocalStore.exists, []

    def hidden(self: LocalStore, path: str) -> bool:
        if path.startswith("t2"):
            raise PermissionError(13, "Permission denied", path)
        return exists(self, path)

    monkeypatch.setattr(LocalStore, "exists", hidden)
    with pytest.raises(PermissionError):
        heads_of(store)
    heads = heads_of(store, unseen=lambda name, error: told.append((name, error.errno)))
    assert [head.tag for head in heads] == ["t1", "t3"]
    assert told == [("t2", 13)]


@pytest.mark.parametrize(
    ("manifests", "order"),
    [
        ([("a", 3, "5"), ("b", 1, "9"), ("c", 2, "")], "bca"),
        # Without a number: before the first of those with one that is no older.
        ([("a", 1, "1"), ("b", 2, "3"), ("c", 0, "2")], "acb"),
        ([("a", 1, "1"), ("b", 2, "3"), ("c", 0, "3")], "acb"),
        ([("a", 1, "1"), ("b", 2, "3"), ("c", 0, "4")], "abc"),
        ([("a", 1, "1"), ("b", 2, "3"), ("c", 0, "0")], "cab"),
        (
            [("a", 1, "5"), ("b", 2, "3"), ("c", 0, "2"), ("d", 0, "4"), ("e", 0, "6"), ("f", 0, "7")],
            "cdabef",
        ),
    ],
    ids=str,
)
def test_numbers_decide_and_then_time(
    store: Store, manifests: list[tuple[str, int, str]], order: str
) -> None:
    for tag, commit, created in manifests:
        if commit:
            numbered(store, tag, commit, created)
        else:
            put(store, tag, f' "created": "{created}",')
    assert "".join(head.tag for head in heads_of(store)) == order


def test_steps_decide_only_beside_a_time() -> None:
    """Times of files are last, as copying changes them, but better than steps of who knows which run."""
    old = Head("a", True, 0, True, 9, "", None, 1.0)
    assert old.age < old._replace(step=3, committed_at=2.0).age
    dated = old._replace(created="2026")
    assert dated.age > dated._replace(step=3, committed_at=2.0).age
    assert old.age < old._replace(tag="b").age


def test_the_next_number_is_one_more_than_the_largest(store: Store) -> None:
    assert next_commit(store, []) == 1
    for tag, number in (("t1", 4), ("t2", 9), ("t3", 2)):
        numbered(store, tag, number)
    put(store, "copy", ' "step": 20,')
    assert next_commit(store, store.names()) == 10
    assert next_commit(store, ["t1", "t3", "copy"]) == 5, "those that are gone don't count"
    assert next_commit(store, ["copy"]) == 1


def test_manifests_without_a_number_and_what_is_none_count_for_nothing(store: Store) -> None:
    put(store, "t1", ' "commit": "8",')
    (Path(store.url) / "t2").mkdir()
    assert next_commit(store, store.names()) == 1


def test_no_manifest_is_read_twice_but_those_without_a_number(store: Store) -> None:
    counting: Any = CountingStore(store)
    numbered(store, "t1", 4)
    (Path(store.url) / "t9").mkdir()
    names = [*store.names(), "latest", ".saving.t3", "a b"]
    assert next_commit(counting, names) == 5
    assert sorted(path for _, path in counting.calls) == ["t1/manifest.json", "t9/manifest.json"]
    numbered(store, "t9", 11)  # another process's save of it has ended
    counting.calls.clear()
    assert next_commit(counting, names) == 12
    assert [path for _, path in counting.calls] == ["t9/manifest.json"]
    counting.calls.clear()
    assert next_commit(counting, names) == 12
    assert counting.calls == []


def test_what_this_process_has_saved_is_known(tmp_path: Path) -> None:
    for tag in ("t1", "t2"):
        save_arrays(tmp_path, tag, ARRAYS)
    counting: Any = CountingStore(open_store(tmp_path))
    assert next_commit(counting, ["t1", "t2"]) == 3
    assert counting.calls == []


def test_what_is_known_of_one_run_is_not_taken_for_another_s(tmp_path: Path) -> None:
    one, other = (open_store(f"memory://{uuid.uuid4().hex}") for _ in range(2))
    note_commit(one, "t1", 7)
    assert (next_commit(one, ["t1"]), next_commit(other, ["t1"])) == (8, 1)
