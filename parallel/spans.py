"""Parts of a step, which a caller may enclose in a context of its own to time or to name them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

Part = Literal["data", "forward", "loss", "backward", "weights", "step"]
"""Data is taking the micro batches; loss that of a pipeline's last stage, else it is in forward; weights the
second half of a split backward pass; step all that follows the last backward pass."""


class Span(Protocol):
    """Maker of the context that encloses a part."""

    def __call__(
        self, part: Part, *, stage: int = 0, micro_batch: int = 0
    ) -> AbstractContextManager[object]: ...


def no_span(part: Part, *, stage: int = 0, micro_batch: int = 0) -> AbstractContextManager[object]:
    """Return a context that does nothing."""
    return nullcontext()
