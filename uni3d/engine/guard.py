"""Failures in collective calls: one rank's error stops all; half-way through a step it ends the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt import CheckpointError
from parallel import Failures, HostComm
from parallel.agreement import BatchError, StepRefusedError
from uni3d.train_state import Progress

RAISED_BY_ALL = (FloatingPointError, CheckpointError, StepRefusedError)
"""Errors that all ranks raise at the same place."""


class Guard:
    """Context of an engine's collective calls; knows whether the engine can still be used.

    Attributes:
        begun: True once the current call may have changed something on some rank; set by the call.
        unusable: why the engine can't be used any more, or None.
    """

    def __init__(self, progress: Progress, comm: HostComm) -> None:
        self._progress = progress
        self._failures = Failures(comm)
        self.begun = False
        self.unusable: str | None = None

    @contextmanager
    def together(self, call: str, *, begun: bool = False) -> Iterator[None]:
        """Run the body as the collective `call`: if one rank fails, all stop with its reason.

        Training may go on after an error that all ranks raise, or one before the call has begun.
        """
        self.begun = begun
        try:
            work = f"step {self._progress.global_steps + 1}: {call}()"
            with self._failures.told(work, alike=RAISED_BY_ALL):
                yield
        except (*RAISED_BY_ALL, BatchError):
            raise
        except Exception as error:
            if self.begun:  # the ranks have stopped at different places of a step
                self.unusable = f"{call}() failed: {type(error).__name__}: {error}"
            raise

    def look(self) -> None:
        """Raise RankFailedError if another rank has failed in this call or the one before. Local."""
        self._failures.look()

    def check(self) -> None:
        """Raise RuntimeError if the engine can't be used any more."""
        if self.unusable is not None:
            raise RuntimeError(f"this engine can't be used any more: {self.unusable}; initialize a new one")
