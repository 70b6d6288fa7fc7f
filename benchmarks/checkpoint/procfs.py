"""Linux's counters of this process: its memory and the bytes it read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


def memory(entry: str) -> int:
    """Return `VmRSS` (bytes that this process has in memory) or `VmHWM` (their peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {entry}")


def bytes_read() -> int:
    """Return the bytes that all threads of this process got from read calls (proc(5), `rchar`)."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


@contextmanager
def peak_over_start() -> Iterator[list[int]]:
    """Append to the list how far the memory of this process rose above that at the start, in bytes.

    Writing 5 to `clear_refs` resets VmHWM to the current VmRSS (proc(5)).
    """
    result: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    yield result
    result.append(max(0, memory("VmHWM") - before))
