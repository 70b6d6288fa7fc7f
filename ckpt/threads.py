"""Many small jobs on a few threads.

Not `concurrent.futures`: a background save may still run while the interpreter shuts down, when executors
refuse new work; and a future per job costs more than writing one of 10,000 small files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Scratch(threading.local):
    """Memory of each thread, reused by the thread's next `take`."""

    _held: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        if len(self._held) < size:
            self._held = np.empty(size, np.uint8)
        return self._held[:size]


def for_each(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """Return `[work(item) for item in items]`, computed on up to `threads` threads including the caller's.

    Raises:
        BaseException: the first that `work` raised; items not begun by then are skipped.
    """
    todo: Sequence[T] = list(items)
    results: list[R | None] = [None] * len(todo)
    errors: list[BaseException] = []
    turns = iter(range(len(todo)))
    lock = threading.Lock()

    def run() -> None:
        while not errors:
            with lock:
                i = next(turns, None)
            if i is None:
                return
            try:
                results[i] = work(todo[i])
            except BaseException as error:  # interrupts too: raised below, in the caller's thread
                errors.append(error)

    helpers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(todo)) - 1)]
    for helper in helpers:
        helper.start()
    run()
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]
