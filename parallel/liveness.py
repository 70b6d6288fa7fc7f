"""Signs of life of ranks, so that one that is slow is told apart from one that is gone.

Each rank changes a number in the rendezvous store every few seconds. A rank that waits for another looks at
that one's number: if it stands still, the other is stopped, or its machine is gone. The first that finds out
writes down why, and all others end with the same words. If the store itself gives no answer, each says so.

A rank is waited for by signs only from its first one on: before, nobody can know whether it will come.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from parallel.store_calls import SilentStoreError, StoreCalls

INTERVAL = 5.0
"""Longest time between two signs of life, in seconds."""

SHORTEST = 0.02
"""Shortest such time. It is a twentieth of a patience between."""

PATIENCE = 600.0
"""Seconds without a sign of life after which a rank counts as gone, unless it is set."""

LONGEST_PAUSE = 0.5
"""Longest time between two looks for ranks that haven't come, in seconds."""

PROMPT_S = 0.1
"""Time within which a store answers at once, whatever the pace of the signs."""

MOST_NAMED = 8
"""Ranks that a message names."""

GONE = "ended or stopped, or the machine is gone"
"""State of a rank without signs of life."""

OWNER = "which rank 0's process has, or torchrun's"
"""Owner of the rendezvous store."""

Signs = dict[int, bytes]
"""Last sign of each rank that has given one."""


class Liveness:
    """Signs of life of the ranks that share some connections."""

    def __init__(
        self, store: Any, rank: int, size: int, patience: float = PATIENCE, beside: Liveness | None = None
    ) -> None:
        """Tell that this rank has come, and begin to give signs.

        `store` is these ranks' own part of the rendezvous store. The signs are those of `beside`, if the same
        ranks give some already: then a rank that is lost before it comes here is known to be.
        """
        self._store, self._rank, self._size = StoreCalls(store, patience), rank, size
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._without_store = math.inf  # time at which the store's process was found to have ended
        self._beside = beside  # so that it lives
        self._signs: StoreCalls = self._store if beside is None else beside._signs
        self._pace: _Pace = _Pace(_interval(patience)) if beside is None else beside._pace
        if beside is None:
            giving = threading.Thread(target=_give_signs, args=(store, rank, self._pace), daemon=True)
            giving.start()
            # At exit it must have ended: a thread in the store's code can't outlive the interpreter.
            self._end = weakref.finalize(self, _ended, self._pace, giving, self._store)
            # A sign before the others go on: one that never gave any isn't missed.
            self._signs.set(_sign(rank), _written(0, self._pace))
        self._store.set(_here(rank), "")

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which a rank counts as gone."""
        seconds: float = self._store.seconds
        return seconds

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._store.seconds = self._signs.seconds = seconds
        self._pace.interval = _interval(seconds)
        self._pace.changed.set()

    @property
    def interval(self) -> float:
        """Seconds between two signs of this rank, and between two looks at another's."""
        return self._pace.interval

    def end(self) -> None:
        """Give no more signs, and take back what was told. Local."""
        with suppress(RuntimeError):
            self._store.delete_key(_here(self._rank))
            if self._beside is None:
                self._end()
                self._store.delete_key(_sign(self._rank))

    def come(
        self,
        peers: Collection[int],
        seconds: float,
        works: Collection[int] = (),
        answer: Callable[[], None] | None = None,
    ) -> str | None:
        """Wait until these ranks have come; return why they won't, or None. Local.

        `works` are those of the ranks' other signs, `beside`, which may fail meanwhile. With `answer`, which
        tells ranks where to come, all are waited for.
        """
        expected = peers if answer is None else [rank for rank in range(self._size) if rank != self._rank]
        deadline, pause = time.monotonic() + seconds, SHORTEST / 4
        try:
            while not self._store.check([_here(rank) for rank in expected]):
                if answer is not None:
                    answer()
                reason = self.reason() or (self._beside.reason(works) if self._beside else None)
                # Those that have come may be lost while others are waited for.
                if reason := reason or next(filter(None, map(self.lost, peers)), None):
                    return reason
                if time.monotonic() > deadline:
                    missing = [rank for rank in expected if not self._store.check([_here(rank)])]
                    return f"{named(missing)} didn't come within {seconds:g} s" if missing else None
                time.sleep(pause)
                pause = min(2 * pause, self.interval, LONGEST_PAUSE)
        except SilentStoreError as error:
            return str(error)
        except RuntimeError as error:
            return f"the connection to the rendezvous store is lost, {OWNER}: {error}"
        return None

    def reason(self, works: Collection[int] = ()) -> str | None:
        """Return why these ranks can't go on, or can't end one of these works, if one has said so. Local.

        Without the store nobody can say so, nor give signs: after `patience` that is the reason.
        """
        try:
            for key in ("lost", *map(_left, works)):
                if self._store.check([key]):
                    return self._store.get(key).decode()
        except SilentStoreError as error:
            return str(error)
        except RuntimeError:  # its process has ended, as rank 0's may when it has nothing left to do
            now = time.monotonic()
            self._without_store = min(self._without_store, now)
            if now - self._without_store >= self.patience:
                return f"the connection to the rendezvous store is lost, {OWNER}"
        return None

    def tell(self, reason: str, work: int | None = None) -> str:
        """Say why these ranks can't go on, or can't end one work; return the words of the first that did.

        Local.
        """
        return tell(self._store, reason, work)

    def lost(self, peer: int) -> str | None:
        """Return which ranks are gone, in words, if `peer` is. Local."""
        gone = self.gone(peer)
        if not gone:
            return None
        return f"{named(gone)} gave no sign of life for {self.patience:g} s: {GONE}"

    def lost_neighbour(self) -> str | None:
        """Return what `lost` says of the next rank. Local."""
        return self.lost((self._rank + 1) % self._size)

    def look(self) -> Signs:
        """Read the last sign of each rank. Local."""
        keys = [_sign(rank) for rank in range(self._size)]
        try:
            if self._signs.check(keys):
                return dict(enumerate(self._signs.multi_get(keys)))
        except RuntimeError:
            return {}
        return {rank: sign for rank in range(self._size) if (sign := self._read(rank)) is not None}

    def silent(self, since: Signs) -> list[int]:
        """Return the ranks that have given no sign since these, which `time_for_signs` was waited for. Local.

        A store that is held up, see `store_calls.LEAST_S`, holds up the signs of ranks that are well. So it
        must have answered two looks in a row at once, and signs had the time to come in between.
        """
        pause, prompt = time_for_signs(since), 0
        at_once = max(pause, PROMPT_S)
        silent = {rank: sign for rank, sign in since.items() if rank != self._rank}
        while silent and prompt < 2:
            begun = time.monotonic()
            now = self.look()
            silent = {rank: sign for rank, sign in silent.items() if now.get(rank) == sign}
            prompt += 1
            wait = min(pause, 1.0)  # for signs that were on their way to a store that goes on
            if time.monotonic() - begun > at_once:
                prompt, wait, at_once = 0, pause, 2 * at_once  # one that is always slow must do in the end
            if silent and prompt < 2:
                time.sleep(wait)
        return [*silent]

    def gone(self, peer: int) -> list[int]:
        """Return the ranks that give no sign if `peer` has given none for `patience`. Local.

        Takes two intervals if it seems so.
        """
        now, sign = time.monotonic(), self._read(peer)
        before, since = self._seen.get(peer, (b"", now))
        if sign is None or sign != before:
            since = now
        self._seen[peer] = sign or b"", since
        if now - since < self.patience - 2 * _interval_in(sign):
            return []
        signs = self.look()
        time.sleep(time_for_signs(signs))
        gone = self.silent(signs)
        return gone if peer in gone else []

    def _read(self, rank: int) -> bytes | None:
        """Return a rank's last sign; None if it can't be known."""
        try:
            return self._signs.get(_sign(rank)) if self._signs.check([_sign(rank)]) else None
        except RuntimeError:
            return None


def tell(store: StoreCalls, reason: str, work: int | None = None) -> str:
    """Say why the ranks of this part of a store can't go on; return the words of the first that did."""
    try:
        return store.compare_set("lost" if work is None else _left(work), "", reason).decode()
    except RuntimeError:
        return reason


def time_for_signs(after: Signs) -> float:
    """Return the seconds in which each rank gives another sign after these."""
    return 2 * max(map(_interval_in, after.values()), default=0.0)


def named(ranks: list[int]) -> str:
    """Return ranks as words for a message."""
    some = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}{more}"


class _Pace:
    """Pace at which a rank's thread gives signs."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.changed = threading.Event()
        self.ended = False


def _interval(patience: float) -> float:
    """Return the seconds between two signs, so that a rank that is gone is known soon after `patience`."""
    return min(INTERVAL, max(SHORTEST, patience / 20))


def _sign(rank: int) -> str:
    return f"alive/{rank}"


def _here(rank: int) -> str:
    return f"here/{rank}"


def _left(work: int) -> str:
    return f"left/{work}"


def _written(count: int, pace: _Pace) -> str:
    """Return a sign, which tells when to expect the next."""
    return f"{count} {pace.interval}"


def _interval_in(sign: bytes | None) -> float:
    """Return the seconds after which a rank that gave this sign gives the next."""
    return float(sign.partition(b" ")[2]) if sign else 0.0


def _give_signs(store: Any, rank: int, pace: _Pace) -> None:
    count = 1
    with suppress(RuntimeError):  # the store's process has ended
        while not pace.ended:
            store.set(_sign(rank), _written(count, pace))
            count += 1
            pace.changed.wait(pace.interval)
            pace.changed.clear()


def _ended(pace: _Pace, giving: threading.Thread, store: StoreCalls) -> None:
    pace.ended = True
    pace.changed.set()
    if giving is not threading.current_thread() and not store.silent:  # the first: where garbage is collected
        giving.join(timeout=5)
