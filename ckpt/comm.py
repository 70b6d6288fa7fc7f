"""What this package needs of the ranks that save and load together."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.errors import CheckpointError

Bytes = npt.NDArray[np.uint8]


class Comm(Protocol):
    """A group of ranks. Every call is collective: all ranks make it, in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's small Python value, by rank."""
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

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        return list(outgoing)


def raise_together(comm: Comm, error: BaseException | None) -> None:
    """Collective: if any rank has an error, every rank raises the same one, that of the lowest rank.

    Errors of this package keep their text; others are named by their type, so that what is not the
    user's doing can be told apart. Interrupts are passed on after the others have been told.
    """
    mine = None
    if error is not None:
        mine = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
    failed = [(rank, text) for rank, text in enumerate(comm.all_gather(mine)) if text is not None]
    if not failed:
        return
    if error is not None and not isinstance(error, Exception):
        raise error
    rank, text = failed[0]
    where = f" (rank {rank})" if comm.size > 1 else ""
    raise CheckpointError(f"{text}{where}") from error
