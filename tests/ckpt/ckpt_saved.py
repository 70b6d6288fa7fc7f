"""A checkpoint in any store, whose objects can be damaged and restored."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs

from ckpt import Problem, open_checkpoint, verify
from ckpt.format import encode_manifest
from ckpt.stores import Store


@dataclass
class Saved:
    """A checkpoint and its files, in any store."""

    run: str

    def __post_init__(self) -> None:
        self.fs, self.root = url_to_fs(self.run)

    def file(self, path: str) -> str:
        return f"{self.root}/t1/{path}"

    def get(self, path: str) -> bytes:
        return self.fs.cat_file(self.file(path))

    def put(self, path: str, data: bytes | None) -> None:
        if data is None:
            self.fs.rm_file(self.file(path))
        else:
            self.fs.pipe_file(self.file(path), data)

    def paths(self) -> list[str]:
        found = (name.partition("/t1/")[2] for name in self.fs.find(f"{self.root}/t1"))
        return sorted(path for path in found if path != "manifest.json")

    @property
    def kinds(self) -> list[str]:
        """One chunk of each kind: many blocks in three windows, a few blocks, one block."""
        return ["atoms/big/fp32/c.0.0", "atoms/w/fp32/c.1.0", "atoms/count/value/c", "atoms/half/value/c.0"]

    @property
    def chunks(self) -> list[str]:
        return [path for path in self.paths() if not path.endswith(".json")]

    @property
    def documents(self) -> list[str]:
        return [path for path in self.paths() if path.endswith(".json")]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.get("manifest.json"))

    def block(self, path: str) -> int:
        """Return the size of a chunk's blocks."""
        array, _, key = path.rpartition("/")
        record = self.manifest["chunks"][array][key]
        return int(record.get("block", record["size"]))

    @contextmanager
    def changed(self, *changes: tuple[str, bytes | None]) -> Iterator[None]:
        """Change the content of objects, or remove them (None), for a while."""
        before = [(path, self.get(path)) for path, _ in changes]
        for path, content in changes:
            self.put(path, content)
        try:
            yield
        finally:
            for path, content in before:
                self.put(path, content)

    def with_manifest(self, change: Callable[[dict[str, Any]], object], *more: tuple[str, bytes]) -> Any:
        """Change the manifest for a while, with a valid checksum."""
        manifest = self.manifest
        del manifest["crc32c"]
        change(manifest)
        return self.changed(("manifest.json", encode_manifest(manifest)), *more)

    def problems(self, **options: Any) -> list[Problem]:
        return verify(open_checkpoint(self.run), **options)

    def found(self, path: str, what: str) -> Problem:
        """Return the problem that is expected for an object."""
        _, atom, state, chunk = (*path.removesuffix("zarr.json").strip("/").split("/"), "", "", "")[:4]
        atom = "a/größe" if atom == "a%2Fgr%C3%B6%C3%9Fe" else atom
        where = f"{self.run}/t1/{path}"
        return Problem(atom=atom, state=state, chunk=chunk, path=where, what=what)


def flipped(data: bytes, *places: int) -> bytes:
    damaged = bytearray(data)
    for place in places:
        damaged[place] ^= 0x10
    return bytes(damaged)


class CountingStore:
    """Passes every call on to another store, and records the reads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.calls: list[tuple[str, str]] = []
        """Name and path of each read, `size` and `exists`."""
        self.read_bytes = 0
        """Bytes asked for by `read_into`."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if name not in ("read", "read_into", "size", "exists"):
            return value

        def counted(path: str, *args: Any) -> Any:
            self.calls.append((name, path))
            self.read_bytes += args[0].nbytes if name == "read_into" else 0
            return value(path, *args)

        return counted
