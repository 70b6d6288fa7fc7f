"""What this package needs of the ranks that save and load together."""

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
        """Every rank's small Python value, by rank."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on rank 0; on the others an empty list."""
        ...

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        """Send `outgoing[r]` to rank r; get what each rank sent here, of the sizes announced."""
        ...


class Solo:
    """A group of one."""

    rank = 0
    size = 1

    def all_gather(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        return list(outgoing)


def gathered(comm: Comm, work: Callable[[], T]) -> list[T]:
    """Collective: do `work` and return what it gave on each rank; small values, as they travel.

    If it fails on any rank, every rank raises the same error, that of the lowest rank. Errors of this package
    keep their text; others are named by their type, so that what is not the user's doing can be told
    apart. Interrupts are passed on after the others have been told.
    """
    error: BaseException | None = None
    text: str | None = None
    value: T | None = None
    try:
        value = work()
    except BaseException as caught:  # whatever it is: the other ranks wait in the gathering below
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


def together(comm: Comm, work: Callable[[], T]) -> T:
    """Collective: do `work`, as `gathered` does, and return what it gave here, which stays here."""
    results: list[T] = []
    gathered(comm, lambda: results.append(work()))
    return results[0]


def from_first(comm: Comm, work: Callable[[], T]) -> T:
    """Collective: what `work` gives on rank 0, the only rank that does it."""
    return gathered(comm, lambda: work() if comm.rank == 0 else None)[0]  # type: ignore[return-value]
