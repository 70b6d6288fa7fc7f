"""A run's folder on a file system, by direct calls.

A save is written into the hidden folder `.saving.<tag>`. The commit is one rename to `<tag>`, after every
file and folder, the manifest last, is on the disk. A crash before it leaves a hidden folder that readers
ignore. A tag that is saved again is exchanged for its replacement in one step, so it can be read at any time.
A checkpoint is deleted by a rename to `.deleting.<tag>`, from which on it doesn't exist.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError
from ckpt.format import DELETING, LATEST, MANIFEST, SAVING, leftover_tag
from ckpt.stores import files
from ckpt.stores.mounts import can_share_files
from ckpt.threads import Scratch


class LocalStore:
    """Store in a local folder; see `ckpt.stores.Store`."""

    threads: int | None = None
    window = 1 << 20  # large enough to stream, small enough to be summed in the processor's cache

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self._folder = folder
        self._scratch = Scratch()
        self.shares_files = can_share_files(folder)
        self._prefix = f"{folder}/"  # a string, as pathlib takes longer than writing a small file

    def where(self, path: str) -> str:
        return f"{self._prefix}{path}" if path else str(self._folder)

    # --- objects ---------------------------------------------------------------------------------------

    def read(self, path: str) -> bytes:
        with open(self._prefix + path, "rb") as file:
            return file.read()

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        with files.opened(self._prefix + path) as fd:
            return files.read_into(fd, buffer, offset)

    def size(self, path: str) -> int:
        return os.stat(self._prefix + path).st_size

    def exists(self, path: str) -> bool:
        return os.path.exists(self._prefix + path)

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

    def staging(self, tag: str) -> str:
        return SAVING + tag

    def begin(self, tag: str, token: str) -> None:
        _make_durably(self._folder)
        self._check_replaceable(tag)
        self.clean()
        os.mkdir(self._prefix + SAVING + tag)
        files.write_file(self._mark(tag), [token.encode()], durable=False)

    def begun(self, tag: str, token: str) -> bool:
        try:
            return Path(self._mark(tag)).read_text() == token
        except OSError:
            return False

    def _mark(self, tag: str) -> str:
        return f"{self._prefix}{SAVING}{tag}/.token"

    def sync(self, tag: str) -> None:
        files.sync_tree(self._folder / (SAVING + tag))

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        staging, final = self._folder / (SAVING + tag), self._folder / tag
        self._check_own(tag, token)  # before writing into what may be another save's folder
        for name, content in documents.items():
            files.write_file(staging / name, [content], durable=durable)
        self._check_own(tag, token)  # again: the writes took time
        os.unlink(self._mark(tag))
        if durable:
            files.sync_folder(staging)  # before the rename, which must not become durable before its content
        self._check_replaceable(tag)
        if final.exists():
            try:
                files.exchange_folders(staging, final)
            except OSError as error:
                raise CheckpointError(
                    f"{final} exists and can't be replaced in one step on this file system ({error}); "
                    "save under another tag, or delete it first"
                ) from error
        else:
            staging.rename(final)
        try:
            if durable:
                files.sync_folder(self._folder)  # the rename, before `latest` names its result
            if update_latest:
                files.replace_file(self._folder / LATEST, f"{tag}\n".encode(), durable=durable)
        except OSError as error:
            raise CheckpointError(f"{final} is committed, but {LATEST!r} may not name it: {error}") from error
        # After an exchange, the replaced checkpoint lies here. The next save removes what this one can't.
        shutil.rmtree(staging, ignore_errors=True)

    def abandon(self, tag: str, token: str) -> None:
        with contextlib.suppress(OSError):  # without a whole mark, this save got no further than `begin`
            if not token.startswith(Path(self._mark(tag)).read_text()):
                return  # another save has begun since
        shutil.rmtree(self._folder / (SAVING + tag), ignore_errors=True)

    def delete(self, tag: str) -> None:
        hidden = self._folder / (DELETING + tag)
        if hidden.exists():  # left by a deletion that was cut short
            shutil.rmtree(hidden)
        (self._folder / tag).rename(hidden)
        files.sync_folder(self._folder)  # first: a crash mustn't bring a half-removed checkpoint back
        shutil.rmtree(hidden)

    def committed_at(self, tag: str) -> float:
        return os.stat(f"{self._prefix}{tag}/{MANIFEST}").st_mtime_ns

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if leftover_tag(name) and os.path.isdir(self._prefix + name)]

    def clean(self) -> list[str]:
        names = self.leftovers()
        for name in names:
            shutil.rmtree(self._folder / name)
        return names

    def _check_own(self, tag: str, token: str) -> None:
        if not self.begun(tag, token):
            raise CheckpointError(f"another save of {self.where(tag)} has begun since this one did")

    def _check_replaceable(self, tag: str) -> None:
        if self.exists(tag) and not self.exists(f"{tag}/{MANIFEST}"):
            raise CheckpointError(
                f"{self.where(tag)} exists and is not a checkpoint; save under another tag, or move it away"
            )


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents, so that the names of those made survive a crash."""
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        files.sync_folder(folder.parent)
