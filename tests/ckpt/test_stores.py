"""The contract of `ckpt.stores.Store`, kept by every store."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ckpt import CheckpointError, open_store
from ckpt.stores import Store
from ckpt.stores.remote import RemoteStore
from ckpt.testing import StoreTests


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

    def test_no_folder_on_the_way_is_a_link(self, store: Store, tmp_path: Path) -> None:
        """Only a tag's own may be: what is below it must not lead out of the checkpoint."""
        self.commit(store, "t1", b"abc")
        (tmp_path / "run" / "t1" / "atoms").rename(tmp_path / "run" / "t1" / "moved")
        (tmp_path / "run" / "t1" / "atoms").symlink_to("moved")
        (tmp_path / "run" / "t2").symlink_to("t1")
        for call in (store.read, lambda path: store.read_into(path, memoryview(bytearray(3)), 0)):
            with pytest.raises(OSError, match="it is a symbolic link, which can lead out of the checkpoint"):
                call("t1/atoms/c")
        assert store.read("t2/moved/c") == b"abc"
        assert open_store(tmp_path / "run" / "t2").read("moved/c") == b"abc"

    def test_documents_that_cannot_be_written_fail_the_commit(self, store: Store) -> None:
        """It isn't said that another save has begun if none has."""
        store.begin("t1", "token")
        with pytest.raises(FileNotFoundError, match="gone/a"):
            store.commit("t1", "token", {"gone/a": b""}, durable=False, update_latest=True)
        store.begin("t1", "other")
        with pytest.raises(CheckpointError, match="another save has begun since"):
            store.commit("t1", "token", {"gone/a": b""}, durable=False, update_latest=True)

    def test_leftovers_that_another_process_removes_at_the_same_time(
        self, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.commit(store, "t1")
        left = [".latest.tmp", ".saving.t2", f".writer.{'a' * 32}"]
        for name in left:
            self.put(store, f"{name}/c" if "saving" in name else name, b"x")
        rename, unlink = os.rename, os.unlink
        with (
            mock.patch("os.rename", lambda *args: [rename(*args), rename(*args)]),
            mock.patch("os.unlink", lambda *args, **more: [unlink(*args, **more), unlink(*args, **more)]),
        ):
            assert store.clean() == left
        assert caplog.records == []
        (half,) = store.clean()  # as far as the other one has come
        assert half.startswith(".deleting.t2.")
        assert store.names() == ["latest", "t1"]


class Cupboard(MemoryFileSystem):
    """A place as somebody else would write it: with folders of its own, and a request for each object."""

    protocol = "cupboard"
    store: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    pseudo_dirs: ClassVar[list[str]] = [""]  # type: ignore[misc]


class TestSomebodysStore(StoreTests):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        fsspec.register_implementation("cupboard", Cupboard, clobber=True)
        yield open_store(f"cupboard://{uuid.uuid4().hex}")
        Cupboard.store.clear()

    def leave(self, store: Store, name: str) -> None:
        self.put(store, name, b"x")


class TestS3Store(StoreTests):
    @pytest.fixture
    def store(self, object_store: Any) -> Iterator[Store]:
        object_store.put_back({})
        yield open_store(f"{object_store.url}/{uuid.uuid4().hex}")
        object_store.put_back({})

    def leave(self, store: Store, name: str) -> None:
        self.put(store, name, b"x")


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self, memory_url: str) -> Store:
        return open_store(memory_url)

    def leave(self, store: Store, name: str) -> None:
        self.put(store, name, b"x")  # a marker is an object of this name

    def test_what_only_folders_have_is_not_asked_for(self, store: Store) -> None:
        assert not store.shares_files
        for call in (
            lambda: store.write_into("c", [(0, [b"x"])], durable=False),
            lambda: store.copy("c", "d"),
        ):
            with pytest.raises(AssertionError):
                call()
        assert store.names() == []

    def test_an_object_larger_than_expected_is_not_read(self, store: Store) -> None:
        store.write("c", [b"abcd"], durable=False)
        assert store.read("c", 4) == b"abcd"
        with pytest.raises(OSError, match="it has more than the 3 bytes that are expected"):
            store.read("c", 3)

    def test_a_sign_of_a_lock_s_age_is_a_leftover(self, store: Store) -> None:
        probe = f".writer.{'a' * 32}"
        for name in (probe, ".writer.a", f".writer.{'g' * 32}"):
            store.write(name, [b"?"], durable=False)
        assert store.clean() == [probe]
        assert store.names() == [".writer.a", f".writer.{'g' * 32}"]

    def test_leftovers_that_another_process_removes_at_the_same_time(
        self, store: Store, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = [".saving.t2", f".writer.{'a' * 32}"]
        for name in names:
            store.write(name, [b"x"], durable=False)
        assert isinstance(store, RemoteStore)
        real = store._fs.rm_file

        def removed(path: str) -> None:
            real(path)
            raise FileNotFoundError(path)

        with mock.patch.object(store._fs, "rm_file", removed):
            store.begin("t3", "token")
        assert caplog.records == []
        assert store.names() == [".saving.t3"]

    def test_objects_that_are_removed_at_the_last_try(self, store: Store) -> None:
        assert isinstance(store, RemoteStore)
        store.begin("t1", "token")
        store.write("t1/c", [b"x"], durable=False)
        real, calls = store._fs.rm, list[str]()

        def removed(path: str, **more: Any) -> None:
            calls.append(path)
            if len(calls) == 3:
                real(path, **more)

        with mock.patch.object(store._fs, "rm", removed):
            store.abandon("t1", "token")
        assert len(calls) == 3
        assert not store.exists("t1")

    def test_a_tag_that_another_save_has_committed_meanwhile(self, store: Store) -> None:
        """Neither of the two began after the other, so both markers were this one's."""
        store.begin("t1", "token")
        store.write("t1/manifest.json", [b"theirs"], durable=False)
        with pytest.raises(CheckpointError, match=r"another save has committed .*t1 meanwhile"):
            store.commit("t1", "token", {"manifest.json": b"mine"}, durable=False, update_latest=True)
        assert store.read("t1/manifest.json") == b"theirs"
        assert not store.exists("latest")

    @pytest.mark.parametrize("found", [b"theirs", None], ids=["another's", "none"])
    def test_only_its_own_manifest_is_taken_back(self, store: Store, found: bytes | None) -> None:
        assert isinstance(store, RemoteStore)
        if found is not None:
            store.write("t1/manifest.json", [found], durable=False)
        store._take_back("t1", b"mine")
        assert store.exists("t1/manifest.json") == (found is not None)

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
            file = opened.return_value
            file.write.side_effect = RuntimeError("no route")
            with pytest.raises(OSError, match="RuntimeError: no route"):
                store.write("o", [b"x" * 11], durable=False)
        assert file.discard.called
        assert not file.close.called, "that would put what there is"
