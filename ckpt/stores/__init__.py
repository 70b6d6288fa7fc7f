"""Stores of a run's checkpoints: a local folder, or any URL that fsspec knows.

    local           a folder
    remote          a URL, through fsspec
    remote_lock     an object as the lock of a run
    remote_errors   errors of fsspec's file systems, in one form
    files           system calls on files and folders: durable writes, renames, links
    writer_lock     the lock of a run's folder: one process writes at a time
    mounts          file systems on which several processes can't write one file

A store reads and writes objects by their path relative to the run's folder. It also does the three things
that differ between places: write a checkpoint that nobody sees before its commit, replace `latest` in one
step, and delete a checkpoint so that a crash half-way leaves nothing that looks like one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from ckpt.background import join_all
from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError
from ckpt.format import MOST_DOCUMENT_BYTES
from ckpt.shards import Files


class Store(Protocol):
    """Objects below one folder. Paths are relative, with '/' between their parts.

    Errors of the place itself are OSErrors, and FileNotFoundError for an object that doesn't exist.
    """

    url: str
    """URL or path of the folder, as the user gave it."""
    threads: int | None
    """Number of calls worth making at a time; None for as many as there are cores."""
    window: int
    """Approximate number of bytes to read at a time."""
    shares_files: bool
    """True if several processes can write parts of one object at the same time."""
    links: bool
    """True if an object can have a second name, so that it is worth comparing with what is to be written."""

    def where(self, path: str) -> str:
        """Return the object's full name, for messages."""

    # --- objects ---

    def read(self, path: str, most: int = MOST_DOCUMENT_BYTES) -> bytes:
        """Return the object; raises OSError if it has more than `most` bytes, or isn't a plain file."""

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` of the object; return the bytes read, fewer only at its end."""

    def size(self, path: str) -> int: ...

    def exists(self, path: str) -> bool: ...

    def names(self) -> list[str]:
        """Return the names directly in the folder; none if the folder doesn't exist."""

    def make_folders(self, paths: Iterable[str]) -> None:
        """Make these folders, if the place has folders."""

    def write(self, path: str, parts: Iterable[Buffer], *, durable: bool) -> None:
        """Write a new object from `parts`, one behind the other.

        `durable` announces a later `sync`, so that writing to the disk can begin at once.
        """

    def write_into(self, path: str, runs: Iterable[tuple[int, Iterable[Buffer]]], *, durable: bool) -> None:
        """Write runs of bytes, each from its offset, into an object that other processes write too."""

    def same(self, path: str, offset: int, parts: Iterable[Buffer]) -> bool:
        """Return whether the object has these bytes at `offset`; False if the place has no links."""

    def link(self, old: str, new: str) -> bool:
        """Give an object a second name without copying it; return False if the place can't.

        Raises:
            FileExistsError: there is an object of that name.
        """

    def copy(self, old: str, new: str) -> None:
        """Copy an object; raises as `link` does."""

    # --- a checkpoint from its first object to its end ---

    def hold(self, token: str, what: str) -> None:
        """Take the lock of the folder, as the only writer; `what` tells others what this process does.

        Raises:
            CheckpointError: another process has it, which the message names.
        """

    def release(self) -> None:
        """Give the lock back, if this store has it."""

    def staging(self, tag: str, token: str) -> str:
        """Return the folder in which the save with this token writes."""

    def begin(self, tag: str, token: str) -> list[str]:
        """Make the save's place, and remove the leftovers of others where that can be done.

        Returns:
            The names in the run's folder before.

        Raises:
            CheckpointError: the tag can't be saved here.
        """

    def begun(self, tag: str, token: str) -> bool:
        """Return whether this process sees what `begin` made with `token`; not if another has begun since."""

    def sync(self, tag: str, token: str) -> None:
        """Make everything that this machine wrote for the save durable."""

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        """Write the last documents in order, the manifest at the end; commit; then point `latest` at the tag.

        Raises:
            CheckpointError: another save of the tag has begun since, the tag can't be replaced, or the
                checkpoint is committed but `latest` couldn't be updated.
        """

    def abandon(self, tag: str, token: str) -> None:
        """Remove the objects of a failed save as far as possible, and never those of another."""

    def delete(self, tag: str) -> None:
        """Delete a committed checkpoint. It stops existing in one step, before any object is removed.

        Objects that can't be removed then are left; they are reported once.
        """

    def committed_at(self, tag: str) -> float:
        """Return the time of the commit as a number that grows."""

    def leftovers(self) -> list[str]:
        """Return the names of unfinished saves and deletions."""

    def clean(self) -> list[str]:
        """Remove the leftovers where that can be done; return the names of those that were there.

        The caller holds the lock.
        """


def open_store(url: str | Path) -> Store:
    """Open the store at `url`: a path, `file://...`, or a URL of any protocol that fsspec has.

    Saves that this process has in the background are waited for.

    Raises:
        CheckpointError: `url` is none, the protocol is unknown, or its package isn't installed.
    """
    from ckpt.stores.local import LocalStore

    text = str(check_run(url))
    join_all()
    scheme, separator, rest = text.partition("://")
    if not separator or scheme in ("file", "local"):
        return LocalStore(text, Path(rest if separator else text))
    from ckpt.stores.remote import RemoteStore  # imports fsspec, which local runs don't need

    try:
        return RemoteStore(text)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{text} can't be opened: {error}") from None


def files_for(run: str | Path) -> Files:
    """Return what a file should hold at `run`: a whole array, if several ranks can write one file there."""
    return "array" if open_store(run).shares_files else "writer"


def as_store(run: str | Path | Store) -> Store:
    """Return the store at a path or URL; a store as it is."""
    return cast(Store, run) if hasattr(run, "committed_at") else open_store(cast(str, run))


def check_run(run: Any) -> str | Path:
    """Return `run` if it can be the folder or the URL of a run.

    Raises:
        CheckpointError: it is empty or of another type.
    """
    if isinstance(run, os.PathLike):
        return Path(run)
    if not isinstance(run, str) or not run:
        raise CheckpointError(f"the folder is {run!r}; expected a path or URL ('.' is the current folder)")
    return run
