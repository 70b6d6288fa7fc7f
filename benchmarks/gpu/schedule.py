"""Parts in order of worth, each with a limit of its own, within one budget of time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import PartReport, Row

ROOT = Path(__file__).resolve().parents[2]


class PartFailedError(Exception):
    """A part has failed; the message is the row's text. `rows` are those that it has got so far."""

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Clock:
    """Time that is left until a deadline."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def within(self, seconds: float) -> Clock:
        """Return a clock with so many seconds, if they are left."""
        return Clock(min(seconds, self.left))


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    work: Callable[[Clock], list[Row]]
    """Does the part in the time of a clock, and returns its rows. Raises PartFailedError."""
    limit: float
    """Most seconds that it gets."""
    least: float
    """Fewest seconds that it is begun with."""


def run_parts(parts: Iterable[Part], clock: Clock, show: Callable[[PartReport], None]) -> list[PartReport]:
    """Do the parts one after the other; skip those for which there is no time left. `show` each report."""
    reports = []
    for part in parts:
        began = time.monotonic()
        if clock.left < part.least:
            error = f"not begun: {clock.left:.0f} s were left of the budget, and it needs {part.least:.0f}"
            report = PartReport(name=part.name, status="skipped", seconds=0.0, rows=[], error=error)
        else:
            try:
                rows, status, text = part.work(clock.within(part.limit)), "done", ""
            except PartFailedError as failure:
                rows, status, text = failure.rows, "failed", str(failure)
            except Exception as error:  # the others' figures are worth more than this one's traceback
                rows, status, text = [], "failed", f"{type(error).__name__}: {error}"
            taken = time.monotonic() - began
            report = PartReport(name=part.name, status=status, seconds=taken, rows=rows, error=text)
        show(report)
        reports.append(report)
    return reports


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a process."""

    code: int | None
    """Exit code, negative for a signal; None if its time was over."""
    output: str
    figures: dict[str, Any] | None
    """JSON that it wrote to its file, maybe before it was ended."""
    seconds: float

    @property
    def error(self) -> str:
        """Last line of its error, or how it ended."""
        if self.code is None:
            return f"ended after {self.seconds:.0f} s, its time limit"
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name}"
        return last_error(self.output) or f"exit code {self.code}"


def run(command: Sequence[str], clock: Clock, figures: Path | None = None) -> Outcome:
    """Run a Python command from the root of the repository; end it, with its children, when time is over."""
    began = time.monotonic()
    if figures is not None:
        figures.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(clock.left)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    found = json.loads(figures.read_text()) if figures is not None and figures.exists() else None
    return Outcome(code=code, output=text, figures=found, seconds=time.monotonic() - began)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process's group: a child may have outlived it, and hold a GPU's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_error(output: str) -> str:
    """Return the last line of an output that names an error, or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.match(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b", line)
    ]
    return (errors or lines or [""])[-1][:300]
