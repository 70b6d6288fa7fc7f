"""A run's folder on a file system, by direct calls.

A save is written into a hidden folder of its own, `.saving.<tag>.<token>`. The commit is one rename to
`<tag>`, after every file and folder, the manifest last, is on the disk. A crash before it leaves a hidden
folder that readers ignore. A tag that is saved again is exchanged for its replacement in one step, so it can
be read at any time. A checkpoint is deleted by a rename to `.deleting.<tag>.<token>`, from which on it
doesn't exist. So is the folder of a save that seems dead: if it isn't, it finds its folder gone, and fails.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError
from ckpt.format import (
    ATOMS,
    DELETING,
    LATEST,
    MANIFEST,
    MOST_DOCUMENT_BYTES,
    NAMED_LATEST,
    SAVING,
    TOKEN,
    WRITER,
    leftover_tag,
)
from ckpt.stores import files
from ckpt.stores.mounts import can_share_files
from ckpt.stores.writer_lock import Lock, say_once, this_process
from ckpt.threads import Scratch

_TEMPORARY = re.compile(
    rf"\.latest\.tmp|\.latest\.[0-9a-f]{{{TOKEN}}}\.tmp|\.writer\.[0-9a-f]{{{TOKEN}}}"
).fullmatch
"""Matches small files that a crash may leave."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
"""Errors of a link where there are none."""


class LocalStore:
    """Store in a local folder; see `ckpt.stores.Store`."""

    threads: int | None = None
    links = True
    window = 1 << 20  # large enough to stream, small enough to be summed in the processor's cache
    beat_seconds = 2.0
    dead_seconds = 10.0

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder
        self._scratch = Scratch()
        self._lock: Lock | None = None
        self._reached = {""}
        self.shares_files = can_share_files(folder)
        self._prefix = f"{folder}/"  # a string, as pathlib takes longer than writing a small file

    def where(self, path: str) -> str:
        return f"{self._prefix}{path}" if path else str(self._folder)

    # --- objects ---------------------------------------------------------------------------------------

    def read(self, path: str, most: int = MOST_DOCUMENT_BYTES) -> bytes:
        self._reach(path)
        return files.read_file(self._prefix + path, most)

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        self._reach(path)
        with files.opened_to_read(self._prefix + path) as fd:
            return files.read_into(fd, buffer, offset)

    def _reach(self, path: str) -> None:
        """Check that no folder on the way to an object is a link, but a tag's own; raises OSError."""
        folder = path.rpartition("/")[0]
        if folder in self._reached:
            return
        parent, _, name = folder.rpartition("/")
        self._reach(folder)
        if (parent or name == ATOMS) and stat.S_ISLNK(os.lstat(self._prefix + folder).st_mode):
            raise OSError(errno.ELOOP, files.LINK, self._prefix + folder)
        self._reached.add(folder)

    def size(self, path: str) -> int:
        return os.stat(self._prefix + path).st_size

    def exists(self, path: str) -> bool:
        try:
            os.stat(self._prefix + path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def make_folders(self, paths: Iterable[str]) -> None:
        made = {""}

        def make(folder: str) -> None:
            if folder in made:
                return
            make(folder.rpartition("/")[0])
            made.add(folder)
            with contextlib.suppress(FileExistsError):  # another rank was faster
                os.mkdir(self._prefix + folder)

        for path in paths:
            make(path)

    def write(self, path: str, parts: Iterable[Buffer], *, durable: bool) -> None:
        files.write_file(self._prefix + path, parts, durable=False, hurry=durable)

    def write_into(self, path: str, runs: Iterable[tuple[int, Iterable[Buffer]]], *, durable: bool) -> None:
        files.write_shared(self._prefix + path, runs, hurry=durable)

    def same(self, path: str, offset: int, parts: Iterable[Buffer]) -> bool:
        with files.opened(self._prefix + path) as fd:
            for part in parts:
                found = self._scratch.take(len(part))
                if files.read_into(fd, found.data, offset) != len(part):
                    return False
                if not np.array_equal(np.frombuffer(part, np.uint8), found):
                    return False
                offset += len(part)
        return True

    def link(self, old: str, new: str) -> bool:
        try:
            os.link(self._prefix + old, self._prefix + new)
        except FileExistsError:  # another rank has written it: copying would overwrite that
            raise
        except OSError:  # no hard links here, or too many of this file
            return False
        return True

    def copy(self, old: str, new: str) -> None:
        path = self._prefix + new
        with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL):  # a copy, too, never overwrites
            shutil.copyfile(self._prefix + old, path)

    # --- a checkpoint from its first object to its end -------------------------------------------------

    def hold(self, token: str, what: str) -> None:
        _make_durably(self._folder)
        self._lock = Lock(self, this_process(token, what))

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def staging(self, tag: str, token: str) -> str:
        return f"{SAVING}{tag}.{token}"

    def begin(self, tag: str, token: str) -> list[str]:
        _make_durably(self._folder)
        self._check_replaceable(tag)
        names = self.names()
        self._sweep(names)
        os.mkdir(self._prefix + self.staging(tag, token))
        return names

    def begun(self, tag: str, token: str) -> bool:
        return os.path.isdir(self._prefix + self.staging(tag, token))

    def sync(self, tag: str, token: str) -> None:
        files.sync_tree(self._folder / self.staging(tag, token))

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        staging, final = self._folder / self.staging(tag, token), self._folder / tag
        try:
            for name, content in documents.items():
                files.write_file(staging / name, [content], durable=durable)
            if durable:
                files.sync_folder(staging)  # before the rename, which must not be durable before its content
        except FileNotFoundError:
            self._check_own(tag, token)
            raise
        self._check_replaceable(tag)
        self._check_own(tag, token)
        try:
            self._put_in_place(staging, final, documents[MANIFEST])
        except (OSError, CheckpointError):
            self._check_own(tag, token)  # the better reason
            raise
        try:
            if durable:
                files.sync_folder(self._folder)  # the rename, before `latest` names its result
            if update_latest:
                if self._lock is not None and self._lock.is_lost():
                    raise OSError("another process has taken this one for dead, and may have written it")
                temporary = self._folder / f".{LATEST}.{token}.tmp"
                files.replace_file(self._folder / LATEST, f"{tag}\n".encode(), temporary, durable=durable)
        except OSError as error:
            raise CheckpointError(f"{final} is committed, but {LATEST!r} may not name it: {error}") from error
        if NAMED_LATEST in documents:
            with contextlib.suppress(OSError):  # it does no harm
                os.unlink(final / NAMED_LATEST)
        self._discard(staging)  # after an exchange, the replaced checkpoint lies here

    def abandon(self, tag: str, token: str) -> None:
        staging = self.staging(tag, token)
        if self.begun(tag, token):
            with contextlib.suppress(OSError):  # the next save removes it
                self._remove_folder(staging)

    def delete(self, tag: str) -> None:
        self._remove_folder(tag)

    def committed_at(self, tag: str) -> float:
        return os.stat(f"{self._prefix}{tag}/{MANIFEST}").st_mtime_ns

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if self._is_leftover(name)]

    def clean(self) -> list[str]:
        names = self.leftovers()
        self._sweep(names)
        return names

    def _is_leftover(self, name: str) -> bool:
        if _TEMPORARY(name):
            return True
        return leftover_tag(name) is not None and os.path.isdir(self._prefix + name)

    def _sweep(self, names: Iterable[str]) -> None:
        """Remove what earlier saves and deletions have left, as far as possible: nothing needs it gone."""
        for name in names:
            if not self._is_leftover(name):
                continue
            try:
                if _TEMPORARY(name):
                    os.unlink(self._prefix + name)
                else:
                    self._remove_folder(name)
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                say_once(f"{self.where(name)} can't be removed: {error}")

    def _remove_folder(self, name: str) -> None:
        """Remove a folder as far as possible, under a name that nothing but removals uses.

        Raises:
            OSError: it can't be renamed.
        """
        if not name.startswith(DELETING):
            tag = re.sub(rf"\.[0-9a-f]{{{TOKEN}}}$", "", leftover_tag(name) or name)[:200]
            hidden = f"{DELETING}{tag}.{uuid.uuid4().hex}"
            os.rename(self._prefix + name, self._prefix + hidden)
            name = hidden
        try:
            files.sync_folder(self._folder)  # first: a crash mustn't bring a half-removed checkpoint back
        except OSError as error:
            say_once(f"{self.where(name)} isn't removed yet, as {self._folder} can't be synced: {error}")
            return
        self._discard(self._folder / name)

    def _discard(self, folder: Path) -> None:
        error = files.remove_tree(folder)
        if error is not None:
            say_once(f"{folder} can't be removed: {error}; remove it by hand")

    def _put_in_place(self, staging: Path, final: Path, manifest: bytes) -> None:
        """Give a finished save its name, in one step."""
        exists = self.exists(final.name)
        try:
            if exists:
                files.exchange_folders(staging, final)
            else:
                staging.rename(final)
        except OSError as error:
            with contextlib.suppress(OSError):  # on a network the answer may be lost, but the step done
                if (final / MANIFEST).read_bytes() == manifest:
                    return
            if exists:
                raise CheckpointError(
                    f"{final} exists and can't be replaced in one step on this file system ({error}); "
                    "save under another tag, or delete it first"
                ) from error
            raise

    def _check_own(self, tag: str, token: str) -> None:
        if not self.begun(tag, token):
            raise CheckpointError(
                f"another save has begun since this one of {self.where(tag)} did, and took it for dead"
            )

    def _check_replaceable(self, tag: str) -> None:
        if self.exists(tag) and not self.exists(f"{tag}/{MANIFEST}"):
            raise CheckpointError(
                f"{self.where(tag)} exists and is not a checkpoint; save under another tag, or move it away"
            )

    # --- the lock --------------------------------------------------------------------------------------

    def lock_create(self, token: str, content: bytes) -> bool:
        own = f"{self._prefix}{WRITER}.{token}"
        files.write_file(own, [content], durable=False)
        try:
            try:
                os.link(own, self._prefix + WRITER)  # in one step with its content
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                files.write_file(self._prefix + WRITER, [content], durable=False)
        except (FileExistsError, FileNotFoundError):  # the latter: its holder has swept this one's file away
            return False
        finally:
            with contextlib.suppress(OSError):  # the next save removes it
                os.unlink(own)
        return True

    def lock_read(self) -> bytes | None:
        try:
            return self.read(WRITER)
        except FileNotFoundError:
            return None
        except OSError:
            return b""

    def lock_stamp(self) -> Hashable:
        try:
            return os.stat(self._prefix + WRITER).st_mtime_ns
        except FileNotFoundError:
            return None

    def lock_age(self, token: str) -> float:
        stamp, probe = self.lock_stamp(), f"{self._prefix}{WRITER}.{token}"
        files.write_file(probe, [b"?"], durable=False)  # has the time of the file system, not of this machine
        try:
            now = os.stat(probe).st_mtime_ns
            os.unlink(probe)
        except FileNotFoundError:  # the lock's holder has swept it away, so it is alive
            return 0.0
        return (now - stamp) / 1e9 if isinstance(stamp, int) else 0.0

    def lock_beat(self, content: bytes) -> None:
        os.utime(self._prefix + WRITER)

    def lock_remove(self, content: bytes) -> None:
        path = self._prefix + WRITER
        try:
            with _opened_to_lock(path) as fd:
                # Of all who found the same lock, one removes it, and none the next one's.
                if os.read(fd, len(content) + 1) == content and os.path.samestat(os.fstat(fd), os.stat(path)):
                    os.unlink(path)
        except (FileNotFoundError, BlockingIOError):
            pass  # another process is removing it


@contextlib.contextmanager
def _opened_to_lock(path: str) -> Iterator[int]:
    """Open a file that no other process has opened so; raises BlockingIOError if one has."""
    try:
        fd = os.open(path, os.O_RDWR)  # as network file systems lock only what can be written
    except PermissionError:
        fd = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without such locks
        yield fd
    finally:
        os.close(fd)


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents, so that the names of those made survive a crash."""
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        files.sync_folder(folder.parent)
