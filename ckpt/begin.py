"""Beginning of a save, on rank 0: take the lock, make the save's place, and look at what is there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

from ckpt.errors import CheckpointError
from ckpt.format import LATEST
from ckpt.order import head_of, next_commit
from ckpt.stores import Store
from ckpt.tags import check_owner, read_latest


@dataclass(frozen=True)
class Wish:
    """Arguments of a save that rank 0 needs, as given."""

    tag: str
    token: str
    """Rank 0's is the save's."""
    run_id: str | None
    durable: bool
    update_latest: bool


class Begun(NamedTuple):
    """A save that has begun. It travels to all ranks."""

    token: str
    base: str | None
    """Tag whose files may be linked to."""
    durable: bool
    commit: int
    """Number of the commit among those of the run."""
    first: bool
    """True if there is no `latest`, so that the checkpoint says itself that it is to be named."""


def begin(store: Store, asked: Wish, *, incremental: bool) -> Begun:
    """Begin a save as the run's only writer; the caller gives back the lock.

    Raises:
        CheckpointError: another process is writing, or the tag can't be saved here.
    """
    store.hold(asked.token, f"saving {asked.tag}")
    check_owner(store, asked.tag, asked.run_id)
    base = None
    if incremental and store.links:
        with contextlib.suppress(CheckpointError):  # `latest` is damaged: write everything
            base = read_latest(store)
    names = store.begin(asked.tag, asked.token)
    replaced = head_of(store, asked.tag) if asked.tag in names else None
    return Begun(
        token=asked.token,
        base=base,
        durable=asked.durable or (replaced is not None and replaced.durable),
        commit=next_commit(store, names),
        first=asked.update_latest and LATEST not in names,
    )
