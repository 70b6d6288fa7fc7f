"""The contract of `ckpt.stores.Store`, kept by every store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ckpt import CheckpointError, committed_tags, open_store, read_latest
from ckpt.stores import Store
from ckpt.stores.remote import RemoteStore

MANIFEST = {"manifest.json": b"{}"}
LEFTOVERS = [".deleting.t2", ".saving.t1"]
OTHERS = [".saving.", ".deleting.", ".saving.latest", ".saving...", ".saving.a b", ".savings", "saving.t1"]


class StoreTests:
    """Tests that every store must pass; subclasses define the fixture `store`, of an empty place."""

    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError("a subclass makes the store")

    def put(self, store: Store, path: str, *parts: bytes) -> None:
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

    def test_an_abandoned_save_leaves_nothing(self, store: Store) -> None:
        self.commit(store, "t1", b"old")
        store.begin("t2", "token")
        self.put(store, f"{store.staging('t2', 'token')}/atoms/c", b"new")
        store.abandon("t2", "token")
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


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(tmp_path / "run")

    def test_a_file_is_no_leftover(self, store: Store) -> None:
        self.commit(store, "t1")
        store.write(".saving.t2", [b"a user's"], durable=False)
        assert store.clean() == []

    def test_several_write_one_file(self, store: Store) -> None:
        """The order doesn't matter, and what none of them writes is zeros."""
        assert store.shares_files
        self.commit(store, "t1")
        store.write_into("t1/c", [(6, [b"gh", b"i"]), (12, [b"end"])], durable=True)
        store.write_into("t1/c", [(0, [b"abc"])], durable=False)
        assert store.read("t1/c") == b"abc\0\0\0ghi\0\0\0end"

    def test_a_file_of_another_checkpoint_is_never_written(self, store: Store) -> None:
        self.commit(store, "t1", b"abc")
        assert store.link("t1/atoms/c", "t1/d")
        for path in ("t1/atoms/c", "t1/d"):
            with pytest.raises(FileExistsError, match="is linked to another checkpoint's file"):
                store.write_into(path, [(0, [b"x"])], durable=False)
            with pytest.raises(FileExistsError):
                store.write(path, [b"x"], durable=False)
        assert store.read("t1/d") == b"abc"

    def test_neither_a_link_nor_a_copy_replaces_a_file(self, store: Store) -> None:
        self.commit(store, "t1", b"old")
        self.put(store, "t1/d", b"another rank's")
        for call in (store.link, store.copy):
            with pytest.raises(FileExistsError):
                call("t1/atoms/c", "t1/d")
        assert store.read("t1/d") == b"another rank's"

    def test_a_copy_is_a_file_of_its_own(self, store: Store) -> None:
        self.commit(store, "t1", b"abc")
        store.copy("t1/atoms/c", "t1/d")
        store.write_into("t1/d", [(1, [b"x"])], durable=False)
        assert (store.read("t1/atoms/c"), store.read("t1/d")) == (b"abc", b"axc")

    @pytest.mark.parametrize(("length", "number"), [(5000, 3), (2, 2000), (300_000, 4)])
    def test_many_parts(self, store: Store, length: int, number: int) -> None:
        """More than one system call takes, small and large ones."""
        parts = [bytes([i % 251]) * length for i in range(number)]
        self.commit(store, "t1")
        store.write("t1/c", iter(parts), durable=False)
        store.write_into("t1/d", [(10, iter(parts))], durable=False)
        assert store.read("t1/c") == b"".join(parts)
        assert store.read("t1/d") == bytes(10) + b"".join(parts)


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self, memory_url: str) -> Store:
        return open_store(memory_url)

    def leave(self, store: Store, name: str) -> None:
        self.put(store, name, b"x")  # a marker is an object of this name

    @pytest.mark.parametrize("sizes", [[], [10], [4, 6], [3, 3, 3]], ids=str)
    def test_a_small_object_is_one_request(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
    ) -> None:
        monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 10)
        assert isinstance(store, RemoteStore)
        parts = [bytes([i]) * n for i, n in enumerate(sizes)]
        with mock.patch.object(store._fs, "pipe_file", wraps=store._fs.pipe_file) as put:
            store.write("o", parts, durable=False)
        assert [call.args[1] for call in put.call_args_list] == [b"".join(parts)]
        assert store.read("o") == b"".join(parts)

    @pytest.mark.parametrize("sizes", [[11], [9, 2], [4] * 5, [1] * 30, [100, 1]], ids=str)
    def test_a_large_object_is_streamed(
        self, store: Store, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
    ) -> None:
        """A chunk of a file of 256 MiB is made when it is written, and isn't kept."""
        monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 10)
        assert isinstance(store, RemoteStore)
        real, taken, opened = store._fs.open, [0], []

        def parts() -> Iterator[bytes]:
            for i, n in enumerate(sizes):
                taken[0] += n
                yield bytes([i]) * n

        def open_(path: str, mode: str, block_size: int) -> Any:
            opened.append((mode, block_size, taken[0]))
            return real(path, mode, block_size=block_size)

        with mock.patch.object(store._fs, "open", open_):
            store.write("o", parts(), durable=False)
        assert store.read("o") == b"".join(bytes([i]) * n for i, n in enumerate(sizes))
        ((mode, block, before),) = opened
        assert (mode, block) == ("wb", 10)
        assert 10 < before <= 10 + max(sizes), "no more is held than makes it too large for one request"

    def test_a_stream_that_breaks_is_the_place_s_error(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.stores.remote.AT_ONCE", 10)
        assert isinstance(store, RemoteStore)
        with mock.patch.object(store._fs, "open") as opened:
            opened.return_value.__enter__.return_value.write.side_effect = RuntimeError("no route")
            opened.return_value.__exit__.return_value = False
            with pytest.raises(OSError, match="RuntimeError: no route"):
                store.write("o", [b"x" * 11], durable=False)
