"""The lock of a run's folder: one process writes at a time, and whoever comes second is told of the first.

The lock is an object beside the checkpoints that says who holds it, and is touched every few seconds. A
holder on this machine whose process has ended is dead at once; any other when its last sign of life is too
old. A dead one's lock is taken over, so that a job that was killed can be resumed. A command that removes
something beside a run that trains is waited for.

No checkpoint's wholeness rests on the lock. A holder that was only slow, and lost it, finds that its files
were moved away and fails. So neither clocks nor a lock that can't be removed can do more than refuse a save.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Hashable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from ckpt.errors import CheckpointError
from ckpt.format import WRITER

UNKNOWN = "?"
"""Stands for the time at which a process began, where the system doesn't tell."""

_MOST_TRIES = 100
"""Times that a lock may vanish, or outlive its removal, before a save gives up."""

DELETING = "deleting old checkpoints"
CLEANING = "removing leftovers"
_PATIENCE_SECONDS = 600.0
"""Longest wait for one of these, which a command does beside a run that trains."""

_log = logging.getLogger("ckpt")
_said: set[str] = set()
_held: set[str] = set()
"""Tokens of the locks that this process holds."""


def say_once(text: str) -> None:
    """Log a warning, unless this process has logged it before: a leftover that stays is met at each save."""
    if text not in _said:
        _said.add(text)
        _log.warning(text)


class LockPlace(Protocol):
    """Where the lock lies."""

    beat_seconds: float
    """Time between two signs of life."""
    dead_seconds: float
    """Age of the last sign of life from which on a holder is taken for dead."""

    def where(self, path: str) -> str: ...

    def lock_create(self, token: str, content: bytes) -> bool:
        """Make the lock if there is none; return whether it was made."""

    def lock_read(self) -> bytes | None:
        """Return the lock's content, empty if it can't be read; None if there is none."""

    def lock_stamp(self) -> Hashable:
        """Return a value that every sign of life changes."""

    def lock_age(self, token: str) -> float:
        """Return the seconds since the last sign of life by the place's own clock; 0 if it has none."""

    def lock_beat(self, content: bytes) -> None:
        """Give a sign of life."""

    def lock_remove(self, content: bytes) -> None:
        """Remove the lock if it is still that of the owner in `content`, as far as the place can tell."""


class Owner(NamedTuple):
    """A process that holds a lock."""

    token: str
    what: str
    """Its work, for messages."""
    host: str
    machine: str
    """Identity of what numbers its processes: a boot of a machine, or of a container on it."""
    pid: int
    started: str
    """When the process began, as the system counts: numbers of processes are used again."""
    since: str

    @classmethod
    def decoded(cls, content: bytes) -> Owner | None:
        """Return the owner that a lock names; None if that isn't known."""
        try:
            found = json.loads(content)
            owner = cls(**{name: found[name] for name in cls._fields})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        texts = owner.token, owner.what, owner.host, owner.machine, owner.started, owner.since
        return owner if type(owner.pid) is int and all(isinstance(text, str) for text in texts) else None

    def encoded(self, beat: int = 0) -> bytes:
        return (json.dumps(self._asdict() | {"beat": beat}) + "\n").encode()

    @property
    def is_waited_for(self) -> bool:
        """True if it only removes something, in another process: no save is to be lost to that."""
        return self.what in (DELETING, CLEANING) and self.token not in _held

    @property
    def has_ended(self) -> bool:
        """True if it ran on this machine, and doesn't any more; False if it does or that isn't known."""
        if self.machine != machine():
            return False
        if self.pid == os.getpid() and self.started == _started(self.pid):
            return self.token not in _held  # left by an earlier save of this process
        found = _started(self.pid)
        return found is None or (UNKNOWN not in (found, self.started) and found != self.started)


class Lock:
    """The lock, while this process holds it."""

    def __init__(self, place: LockPlace, owner: Owner) -> None:
        """Take the lock; wait for a sign of life if a holder elsewhere may be dead.

        Raises:
            CheckpointError: another process is writing; the message names it.
        """
        self._place = place
        self._owner = owner
        self._mutex = threading.Lock()
        self._end = threading.Event()
        _held.add(owner.token)
        try:
            self._owned = self._taken()
        except BaseException:
            _held.discard(owner.token)
            raise
        if self._owned:
            # A daemon, as the thread that saves is the one that the process must wait for.
            threading.Thread(target=self._beat, name="ckpt's heartbeat", daemon=True).start()

    def is_lost(self) -> bool:
        """Return whether another process has taken the lock, as if this one were dead."""
        if not self._owned:
            return False
        found = Owner.decoded(self._place.lock_read() or b"")
        return found is None or found.token != self._owner.token

    def release(self) -> None:
        """Remove the lock, unless another process has it."""
        self._end.set()
        try:
            with self._mutex:  # a sign of life on its way would bring it back
                if self._owned:
                    self._place.lock_remove(self._owner.encoded())
        except OSError as error:
            say_once(f"{self._place.where(WRITER)} can't be removed: {error}")
        finally:
            self._owned = False
            _held.discard(self._owner.token)

    def _taken(self) -> bool:
        """Take the lock; return False if a dead holder's can't be removed, without which it goes as well."""
        place, token = self._place, self._owner.token
        watched: tuple[Hashable, float] | None = None  # the stamp, and when it is too old
        vain, patience = 0, time.monotonic() + _PATIENCE_SECONDS
        while not place.lock_create(token, self._owner.encoded()):
            content = place.lock_read()
            if vain == _MOST_TRIES:
                raise CheckpointError(_refusal(place, Owner.decoded(content or b"")))
            if content is None:  # it was removed meanwhile
                vain += 1
                continue
            other = Owner.decoded(content)
            if other is None or not other.has_ended:
                stamp, now = place.lock_stamp(), time.monotonic()
                waits = other is not None and other.is_waited_for and now < patience
                if watched is None or (waits and stamp != watched[0]):
                    watched = stamp, now + place.dead_seconds - place.lock_age(token)
                is_here = other is not None and other.machine == machine()
                if stamp != watched[0] or (is_here and not waits and now < watched[1]):
                    raise CheckpointError(_refusal(place, other))
                if now < watched[1]:
                    time.sleep(min(place.beat_seconds / 4, watched[1] - now))
                    continue
            try:
                place.lock_remove(content)
            except OSError as error:
                say_once(
                    f"{place.where(WRITER)} is left by a process that ended, and can't be removed: {error}"
                )
                return False
            watched = None
            if vain:  # another process is removing it
                time.sleep(0.01)
            vain += 1
        return True

    def _beat(self) -> None:
        beat = 0
        while not self._end.wait(self._place.beat_seconds):
            beat += 1
            try:
                with self._mutex:
                    if self._end.is_set() or self.is_lost():
                        return
                    self._place.lock_beat(self._owner.encoded(beat))
            except OSError:
                pass  # the next one may get through; if none does, the lock is taken, and the save fails


def _refusal(place: LockPlace, other: Owner | None) -> str:
    who = "another process" if other is None else f"process {other.pid} on {other.host}"
    if other is not None and (other.machine, other.pid) == (machine(), os.getpid()):
        who = "this process"
    doing = "" if other is None else f" ({other.what}, since {other.since})"
    return (
        f"{place.where('')} is being written by {who}{doing}, and only one may write into a run at a time: "
        "wait until it is done or end it, or save into another folder"
    )


def this_process(token: str, what: str) -> Owner:
    """Return this process as the holder of a lock."""
    pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
    return Owner(token, what, socket.gethostname(), machine(), pid, _started(pid) or UNKNOWN, since)


@lru_cache
def machine() -> str:
    """Return the identity of what numbers this process: the boot of a machine, and the container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """Return when a process began, as the system counts; None if it has ended, or only waits to be reaped."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # no Linux, or the processes of others are hidden
        return UNKNOWN if _exists(pid) else None
    fields = text.rpartition(b")")[2].split()  # the name before may hold spaces (man 5 proc)
    return None if fields[0] in (b"Z", b"X") else fields[19].decode()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
