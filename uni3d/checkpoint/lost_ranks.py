"""Ranks that are lost in a save or a load: one error of checkpoints on all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ckpt
from parallel import HostComm
from parallel.host_comm import LostRankError


@contextmanager
def told_in(
    comm: HostComm, work: str, kind: type[ckpt.CheckpointError] = ckpt.CheckpointError
) -> Iterator[None]:
    """Name the block's work, and raise the loss of a rank in it as an error of `kind`.

    Raises:
        ckpt.CheckpointError: a rank was lost; names the work and the rank, the same on all that are left.
    """
    with comm.at(work, alike=(ckpt.CheckpointError,)):
        try:
            yield
        except LostRankError as error:
            text = str(error)
            raise kind(text if text.startswith(work) else f"{work}: {text}") from error
