"""Doing many small things with a few threads.

Not an executor: a save may still be going on in the background while the interpreter shuts down, when
executors take no more work; and one future for each of 10,000 small files costs more than the file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def for_each(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """`[work(item) for item in items]`, with up to `threads` at a time, the caller's own among them.

    Raises:
        Exception: the first that `work` raised; what was not begun by then is left out.
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
