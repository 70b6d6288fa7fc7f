"""Where a run's checkpoints lie: a folder of this machine's file systems, or any URL that fsspec knows.

A store knows objects by their path below the run's folder, and what a checkpoint needs of a place: writing
one that nobody sees before its commit, replacing `latest` in one step, and taking a checkpoint away so that
a crash half-way leaves nothing that looks like one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ckpt.checksums import Buffer
from ckpt.errors import CheckpointError


class Store(Protocol):
    """Objects below one folder. Paths are relative, with '/' between their parts.

    Errors of the place itself are OSErrors, FileNotFoundError where there is no such object.
    """

    url: str
    """As the user named it."""
    threads: int | None
    """How many calls at a time are worth it; None: as many as there are cores for."""
    window: int
    """About how many bytes to read at a time."""

    def where(self, path: str) -> str:
        """The object's full name, for messages."""
        ...

    # --- objects ---

    def read(self, path: str) -> bytes: ...

    def read_into(self, path: str, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` of the object; returns the bytes read, fewer only at its end."""
        ...

    def size(self, path: str) -> int: ...

    def exists(self, path: str) -> bool: ...

    def names(self) -> list[str]:
        """What lies directly in the folder; empty where there is no such folder."""
        ...

    def make_folders(self, paths: Iterable[str]) -> None:
        """Prepare for objects in these folders."""
        ...

    def write(self, path: str, parts: Iterable[Buffer], *, durable: bool) -> None:
        """Write a new object from `parts`, one behind the other.

        `durable` says that a `sync` will follow, which may then find most of its work done.
        """
        ...

    def same(self, path: str, parts: Sequence[Buffer]) -> bool:
        """Whether the object consists of exactly these bytes."""
        ...

    def link(self, old: str, new: str) -> bool:
        """Give an object a second name, without copying it; False where the place can't."""
        ...

    # --- a checkpoint from its first object to its end ---

    def staging(self, tag: str) -> str:
        """The folder in which a save writes; known to all ranks without a word."""
        ...

    def begin(self, tag: str, token: str) -> None:
        """Make that folder anew, marked by `token`; what other saves left behind is removed."""
        ...

    def begun(self, tag: str, token: str) -> bool:
        """Whether what `begin` did with this token is seen from here."""
        ...

    def sync(self, tag: str) -> None:
        """Make everything that this machine wrote for `tag` durable."""
        ...

    def commit(
        self, tag: str, token: str, documents: Mapping[str, bytes], *, durable: bool, update_latest: bool
    ) -> None:
        """Write the last documents in their order, the manifest at the end; from then on the checkpoint
        exists. Then point `latest` at it. Refused if another save of the tag has begun since."""
        ...

    def abandon(self, tag: str, token: str) -> None:
        """Remove what a failed save wrote, as far as that can be done, but not what another one did."""
        ...

    def delete(self, tag: str) -> None:
        """Remove a committed checkpoint. It stops existing in one step, before anything of it is gone."""
        ...

    def committed_at(self, tag: str) -> float:
        """When it was committed, in a number that grows."""
        ...

    def leftovers(self) -> list[str]:
        """Names of what crashed saves and deletions left behind."""
        ...

    def clean(self) -> list[str]:
        """Remove the leftovers; returns their names."""
        ...


def open_store(url: str | Path) -> Store:
    """The store at `url`: a path, `file://...`, or a URL of any protocol that fsspec has.

    Raises:
        CheckpointError: the protocol isn't known, or its package isn't installed.
    """
    from ckpt.stores.local import LocalStore

    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme in ("file", "local"):
        return LocalStore(text, Path(rest if separator else text))
    from ckpt.stores.remote import RemoteStore  # fsspec is imported only by those who need it

    try:
        return RemoteStore(text)
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{text} can't be opened: {error}") from None
