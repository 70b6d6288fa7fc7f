"""The contract of a store, as tests that anyone can run on a place of their own. Needs pytest.

    import pytest
    from ckpt import open_store
    from ckpt.testing import StoreTests

    class TestMyPlace(StoreTests):
        @pytest.fixture
        def store(self, tmp_path):
            return open_store(f"mine://{tmp_path}")      # a protocol that fsspec knows

A place that passes holds checkpoints: a tag exists from its commit, whole, and until its deletion; nobody's
objects but those of dead saves are removed.
"""

from __future__ import annotations

from typing import Any

import pytest

from ckpt import CheckpointError, committed_tags, read_latest
from ckpt.checksums import Buffer
from ckpt.stores import Store

MANIFEST = {"manifest.json": b"{}"}
LEFTOVERS = [".deleting.t2", ".saving.t1"]
OTHERS = [".saving.", ".deleting.", ".saving.latest", ".saving...", ".saving.a b", ".savings", "saving.t1"]


class StoreTests:
    """Tests that every store must pass.

    Subclasses define the fixture `store`, of an empty place. Where there are no folders, as in object stores,
    they override `leave`.
    """

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError("a subclass makes the store")  # pragma: no cover - each of ours has one

    def put(self, store: Store, path: str, *parts: Buffer) -> None:
        store.make_folders([path.rpartition("/")[0]] if "/" in path else [])
        store.write(path, parts, durable=False)

    def commit(self, store: Store, tag: str, content: bytes = b"", *, update_latest: bool = True) -> None:
        store.begin(tag, "token")
        self.put(store, f"{store.staging(tag, 'token')}/atoms/c", content)
        store.commit(tag, "token", MANIFEST, durable=False, update_latest=update_latest)

    # --- objects ---------------------------------------------------------------------------------------

    def test_an_object_is_its_parts_in_order(self, store: Store) -> None:
        self.commit(store, "t0")  # makes the run's folder
        self.put(store, "notes/o", b"abc", b"", memoryview(b"defg"))
        assert store.read("notes/o") == b"abcdefg"
        assert (store.size("notes/o"), store.exists("notes/o"), store.exists("notes")) == (7, True, True)
        assert store.names() == ["latest", "notes", "t0"]

    @pytest.mark.parametrize(("offset", "length", "expected"), [(0, 7, 7), (2, 3, 3), (5, 9, 2), (7, 1, 0)])
    def test_a_read_stops_at_the_end(self, store: Store, offset: int, length: int, expected: int) -> None:
        self.commit(store, "t0", b"abcdefg")
        buffer = bytearray(length)
        assert store.read_into("t0/atoms/c", memoryview(buffer), offset) == expected
        assert buffer[:expected] == b"abcdefg"[offset : offset + length]

    def test_an_empty_object_is_read(self, store: Store) -> None:
        self.commit(store, "t0")
        assert (store.read("t0/atoms/c"), store.read("t0/atoms/c", 10)) == (b"", b"")
        assert store.read_into("t0/atoms/c", memoryview(bytearray(4)), 0) == 0

    def test_an_empty_place_has_no_objects(self, store: Store) -> None:
        assert (store.names(), store.exists("o"), store.leftovers(), store.clean()) == ([], False, [], [])
        for call in (store.read, store.size, lambda path: store.read_into(path, memoryview(bytearray(1)), 0)):
            with pytest.raises(FileNotFoundError):
                call("o")

    def test_a_link_is_a_second_name_of_the_same_bytes(self, store: Store) -> None:
        self.commit(store, "t1", b"abc")
        store.begin("t2", "token")
        self.put(store, f"{store.staging('t2', 'token')}/atoms/other", b"")
        linked = store.link("t1/atoms/c", f"{store.staging('t2', 'token')}/atoms/c")
        assert store.exists(f"{store.staging('t2', 'token')}/atoms/c") == linked
        assert not linked or store.read(f"{store.staging('t2', 'token')}/atoms/c") == b"abc"

    @pytest.mark.parametrize(
        ("offset", "parts", "same"),
        [
            (0, [b"abc", b"def"], True),
            (0, [b"ab", b"", b"c"], True),
            (2, [b"cd", b"ef"], True),
            (0, [b"abd"], False),
            (2, [b"cd", b"eg"], False),
            (1, [b"ab"], False),
            (4, [b"ef", b"g"], False),
            (6, [b"g"], False),
        ],
    )
    def test_bytes_are_compared_in_their_place(
        self, store: Store, offset: int, parts: list[bytes], same: bool
    ) -> None:
        self.commit(store, "t1", b"abcdef")
        links = store.link("t1/atoms/c", "t1/atoms/d")
        assert store.same("t1/atoms/c", offset, parts) == (same and links), "of use only where links are"

    # --- a checkpoint from its first object to its end -------------------------------------------------

    def test_a_checkpoint_exists_from_its_commit(self, store: Store) -> None:
        store.begin("t1", "token")
        assert store.begun("t1", "token")
        assert not store.begun("t1", "another")
        self.put(store, f"{store.staging('t1', 'token')}/atoms/c", b"abc")
        store.sync("t1", "token")
        assert (committed_tags(store), read_latest(store)) == ([], None)
        store.commit("t1", "token", {"zarr.json": b"z", **MANIFEST}, durable=True, update_latest=True)
        assert (committed_tags(store), read_latest(store)) == (["t1"], "t1")
        assert [store.read(f"t1/{name}") for name in ("zarr.json", "atoms/c")] == [b"z", b"abc"]
        assert store.names() == ["latest", "t1"], "nothing of the save itself is left"
        assert not store.begun("t1", "token")

    def test_latest_moves_only_if_asked_to(self, store: Store) -> None:
        self.commit(store, "t1")
        self.commit(store, "t2", update_latest=False)
        assert (read_latest(store), committed_tags(store)) == ("t1", ["t1", "t2"])

    def test_commits_are_ordered_by_time(self, store: Store) -> None:
        for tag in ("t2", "t1"):
            self.commit(store, tag)
        assert store.committed_at("t2") <= store.committed_at("t1")

    def test_an_abandoned_save_leaves_no_more_than_its_marker(self, store: Store) -> None:
        self.commit(store, "t1", b"old")
        store.begin("t2", "token")
        self.put(store, f"{store.staging('t2', 'token')}/atoms/c", b"new")
        store.abandon("t2", "token")
        assert {*store.names()} - {*store.leftovers()} == {"latest", "t1"}
        store.clean()
        assert store.names() == ["latest", "t1"]
        assert store.read("t1/atoms/c") == b"old"

    def test_a_save_that_another_one_has_overtaken(self, store: Store) -> None:
        """An old job that is still writing when the resumed one saves its tag commits and deletes nothing."""
        store.begin("t1", "old")
        store.begin("t1", "new")
        self.put(store, f"{store.staging('t1', 'new')}/atoms/c", b"of the new one")
        with pytest.raises(CheckpointError, match=r"another save has begun since this one of .*t1 did"):
            store.commit("t1", "old", MANIFEST, durable=False, update_latest=True)
        store.abandon("t1", "old")
        assert committed_tags(store) == []
        assert store.read(f"{store.staging('t1', 'new')}/atoms/c") == b"of the new one"

    def test_a_deleted_checkpoint_is_gone(self, store: Store) -> None:
        self.commit(store, "t1")
        self.commit(store, "t2")
        store.delete("t1")
        assert committed_tags(store) == ["t2"]
        assert store.names() == ["latest", "t2"]

    def test_only_what_is_named_after_a_tag_is_a_leftover(self, store: Store) -> None:
        self.commit(store, "s1")
        for name in LEFTOVERS + OTHERS:
            self.leave(store, name)
        assert store.leftovers() == LEFTOVERS
        assert store.clean() == LEFTOVERS
        self.commit(store, "s2")
        assert {*store.names()} == {*OTHERS, "s1", "s2", "latest"}

    def leave(self, store: Store, name: str) -> None:
        """Leave behind what a crashed save or deletion of this name would."""
        self.put(store, f"{name}/atoms/c", b"x")

    def test_a_user_s_folder_is_never_replaced(self, store: Store) -> None:
        self.commit(store, "t0")
        self.put(store, "notes/todo.txt", b"mine")
        with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
            store.begin("notes", "token")
        store.clean()
        assert store.read("notes/todo.txt") == b"mine"
