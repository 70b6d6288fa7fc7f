"""Every store keeps the contract of `store_contract`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from store_contract import CountingStore, StoreTests

from ckpt import open_store
from ckpt.stores import Store


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(tmp_path / "run")

    def test_a_file_is_no_leftover(self, store: Store) -> None:
        self.commit(store, "t1")
        store.write(".saving.t2", [b"a user's"], durable=False)
        assert store.clean() == []


class TestCountingStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Any:
        return CountingStore(open_store(tmp_path / "run"))

    def test_reads_are_counted(self, store: Any) -> None:
        self.commit(store, "t1", b"abc")
        store.calls.clear()
        store.read_into("t1/atoms/c", memoryview(bytearray(3)), 0)
        assert (store.calls, store.read_bytes) == ([("read_into", "t1/atoms/c")], 3)


class TestMemoryStore(StoreTests):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        url = f"memory://{uuid.uuid4().hex}"
        yield open_store(url)
        fs = fsspec.filesystem("memory")
        if fs.exists(url):
            fs.rm(url, recursive=True)

    def leave(self, store: Store, name: str) -> None:
        self.put(store, name, b"x")  # a marker is an object of this name
