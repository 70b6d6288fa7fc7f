"""Signs of life of ranks, so that one that is slow is told apart from one that is gone.

Each rank changes a number in the rendezvous store every few seconds. A rank that waits for another looks at
that one's number: if it stands still, the other is stopped, or its machine is gone. The first that finds out
writes down why, and all others end with the same words.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import suppress
from typing import Any

INTERVAL = 5.0
"""Seconds between two signs of life."""

PATIENCE = 600.0
"""Seconds without a sign of life after which a rank counts as gone, unless it is set."""

MOST_NAMED = 8
"""Ranks that a message names."""


class Liveness:
    """Signs of life of the ranks that share some connections."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Begin to give signs. `store` is these ranks' own part of the rendezvous store."""
        self.patience = PATIENCE
        self._store, self._rank, self._size = store, rank, size
        self._seen: dict[int, tuple[bytes, float]] = {}
        ended = threading.Event()
        self._giving = threading.Thread(target=_give_signs, args=(store, rank, ended), daemon=True)
        self._giving.start()
        # At exit it must have ended: a thread in the store's code can't outlive the interpreter.
        self._end = weakref.finalize(self, _ended, ended, self._giving)

    def end(self) -> None:
        """Give no more signs, and take back the last. Local."""
        self._end()
        self._giving.join()
        with suppress(RuntimeError):
            self._store.delete_key(_sign(self._rank))

    def reason(self) -> str | None:
        """Return why these ranks can't go on, if one of them has said so. Local."""
        try:
            return self._store.get("lost").decode() if self._store.check(["lost"]) else None
        except RuntimeError:  # the store's process has ended
            return None

    def tell(self, reason: str) -> str:
        """Say why these ranks can't go on; return the words of the first that did. Local."""
        try:
            return self._store.compare_set("lost", "", reason).decode()  # type: ignore[no-any-return]
        except RuntimeError:
            return reason

    def silence(self, peer: int) -> float:
        """Return for how many seconds a rank has given no sign while this one looked. Local."""
        now, sign = time.monotonic(), self._read(peer)
        before, since = self._seen.get(peer, (b"", now))
        if sign is None or sign != before:
            since = now
        self._seen[peer] = sign or b"", since
        return now - since

    def silent(self) -> list[int]:
        """Return the ranks that give no sign now. Takes two intervals. Local."""
        first = [self._read(rank) for rank in range(self._size)]
        time.sleep(2 * INTERVAL)
        return [
            rank
            for rank, sign in enumerate(first)
            if rank != self._rank and sign is not None and self._read(rank) == sign
        ]

    def _read(self, rank: int) -> bytes | None:
        """Return a rank's last sign; None if it can't be known."""
        try:
            return self._store.get(_sign(rank)) if self._store.check([_sign(rank)]) else None
        except RuntimeError:
            return None


def named(ranks: list[int]) -> str:
    """Return ranks as words for a message."""
    some = ", ".join(map(str, ranks[:MOST_NAMED]))
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"rank {some}" if len(ranks) == 1 else f"ranks {some}{more}"


def _sign(rank: int) -> str:
    return f"alive/{rank}"


def _give_signs(store: Any, rank: int, ended: threading.Event) -> None:
    count = 0
    with suppress(RuntimeError):  # the store's process has ended
        while True:
            store.set(_sign(rank), str(count))
            count += 1
            if ended.wait(INTERVAL):
                return


def _ended(ended: threading.Event, giving: threading.Thread) -> None:
    ended.set()
    if giving is not threading.current_thread():  # where garbage is collected
        giving.join(timeout=5)
