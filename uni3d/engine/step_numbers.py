"""Numbers of a step, which the host may read one step later than the GPU computes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.agreement import Trace
from uni3d.engine.micro_batches import Sizes

LOOK_S = 1.0
"""Seconds between two looks for a failure of another rank, while a rank waits for its GPU."""


class Numbers(NamedTuple):
    """Results of a step, the same on all ranks."""

    loss: float
    """Mean over the global batch."""
    norm: float
    """Global gradient norm before clipping."""
    finite: float
    """1 if the norm and, but in fp16, the loss are finite, else 0."""
    alarms: float
    """Number of ranks whose background save has failed."""
    terms: float
    """Number of values that the loss is the mean of."""
    unused: float
    """Trained parameters without a gradient, summed over ranks."""
    idle: float
    """Number of ranks where no parameter has a gradient."""
    apart: float
    """0 if the ranks ran what they must run alike."""
    unfit: float
    """Number of ranks whose micro batches can't be weighed rightly."""
    extra: float
    """Number of samples beyond the config's."""


class PendingNumbers:
    """A step's numbers, copied to the host without waiting for the GPU."""

    def __init__(
        self,
        step: int,
        samples: int,
        rate: float,
        numbers: Tensor,
        here: tuple[Sequence[Trace], Sizes],
        look: Callable[[], None],
    ) -> None:
        """Start the copy. `look` raises an error if another rank has failed; see `wait_for`."""
        self.step = step
        self.traces, self.sizes = here
        self.samples = samples
        """Samples consumed, this step's included."""
        self.rate = rate
        """Learning rate of the first parameter group."""
        self._numbers = numbers
        self._look = look
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # Pinned, as a copy to pageable memory would wait for the GPU.
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> Numbers:
        """Wait for the copy and return the numbers."""
        if self._arrived is not None:
            wait_for(self._arrived, self._look)
        return Numbers(*self._numbers.tolist())


def wait_for(event: torch.cuda.Event, look: Callable[[], None]) -> None:
    """Wait for an event on the GPU, and call `look` every second.

    A rank whose peer has failed waits in NCCL's kernels, and so does a host that waits for them: until the
    group's timeout, and then without a reason. `look` raises the reason.
    """
    due = time.monotonic() + LOOK_S
    while not event.query():  # type: ignore[no-untyped-call]
        time.sleep(1e-4)
        if time.monotonic() > due:
            look()
            due = time.monotonic() + LOOK_S
