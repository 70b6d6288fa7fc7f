"""The lock of a run in an object store: an object that is put anew as a sign of life."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable

from ckpt.checksums import Buffer
from ckpt.format import WRITER
from ckpt.stores.writer_lock import Owner


class LockObject(ABC):
    """The part of a store that is the place of its lock; see `ckpt.stores.writer_lock.LockPlace`."""

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def write(self, path: str, parts: Iterable[Buffer], *, durable: bool) -> None: ...

    @abstractmethod
    def put_new(self, path: str, content: bytes) -> None:
        """Put an object; raises FileExistsError if there is one and the place can tell."""

    @abstractmethod
    def remove(self, path: str) -> None: ...

    @abstractmethod
    def modified(self, path: str) -> float:
        """Return the time of an object by the place's clock."""

    def lock_create(self, token: str, content: bytes) -> bool:
        if self.lock_read() is not None:
            return False
        with contextlib.suppress(FileExistsError):
            self.put_new(WRITER, content)
        found = Owner.decoded(self.lock_read() or b"")  # two may have found none: the last one has it
        return found is not None and found.token == token

    def lock_read(self) -> bytes | None:
        try:
            return self.read(WRITER)
        except FileNotFoundError:
            return None

    def lock_stamp(self) -> Hashable:
        return self.lock_read()

    def lock_age(self, token: str) -> float:
        probe = f"{WRITER}.{token}"  # has the time of the store, not of this machine
        try:
            self.write(probe, [b"?"], durable=True)
            now, then = map(self.modified, (probe, WRITER))
        except OSError:
            return 0.0
        finally:
            with contextlib.suppress(OSError):
                self.remove(probe)
        return now - then

    def lock_beat(self, content: bytes) -> None:
        self.write(WRITER, [content], durable=True)

    def lock_remove(self, content: bytes) -> None:
        found = self.lock_read()
        owners = [Owner.decoded(data or b"") for data in (found, content)]
        if found == content or (owners[0] and owners[1] and owners[0].token == owners[1].token):
            with contextlib.suppress(FileNotFoundError):
                self.remove(WRITER)
