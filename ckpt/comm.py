"""Communication between the ranks that save or load: an interface, and agreement on success or failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ckpt.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


class Comm(Protocol):
    """A group of ranks. Every call is collective: all ranks make it, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, a small Python object, by rank."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on rank 0, and an empty list on the others."""

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        """Send `outgoing[r]` to rank r; return the bytes from each rank, of sizes known beforehand."""


class Solo:
    """A group of one rank."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        return list(outgoing)


def agreed_by_all(comm: Comm, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank and return every rank's result, by rank. Collective.

    Results travel between ranks, so they must be small; use `agreed` where each rank needs only its own.
    If `work` fails on any rank, every rank raises the error of the lowest such rank. An error of this package
    keeps its text; any other is prefixed with its type, so that a bug doesn't read like a user's mistake.

    Raises:
        CheckpointError: `work` failed on some rank.
        BaseException: an interrupt of this rank itself, once the other ranks know of it.
    """
    error: BaseException | None = None
    text: str | None = None
    value: T | None = None
    try:
        value = work()
    except BaseException as caught:  # even an interrupt: the other ranks wait in the all_gather below
        error = caught
        text = str(caught) if isinstance(caught, CheckpointError) else f"{type(caught).__name__}: {caught}"
    everyone = comm.all_gather((text, value))
    failed = [(rank, text) for rank, (text, _) in enumerate(everyone) if text is not None]
    if not failed:
        return [value for _, value in everyone]
    if error is not None and not isinstance(error, Exception):
        raise error
    rank, text = failed[0]
    where = f" (rank {rank})" if comm.size > 1 else ""
    raise CheckpointError(f"{text}{where}") from error


def agreed(comm: Comm, work: Callable[[], T]) -> T:
    """Do `work` on every rank and return this rank's own result, of any kind and size. Collective.

    Errors are those of `agreed_by_all`: no rank goes on unless all succeeded.
    """
    results: list[T] = []
    agreed_by_all(comm, lambda: results.append(work()))
    return results[0]


def from_rank_0(comm: Comm, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone and return its result, a small value, on every rank. Collective.

    Errors are those of `agreed_by_all`.
    """
    return agreed_by_all(comm, lambda: work() if comm.rank == 0 else None)[0]  # type: ignore[return-value]
