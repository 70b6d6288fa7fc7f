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

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; the others' is ignored."""

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

    def broadcast(self, value: Any) -> Any:
        return value

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
    value, text, error = _outcome(work)
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
    """Do `work` on rank 0 alone and return its result on every rank. Collective.

    Errors are those of `agreed_by_all`.
    """
    here, error_text, error = _outcome(work) if comm.rank == 0 else (None, None, None)
    value, text = comm.broadcast((here, error_text))
    if text is None:
        return value  # type: ignore[no-any-return]
    if error is not None and not isinstance(error, Exception):
        raise error
    raise CheckpointError(f"{text} (rank 0)" if comm.size > 1 else text) from error


def _outcome(work: Callable[[], T]) -> tuple[T | None, str | None, BaseException | None]:
    """Do `work`; return its result, or the text of its error and the error."""
    try:
        return work(), None, None
    except BaseException as error:  # even an interrupt: the other ranks wait for the outcome
        text = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        return None, text, error
