"""Collective calls of an engine: one rank's failure stops all, and spoils the engine if it came half-way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt import CheckpointError
from parallel import Failures
from uni3d.engine.batches import BatchError
from uni3d.train_state import Progress

ALIKE = (FloatingPointError, CheckpointError)
"""Errors that all ranks raise at the same place."""


class Guard:
    """Encloses an engine's collective calls, and knows whether the engine can still be used.

    Attributes:
        begun: True once the call at hand may have changed something on some rank; set by the call.
        unusable: why the engine can't be used any more, or None.
    """

    def __init__(self, progress: Progress) -> None:
        """Collective."""
        self._progress = progress
        self._failures = Failures()
        self.begun = False
        self.unusable: str | None = None

    @contextmanager
    def together(self, call: str, *, begun: bool = False) -> Iterator[None]:
        """Enclose a call by name: if one rank fails, all stop with that one's reason.

        After errors that all ranks raise alike, and errors before the call has begun, training may go on.
        """
        self.begun = begun
        try:
            with self._failures.told(f"step {self._progress.global_steps + 1}: {call}()", alike=ALIKE):
                yield
        except (*ALIKE, BatchError):
            raise
        except Exception as error:
            if self.begun:  # in the midst of a step, so its state is of no more use
                self.unusable = f"{call}() failed: {type(error).__name__}: {error}"
            raise

    def check(self) -> None:
        """Raise RuntimeError if the engine can't be used any more."""
        if self.unusable is not None:
            raise RuntimeError(f"this engine can't be used any more: {self.unusable}; initialize a new one")
