"""The form in which each library is handed to the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.training.task import Batch


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A library that is ready to train."""

    step: Callable[[Batch], Any]
    """Take one step; return its loss, which is the global one when averaged over the ranks."""
    norm: Callable[[], Any]
    """Norm of the last step's gradients before clipping, or None if the library keeps none."""
    parameters: list[str]
    """Names of the parameters on this rank, as in the whole model."""
    save: Callable[[int], None] | None = None
    """Begin an asynchronous save."""
    wait: Callable[[], None] | None = None
    """Wait until the last save is committed."""
