"""A trial of foreign pickles in a process of its own, with limits of memory and time.

The restricted unpickler runs no code, but a few hundred bytes can still ask it for gigabytes, for hours, or
for more stack than there is, which ends the process. So each pickle is first unpickled, and looked through,
by a process that may be lost. One such process serves all pickles of its parent.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ckpt import CheckpointError
from ckpt.parts import uncollected

MEMORY, MEMORY_PER_BYTE = 512 << 20, 64
"""Bytes that a trial may take, and as many more for each byte of the pickle."""
SECONDS, BYTES_PER_SECOND = 20, 1 << 18
"""Seconds that it may take, and one more for so many bytes. Honest pickles take a hundredth of it."""
ELEMENTS, ELEMENTS_PER_BYTE = 1 << 20, 16
"""Elements that a pickle may have, written out, and as many more for each of its bytes."""
DEPTH = 200
"""Containers within containers."""

Unpickle = Callable[[bytes, Collection[str]], Any]


def check(data: bytes, where: str, stand_ins: Collection[str]) -> None:
    """Try a pickle; `where` names it in errors, and `stand_ins` are as for `read_pickle`.

    An error that the unpickler itself raises is no refusal: it will raise it again, in better words.

    Raises:
        CheckpointError: it takes too much memory or time, has too many elements, or ends the process.
    """
    refusal = _PROCESS.ask(data, sorted(stand_ins))
    if refusal is not None:
        raise CheckpointError(
            f"{where} has a pickle of {len(data)} bytes that {refusal}, as none of a checkpoint does; if you "
            "trust whoever wrote it, add --trust"
        )


class _Process:
    """The process of the trials, started when it is first needed and again when it was lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._parent = 0

    def ask(self, data: bytes, stand_ins: list[str]) -> str | None:
        """Return the reason to refuse a pickle, or None."""
        with self._lock:
            running = self._running
            if running is None or self._parent != os.getpid() or running.poll() is not None:
                running = self._start()
            assert running.stdin is not None
            assert running.stdout is not None
            try:
                limits = {"memory": _memory(len(data)), "seconds": _seconds(len(data))}
                asked = {
                    "bytes": len(data),
                    "stand_ins": stand_ins,
                    "elements": _elements(len(data)),
                    **limits,
                }
                running.stdin.write(json.dumps(asked).encode() + b"\n")
                running.stdin.write(data)
                running.stdin.flush()
                answer = running.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if answer:
                return json.loads(answer)  # type: ignore[no-any-return]
            code = running.wait()  # it is ending: killing it now could hide why
            self._end()
            return _ending(code, len(data))

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._running = running = subprocess.Popen(
            [sys.executable, "-P", "-c", "from uni3d.importers.pickles import serve_trials; serve_trials()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **single, "PYTHONPATH": path},
        )
        if self._parent != os.getpid():
            self._parent = os.getpid()
            atexit.register(self._end)
        return running

    def _end(self) -> None:
        """End the process, unless it is the parent's of a fork."""
        running, self._running = self._running, None
        if running is not None and self._parent == os.getpid():
            with running, suppress(BrokenPipeError):  # closes the pipes and waits
                running.kill()


_PROCESS = _Process()


def _ending(code: int, size: int) -> str:
    """Return the reason to refuse a pickle in whose trial the process ended."""
    if code == -signal.SIGALRM:
        return f"takes more than {_seconds(size)} s"
    if code < 0:
        return f"crashes what reads it ({signal.Signals(-code).name})"
    return f"ends what reads it (exit code {code})"


def _memory(size: int) -> int:
    return MEMORY + MEMORY_PER_BYTE * size


def _seconds(size: int) -> int:
    return SECONDS + size // BYTES_PER_SECOND


def _elements(size: int) -> int:
    return ELEMENTS + ELEMENTS_PER_BYTE * size


def serve(unpickle: Unpickle) -> None:
    """Answer the parent's questions until it ends: a line of JSON each, null or the reason to refuse."""
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while head := questions.readline():
        asked = json.loads(head)
        data = questions.read(asked["bytes"])
        answers.write(json.dumps(_tried(unpickle, data, asked)).encode() + b"\n")
        answers.flush()


def _tried(unpickle: Unpickle, data: bytes, asked: dict[str, Any]) -> str | None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space() + asked["memory"]
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
    signal.alarm(asked["seconds"])  # its default action ends the process, whatever C code is at work
    try:
        with uncollected():
            return _too_much(unpickle(data, asked["stand_ins"]), asked["elements"])
    except MemoryError:
        return f"takes more than {asked['memory'] >> 20} MiB"
    except Exception:  # the parent's own unpickler will say it
        return None
    finally:
        signal.alarm(0)


def _address_space() -> int:
    """Return the bytes of this process's address space; 16 GiB where the system doesn't say."""
    statm: IO[str]
    with suppress(OSError), open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
    return 16 << 30


_LEAVES = frozenset({str, bytes, int, float, complex, bool, type(None), type})


def _too_much(value: Any, elements: int) -> str | None:
    """Return why a value is too large to be walked or printed, or None. What is in it twice counts twice."""
    level, left = [value], elements
    for _ in range(DEPTH):
        below: list[Any] = []
        for item in level:
            inside = _members(item)
            left -= len(inside)
            if left < 0:
                return f"unfolds to more than {elements} elements"
            below += [each for each in inside if type(each) not in _LEAVES]
        if not below:
            return None
        level = below
    return f"has more than {DEPTH} containers within each other"


def _members(item: Any) -> Collection[Any]:
    if isinstance(item, list | tuple | set | frozenset):
        return item
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    return getattr(item, "__dict__", {}).values()
