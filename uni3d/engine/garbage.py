"""Python's garbage collector, kept out of steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_after() -> Iterator[None]:
    """Let Python's garbage collector wait until the body has ended.

    It takes up to hundreds of milliseconds. Inside of steps each rank would collect at a time of its own, and
    all would wait for it. What it has missed, it catches up on after the body, on all ranks at about the same
    time.
    """
    if not gc.isenabled():  # the script collects when it wants to
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if gc.get_count()[0] > gc.get_threshold()[0]:
            gc.collect(1)  # what the step has left, also what an earlier look at it would have kept
