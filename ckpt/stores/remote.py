"""A run's folder in a store that fsspec knows: whole objects, no renames, no folders.

Objects are written to their final place, and the manifest, written last, is the commit. While a save or a
deletion goes on, a marker object lies beside the tag (`.saving.<tag>`, `.deleting.<tag>`), so that the
leftovers of a crash can be told from a user's objects. A committed tag can't be saved again: nothing replaces
many objects in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError
from ckpt.format import DELETING, LATEST, MANIFEST, SAVING, leftover_tag

AT_ONCE = 32 << 20
"""Most bytes of an object that is put by a single request."""

T = TypeVar("T")


class RemoteStore:
    """Store at an fsspec URL; see `ckpt.stores.Store`."""

    threads: int | None = 16
    shares_files = False
    window = 64 << 20  # each call is a request, so read a whole chunk at once

    def __init__(self, url: str) -> None:
        """Open the file system of the URL.

        Raises:
            ImportError, ValueError: fsspec can't.
        """
        self.url = url.rstrip("/")
        self._fs: fsspec.AbstractFileSystem
        self._fs, root = url_to_fs(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")

    def where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    # --- objects ---------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        data: bytes = self._call(self._fs.cat_file, path)
        return data

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        data: bytes = self._call(self._fs.cat_file, path, start=offset, end=offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def size(self, path: str) -> int:
        return int(self._call(self._fs.info, path)["size"])

    def exists(self, path: str) -> bool:
        try:  # fsspec's own `exists` returns False on any failure
            self._call(self._fs.info, path)
        except FileNotFoundError:
            return False
        return True

    def names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._call(self._fs.ls, "", detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({name.rstrip("/").rpartition("/")[2] for name in found})

    def make_folders(self, paths: Iterable[str]) -> None:
        pass

    def write(self, path: str, parts: Iterable[Buffer], *, durable: bool) -> None:
        held, size, rest = [], 0, iter(parts)
        for part in rest:
            held.append(bytes(part))
            size += len(part)
            if size > AT_ONCE:
                break
        else:
            self._call(self._fs.pipe_file, path, b"".join(held))
            return

        def stream(target: str) -> None:
            with self._fs.open(target, "wb", block_size=AT_ONCE) as file:  # in several requests
                for part in (*held, *rest):
                    file.write(part)

        self._call(stream, path)

    def write_into(self, path: str, runs: Iterable[tuple[int, Iterable[Buffer]]], *, durable: bool) -> None:
        raise AssertionError("no two processes write one object")

    def same(self, path: str, offset: int, parts: Iterable[Buffer]) -> bool:
        return False  # nothing can be linked, so reading would be of no use

    def link(self, old: str, new: str) -> bool:
        return False

    def copy(self, old: str, new: str) -> None:
        raise AssertionError("nothing is linked, so nothing need be copied instead")

    # --- a checkpoint from its first object to its end -------------------------------------------------

    def staging(self, tag: str) -> str:
        return tag

    def begin(self, tag: str, token: str) -> None:
        self.clean()
        if self.exists(tag):
            what = "is a checkpoint" if self.exists(f"{tag}/{MANIFEST}") else "exists and is not a checkpoint"
            raise CheckpointError(
                f"{self.where(tag)} {what}, and nothing can be replaced in one step in this store; "
                "save under another tag"
            )
        self.write(SAVING + tag, [token.encode()], durable=True)

    def begun(self, tag: str, token: str) -> bool:
        try:
            return self.read(SAVING + tag) == token.encode()
        except FileNotFoundError:
            return False

    def sync(self, tag: str) -> None:
        """Do nothing: a put returns only once the store keeps the object."""

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        if not self.begun(tag, token):
            raise CheckpointError(f"another save of {self.where(tag)} has begun since this one did")
        for name, content in documents.items():
            self.write(f"{tag}/{name}", [content], durable=durable)
        try:
            if update_latest:
                self.write(LATEST, [f"{tag}\n".encode()], durable=durable)
            self._remove(SAVING + tag)
        except OSError as error:
            raise CheckpointError(
                f"{self.where(tag)} is committed, but {LATEST!r} may not name it: {error}"
            ) from error

    def abandon(self, tag: str, token: str) -> None:
        try:
            if self.begun(tag, token):  # otherwise the objects are another save's
                self._finish(SAVING + tag)
        except OSError:
            pass  # the next save cleans up

    def delete(self, tag: str) -> None:
        self.write(DELETING + tag, [b""], durable=True)
        self._finish(DELETING + tag)

    def committed_at(self, tag: str) -> float:
        return float(self._call(self._fs.modified, f"{tag}/{MANIFEST}").timestamp())

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if leftover_tag(name)]

    def clean(self) -> list[str]:
        names = self.leftovers()
        for name in names:
            self._finish(name)
        return names

    def _finish(self, marker: str) -> None:
        """Remove the objects that a marker stands for, the manifest first, then the marker."""
        tag = leftover_tag(marker)
        assert tag is not None, f"{marker!r} stands for nothing"
        committed = self.exists(f"{tag}/{MANIFEST}")  # then a save only failed to remove its marker
        if committed and marker.startswith(DELETING):
            self._remove(f"{tag}/{MANIFEST}")
        if self.exists(tag) and not (committed and marker.startswith(SAVING)):
            self._call(self._fs.rm, tag, recursive=True)
        self._remove(marker)

    def _remove(self, path: str) -> None:
        self._call(self._fs.rm_file, path)

    def _call(self, method: Callable[..., T], path: str, *args: Any, **kwargs: Any) -> T:
        """Call the file system, turning any error into an OSError."""
        try:
            return method(f"{self._root}/{path}" if path else self._root, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
