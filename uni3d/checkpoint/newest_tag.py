"""Newest checkpoint of a run, with which a resume goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path

import ckpt
from ckpt.format import MANIFEST
from parallel import HostComm
from uni3d.checkpoint.lost_ranks import told_in
from uni3d.importers.in_place import foreign_kind


def newest(comm: HostComm, run: str | Path) -> str | None:
    """Return the newest committed tag of a run, or None if it has none. Collective.

    Rank 0 reads it, as file systems may show it to others later.

    Raises:
        ckpt.CheckpointError: `latest` is damaged or missing, though there are checkpoints; or `run` is the
            folder of one checkpoint, or another framework's.
    """

    def find() -> str | None:
        try:
            tag, store = ckpt.read_latest(run), ckpt.open_store(run)
        except ckpt.CheckpointError:
            _refuse_foreign(run)
            raise
        if tag is None:
            _refuse_foreign(run)  # a run isn't to begin anew beside it
        if tag is None and store.exists(MANIFEST):
            raise ckpt.CheckpointError(
                f"{store.where('')} is a checkpoint, not a run's folder: to resume the run, give the folder "
                "that it is in"
            )
        return tag

    with told_in(comm, f"the look for the newest checkpoint of {run}"):
        return ckpt.from_rank_0(comm, find)


def _refuse_foreign(run: str | Path) -> None:
    """Raise CheckpointError if another framework has saved a run into the folder."""
    kind = None
    with contextlib.suppress(ckpt.CheckpointError):
        kind = foreign_kind(run)
    if kind not in (None, "safetensors", "torch"):  # weights may lie beside a run
        raise ckpt.CheckpointError(
            f"{run} is a {kind} checkpoint: load it in place with load_checkpoint or uni3d.load, and save to "
            "another folder"
        )
