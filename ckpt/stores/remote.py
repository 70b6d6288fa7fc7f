"""A run's folder in a store that fsspec knows: whole objects, no renames, no folders.

Objects are written to their final place, and the manifest, written last, is the commit. While a save or a
deletion goes on, a marker object lies beside the tag (`.saving.<tag>`, `.deleting.<tag>`), so that the
leftovers of a crash can be told from a user's objects. A committed tag can't be saved again: nothing replaces
many objects in one step.

Two writers are kept apart as well as requests allow: the second is refused while the first gives signs of
life, and one that was taken for dead doesn't commit. But ranks of it that still write can't be held back from
the names of a tag that is saved anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError
from ckpt.format import (
    DELETING,
    LATEST,
    MANIFEST,
    MOST_DOCUMENT_BYTES,
    NAMED_LATEST,
    SAVING,
    TOKEN,
    WRITER,
    is_tag,
    leftover_tag,
)
from ckpt.stores.remote_errors import naming
from ckpt.stores.remote_lock import LockObject
from ckpt.stores.writer_lock import Lock, say_once, this_process

AT_ONCE = 32 << 20
"""Most bytes of an object that is put by a single request."""

NOT_COMMITTED = b"not committed "
"""Beginning of the marker of a save that has failed; the checksum of the manifest that it gave up follows."""

_REMOVALS = 3
"""Times to remove objects: a save that was taken for dead may still put some."""

T = TypeVar("T")


class RemoteStore(LockObject):
    """Store at an fsspec URL; see `ckpt.stores.Store`."""

    threads: int | None = 16
    shares_files = False
    links = False
    window = 64 << 20  # each call is a request, so read a whole chunk at once
    beat_seconds = 5.0
    dead_seconds = 30.0

    def __init__(self, url: str) -> None:
        """Open the file system of the URL.

        Raises:
            ImportError, ValueError: fsspec can't.
        """
        self.url = url.rstrip("/")
        self._fs: fsspec.AbstractFileSystem
        self._fs, root = url_to_fs(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._lock: Lock | None = None
        self._begun: tuple[str, str] | None = None
        self._tried = b""  # the last manifest that was to be put
        signature = inspect.signature(self._fs.pipe_file)
        self._if_new = {"mode": "create"} if "mode" in signature.parameters else {}  # fsspec from 2024.12 on

    def where(self, path: str) -> str:
        return f"{self.url}/{path}" if path else self.url

    # --- objects ---------------------------------------------------------------------------------------

    def read(self, path: str, most: int = MOST_DOCUMENT_BYTES) -> bytes:
        data: bytes
        whole = most == MOST_DOCUMENT_BYTES
        data = self._call(self._fs.cat_file, path) if whole else self._range(path, 0, most + 1)
        if len(data) > most:
            raise OSError(errno.EFBIG, f"it has more than the {most} bytes that are expected", path)
        return data

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        data = self._range(path, offset, offset + len(buffer))
        if len(data) > len(buffer):  # a server that ignores ranges sends the whole object
            data = data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def _range(self, path: str, begin: int, end: int) -> bytes:
        """Return the bytes from `begin` to `end` or the object's end; none if it ends before."""
        try:
            data: bytes = self._call(self._fs.cat_file, path, start=begin, end=end)
        except OSError as error:
            if "range" not in str(error).lower() or self.size(path) > begin:
                raise
            return b""  # S3 calls a range that begins at the end an error, an empty object's among them
        return data

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
            self._put(path, b"".join(held))
            return

        def stream(target: str) -> None:
            file = self._fs.open(target, "wb", block_size=AT_ONCE)  # in several requests
            try:
                for part in (*held, *rest):
                    file.write(part)
                file.close()
            except BaseException:
                with contextlib.suppress(Exception):  # not closed, which would put what there is
                    file.discard()
                    file.closed = True
                raise

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

    def hold(self, token: str, what: str) -> None:
        self._lock = Lock(self, this_process(token, what))

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def staging(self, tag: str, token: str) -> str:
        return tag

    def begin(self, tag: str, token: str) -> list[str]:
        names = self.names()
        self._sweep(names)
        self._check_new(tag)  # before the marker, with which a crash would make a user's objects leftovers
        self.write(SAVING + tag, [token.encode()], durable=True)
        try:
            self._check_new(tag)  # and after it, from which on others see that the tag is being saved
        except CheckpointError:
            self.remove(SAVING + tag)
            raise
        self._begun = tag, token
        return names

    def _check_new(self, tag: str) -> None:
        committed = self.exists(f"{tag}/{MANIFEST}")  # by its name, as listings may not show it yet
        if committed or self.exists(tag):
            what = "is a checkpoint" if committed else "exists and is not a checkpoint"
            raise CheckpointError(
                f"{self.where(tag)} {what}, and nothing can be replaced in one step in this store; "
                "save under another tag"
            )

    def begun(self, tag: str, token: str) -> bool:
        return self._marker(tag) == token.encode()

    def _marker(self, tag: str) -> bytes | None:
        try:
            return self.read(SAVING + tag)
        except FileNotFoundError:
            return None

    def sync(self, tag: str, token: str) -> None:
        """Do nothing: a put returns only once the store keeps the object."""

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        for name, content in documents.items():
            if name == MANIFEST:  # directly before it: all else can be taken away by a save that begins now
                self._check_own(tag, token)
                try:
                    self._tried = content
                    self._put_surely(f"{tag}/{name}", content, self.put_new)
                except FileExistsError:
                    self._check_own(tag, token)
                    raise CheckpointError(f"another save has committed {self.where(tag)} meanwhile") from None
            else:
                self.write(f"{tag}/{name}", [content], durable=durable)
        with contextlib.suppress(OSError):  # no answer tells nothing, and most likely all is well
            if not self.begun(tag, token):  # one began in the meantime, and removed what this one had written
                self._take_back(tag, documents[MANIFEST])
                self._check_own(tag, token)
        try:
            if update_latest:
                self._put_surely(LATEST, f"{tag}\n".encode(), self._put)
            for path in [f"{tag}/{NAMED_LATEST}"] * (NAMED_LATEST in documents) + [SAVING + tag]:
                with contextlib.suppress(FileNotFoundError):
                    self.remove(path)
        except (OSError, CheckpointError) as error:
            raise CheckpointError(
                f"{self.where(tag)} is committed, but {LATEST!r} may not name it: {error}"
            ) from error

    def abandon(self, tag: str, token: str) -> None:
        if self._begun != (tag, token):
            return  # what is there isn't this save's
        with contextlib.suppress(OSError):  # the next save cleans up
            if self._marker(tag) is None and not self.exists(f"{tag}/{MANIFEST}"):
                # One of another tag took this save for dead, and cleaned up while it was still writing.
                self.write(SAVING + tag, [token.encode()], durable=True)
            if self.begun(tag, token):  # otherwise the objects are another save's
                self._finish(SAVING + tag, failed=True)

    def delete(self, tag: str) -> None:
        self.write(DELETING + tag, [b""], durable=True)
        try:
            self._finish(DELETING + tag)
        except OSError as error:
            if self.exists(f"{tag}/{MANIFEST}"):
                raise
            say_once(f"objects of {self.where(tag)}, which is deleted, can't be removed: {error}")

    def committed_at(self, tag: str) -> float:
        return self.modified(f"{tag}/{MANIFEST}")

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if _is_leftover(name)]

    def clean(self) -> list[str]:
        names = self.leftovers()
        for name in names:
            self._clean(name)
        return names

    def _sweep(self, names: Iterable[str]) -> None:
        """Remove what earlier saves and deletions have left, as far as possible: nothing needs it gone."""
        for name in filter(_is_leftover, names):
            try:
                self._clean(name)
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                say_once(f"{self.where(name)} can't be finished: {error}")

    def _clean(self, name: str) -> None:
        if leftover_tag(name) is None:
            self.remove(name)
        elif self.exists(name):  # a listing may still show it, and its tag may have been saved anew
            self._finish(name)

    def _finish(self, marker: str, *, failed: bool = False) -> None:
        """Remove the objects that a marker stands for, the manifest first, then the marker.

        That of a save that has just `failed` stays: the store may do what its client has given up, even put
        the manifest, which isn't a commit then.
        """
        tag = leftover_tag(marker)
        assert tag is not None, f"{marker!r} stands for nothing"
        manifest, given_up = f"{tag}/{MANIFEST}", False
        if marker.startswith(SAVING):
            found = self._marker(tag) or b""
            given_up = found.startswith(NOT_COMMITTED)
            if not given_up:  # its save may be alive: it must not commit what is left if a removal fails
                self.write(marker, [b"being removed"], durable=True)
        if self.exists(manifest):
            if marker.startswith(SAVING) and not (given_up and found == _not_committed(self.read(manifest))):
                self.remove(marker)  # it is a commit, whose save only failed to remove its marker
                return
            self.remove(manifest)
        if failed:
            self.write(marker, [_not_committed(self._tried)], durable=True)
        self._remove_below(tag)
        if not failed:
            self.remove(marker)

    def _remove_below(self, tag: str) -> None:
        """Remove all objects of a tag; a store may refuse to remove some, and fsspec then says nothing."""
        for _ in range(_REMOVALS):
            if not self.exists(tag):
                return
            self._call(self._fs.rm, tag, recursive=True)
        if self.exists(tag):
            raise OSError(errno.EIO, "some of its objects are still there", self.where(tag))

    def _put_surely(self, path: str, content: bytes, put: Callable[[str, bytes], None]) -> None:
        """Put an object; if that fails, look for it: the answer may be lost, but the work done."""
        try:
            put(path, content)
        except OSError as error:
            try:
                if self.read(path) == content:
                    return
            except FileNotFoundError:
                raise error from None
            except OSError as unknown:
                raise CheckpointError(
                    f"{self.where(path)} may be there: putting it failed ({error.strerror or error}), and so "
                    f"did looking for it ({unknown.strerror or unknown}); look at it before you save again"
                ) from error
            raise

    def _take_back(self, tag: str, manifest: bytes) -> None:
        """Remove the manifest of a checkpoint that isn't whole, unless it is another save's by now."""
        with contextlib.suppress(FileNotFoundError):
            if self.read(f"{tag}/{MANIFEST}") == manifest:
                self.remove(f"{tag}/{MANIFEST}")

    def _check_own(self, tag: str, token: str) -> None:
        if not self.begun(tag, token):
            raise CheckpointError(
                f"another save has begun since this one of {self.where(tag)} did, and took it for dead"
            )

    # --- requests --------------------------------------------------------------------------------------

    def put_new(self, path: str, content: bytes) -> None:
        self._call(self._fs.pipe_file, path, content, **self._if_new)

    def _put(self, path: str, content: bytes) -> None:
        self._call(self._fs.pipe_file, path, content)

    def modified(self, path: str) -> float:
        return float(self._call(self._fs.modified, path).timestamp())

    def remove(self, path: str) -> None:
        self._call(self._fs.rm_file, path)

    def _call(self, method: Callable[..., T], path: str, *args: Any, **kwargs: Any) -> T:
        """Call the file system, turning any error into an OSError of one line that names the object."""
        with naming(self.where(path)):
            return method(f"{self._root}/{path}" if path else self._root, *args, **kwargs)


def _not_committed(manifest: bytes) -> bytes:
    return NOT_COMMITTED + hashlib.sha256(manifest).hexdigest().encode()


def _is_leftover(name: str) -> bool:
    tag = leftover_tag(name)
    return re.fullmatch(rf"\{WRITER}\.[0-9a-f]{{{TOKEN}}}", name) is not None if tag is None else is_tag(tag)
