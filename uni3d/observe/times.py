"""Times of the phases of a step, which waiting for a GPU doesn't change."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseTimes:
    """Seconds by phase; on a GPU those of the current stream, by events that are read later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, Any, Any]] = deque()

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call, and reset them.

        Events that the GPU hasn't reached by then count in the next call, so that nothing waits for it.
        """
        while self._events and self._events[0][2].query():  # events complete in the order of recording
            phase, begin, end = self._events.popleft()
            self._seconds[phase] += begin.elapsed_time(end) / 1e3
        seconds, self._seconds = self._seconds, defaultdict(float)
        return dict(seconds)
