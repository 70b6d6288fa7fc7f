"""A checkpoint in any store, whose objects can be damaged and restored."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any
from urllib.parse import unquote

from fsspec.core import url_to_fs

from ckpt import Problem, open_checkpoint, verify
from ckpt.format import encode_document, encode_manifest, object_record
from ckpt.stores import Store

PART_0 = "arrays.0.json"
ITEMSIZES = {"float32": 4, "int64": 8, "bfloat16": 2, "uint8": 1, "bool": 1}


@dataclass
class Places:
    """Places in a file."""

    payload: int
    stride: int
    chunks: list[list[int]]
    """Index of each chunk, in the file's order."""
    index: int
    """Byte at which zarr's index begins."""

    def damaged(self, *numbers: int) -> str:
        """Return what `verify` says if these chunks are damaged, by their positions in the file."""
        first = f"chunk {self.chunks[numbers[0]]} at byte {numbers[0] * self.stride}"
        return f"is damaged in {len(numbers)} of {len(self.chunks)} chunks, the first is {first}"


BETWEEN = "is damaged between or behind its chunks"


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
    def files(self) -> list[str]:
        """Files with data."""
        return [path for path in self.paths() if path.rpartition("/")[2].split(".")[0] == "c"]

    @property
    def documents(self) -> list[str]:
        return [path for path in self.paths() if path.endswith(".json")]

    @property
    def recorded(self) -> list[str]:
        """Documents whose size and checksum the manifest has."""
        return [*self.manifest["parts"], *self.manifest["files"]]

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.get("manifest.json"))

    def places(self, path: str) -> "Places":
        """Return where the chunks of a file are, by what the specification says of them."""
        folder, _, name = path.rpartition("/")
        atom, state = map(unquote, folder.split("/")[1:])
        record = json.loads(self.get(PART_0))[atom][state]
        shape, chunk, file = (record[f"{kind}shape"] for kind in ("", "chunk_", "file_"))
        first = [int(i) * (f // c) for i, f, c in zip(name.split(".")[1:], file, chunk, strict=True)]
        ends = [min(a + f // c, -(-n // c)) for a, n, f, c in zip(first, shape, file, chunk, strict=True)]
        payload = prod(chunk) * ITEMSIZES[record["dtype"]]
        stride = -(-(payload + 4) // 4096) * 4096
        chunks = [*map(list, product(*map(range, first, ends)))]
        return Places(payload, stride, chunks, payload + 4 if len(chunks) == 1 else len(chunks) * stride)

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

    def with_part(self, change: Callable[[Any], object], *more: tuple[str, bytes]) -> Any:
        """Change the part of the manifest for a while, with its record. `change` may return other content."""
        part = json.loads(self.get(PART_0))
        changed = change(part)
        return self.with_content(
            PART_0, changed if isinstance(changed, bytes) else encode_document(part), *more
        )

    def with_content(self, name: str, content: bytes, *more: tuple[str, bytes]) -> Any:
        """Change a part or a file for a while, with its record in the manifest."""

        def change(manifest: dict[str, Any]) -> None:
            manifest["parts" if name in manifest["parts"] else "files"][name].update(object_record(content))

        return self.with_manifest(change, (name, content), *more)

    def problems(self, **options: Any) -> list[Problem]:
        return verify(open_checkpoint(self.run), **options)

    def found(self, path: str, what: str) -> Problem:
        """Return the problem that is expected for an object."""
        _, atom, state = (*path.rpartition("/")[0].split("/"), "", "")[:3]
        atom = "a/größe" if atom == "a%2Fgr%C3%B6%C3%9Fe" else atom
        return Problem(atom=atom, state=state, path=f"{self.run}/t1/{path}", what=what)


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
