"""Communication between the ranks that save or load: an interface, and agreement on success or failure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ckpt.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


class Comm(Protocol):
    """A group of ranks. Every call is collective: all ranks make it, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, value: T, merge: Callable[[list[T]], T]) -> T:
        """Return all ranks' values merged, on every rank.

        `merge` gets values of adjacent ranks in their order, some of them merged before. It mustn't fail.
        """

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on rank 0, and an empty list on the others."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank; the others' is ignored."""

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send `outgoing[r]` to rank r; return the bytes from each rank that sent some here, by rank."""


class Solo:
    """A group of one rank."""

    rank = 0
    size = 1

    def all_reduce(self, value: T, merge: Callable[[list[T]], T]) -> T:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def exchange(self, outgoing: Mapping[int, Bytes]) -> dict[int, Bytes]:
        return dict(outgoing)


def merged(comm: Comm, work: Callable[[], T], merge: Callable[[list[T]], T]) -> T:
    """Do `work` on every rank and return the results merged, on every rank. Collective.

    Results travel between ranks, so they must be small; `merge` is as for `Comm.all_reduce`. Each rank sees a
    few dozen values, some of them merged before, not one of each of thousands.

    If `work` fails on any rank, every rank raises the error of the lowest such rank. An error of this package
    keeps its text; any other is prefixed with its type, so that a bug doesn't read like a user's mistake.

    Raises:
        CheckpointError: `work` failed on some rank.
        BaseException: an interrupt of this rank itself, once the other ranks know of it.
    """

    def combine(outcomes: list[_Outcome]) -> _Outcome:
        failed = next((outcome for outcome in outcomes if outcome.text is not None), None)
        return failed or _Outcome(comm.rank, None, merge([outcome.value for outcome in outcomes]))

    value, text, error = _outcome(work)
    rank, text, value = comm.all_reduce(_Outcome(comm.rank, text, value), combine)
    if text is None:
        return value  # type: ignore[no-any-return]
    if error is not None and not isinstance(error, Exception):
        raise error
    where = f" (rank {rank})" if comm.size > 1 else ""
    raise CheckpointError(f"{text}{where}") from error


class _Outcome(NamedTuple):
    """Merged results of adjacent ranks, or the error of the first of them that failed."""

    rank: int
    text: str | None
    value: Any


def agreed(comm: Comm, work: Callable[[], T]) -> T:
    """Do `work` on every rank and return this rank's own result, of any kind and size. Collective.

    Errors are those of `merged`: no rank goes on unless all succeeded.
    """
    results: list[T] = []
    merged(comm, lambda: results.append(work()), lambda _: None)
    return results[0]


class Seen(NamedTuple):
    """Ranks that have the same value."""

    first: int
    """The lowest of them."""
    times: int
    """Their number."""


def distinct(comm: Comm, work: Callable[[], H]) -> dict[H, Seen]:
    """Do `work` on every rank and return each distinct result with its ranks, by first rank. Collective.

    Errors are those of `merged`.
    """
    return merged(comm, lambda: {work(): Seen(comm.rank, 1)}, counted)


def counted(parts: list[dict[H, Seen]]) -> dict[H, Seen]:
    """Merge values of adjacent ranks with their first ranks and numbers of ranks."""
    found: dict[H, Seen] = {}
    for part in parts:
        for value, (rank, times) in part.items():
            first, before = found.get(value, (rank, 0))
            found[value] = Seen(first, before + times)
    return found


def union(sets: list[set[H]]) -> set[H]:
    """Merge sets."""
    return set[H]().union(*sets)


def from_rank_0(comm: Comm, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 alone and return its result on every rank. Collective.

    Errors are those of `merged`.
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
