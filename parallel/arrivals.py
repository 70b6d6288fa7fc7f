"""Ranks that come to a store which others may have used before, and agree on a part of it.

torchrun keeps its store when it starts the ranks again, and a script may call `initialize` again after an
error: ranks may have ended anywhere. So nothing counts that an earlier attempt has left. Rank 0 draws the
name of a new part, and answers each rank that comes under a token that this one has drawn.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import torch._C._distributed_c10d as distributed

from parallel.liveness import LONGEST_PAUSE
from parallel.store_calls import StoreCalls

COUNT = "uni3d/arrivals"
SETTLED = f"{COUNT}/settled"
"""Key of the number up to which all arrivals have been answered."""


class Arrivals:
    """One rank's arrival and, on rank 0, the answers to the others'.

    Attributes:
        name: prefix of the ranks' new part of the store, once `part` has returned it.
    """

    def __init__(self, store: Any, rank: int, seconds: float) -> None:
        """Come to a `torch.distributed.Store`, whose calls may take so many seconds each."""
        self._plain, self._store, self._rank = store, StoreCalls(store, seconds), rank
        self.name: str | None = f"uni3d/{secrets.token_hex(8)}" if rank == 0 else None
        self._seen, self._open = 0, set[int]()

    def part(self, seconds: float) -> Any | None:
        """Return the ranks' new part of the store; None if rank 0 hasn't come within so many seconds."""
        if self._rank == 0:
            self._seen = int(self._store.get(SETTLED)) if self._store.check([SETTLED]) else 0
        else:
            self.name = self._answered(seconds)
        return None if self.name is None else distributed.PrefixStore(self.name, self._plain)

    def _answered(self, seconds: float) -> str | None:
        token, deadline, pause = secrets.token_hex(8), time.monotonic() + seconds, 0.005
        self._store.set(f"{COUNT}/{self._store.add(COUNT, 1)}", token)
        while not self._store.check([_answer(token)]):
            if time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        name = self._store.get(_answer(token)).decode()
        self._store.delete_key(_answer(token))
        return name

    def answer(self) -> None:
        """Answer all that have come by now, those of earlier attempts too, which nobody reads. For rank 0."""
        count = self._store.add(COUNT, 0)
        self._open |= {*range(self._seen + 1, count + 1)}
        self._seen = count
        for number in sorted(self._open):
            if self._store.check([f"{COUNT}/{number}"]):  # else it has ended in between, or is about to
                token = self._store.get(f"{COUNT}/{number}").decode()
                self._store.set(_answer(token), str(self.name))
                self._store.delete_key(f"{COUNT}/{number}")
                self._open.discard(number)

    def settle(self) -> None:
        """Note that all have come, so that a later attempt needn't look at those of this one. For rank 0."""
        self._store.set(SETTLED, str(min(self._open, default=self._seen + 1) - 1))


def _answer(token: str) -> str:
    return f"uni3d/answers/{token}"
