"""Run one command of the demo: printed, logged, and followed by a progress bar."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Row = dict[str, float]
"""One line of a metrics file: `step`, `loss`, `pp`, `dp`, `tp`, `zero` and others."""


class DemoError(Exception):
    """Failure of the demo, with the message to show."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Source of a progress bar: the rows of a metrics file after step `start`, up to `until`."""

    title: str
    metrics: Path
    start: int
    until: int


class Tail:
    """Reads the rows that were appended to a metrics file since the last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[Row]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read()
        end = data.rfind(b"\n") + 1  # the last line may be half written
        self.offset += end
        return [json.loads(line) for line in data[:end].splitlines()]


def launch(
    console: Console,
    command: list[str],
    log: Path,
    *,
    settings: dict[str, str] | None = None,
    watch: Watch | None = None,
) -> float:
    """Print a command, run it with its output in `log`, and return the seconds it took.

    `settings` are environment variables of the command. With `watch`, a progress bar is shown.

    Raises:
        DemoError: the command failed. The end of its log has been printed.
    """
    settings = settings or {}
    line = "".join(f"{name}={value} " for name, value in settings.items()) + shlex.join(command)
    console.print(f"$ {line}", style="dim", markup=False, soft_wrap=True)
    began = time.monotonic()
    with log.open("wb") as output:
        env = {**os.environ, **settings}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            if watch is not None:
                show_progress(console, process, watch)
            process.wait()
        finally:
            # After an error or Ctrl-C. torchrun passes the signal on to its workers.
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        console.print(last_lines(log), markup=False, soft_wrap=True)
        raise DemoError(f"exit code {process.returncode} (all output: {log}) from\n{line}")
    return time.monotonic() - began


def show_progress(console: Console, process: subprocess.Popen[bytes], watch: Watch) -> None:
    """Show a live bar until the process ends, or nothing if there is no terminal."""
    tail = Tail(watch.metrics)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}/{task.fields[until]}  loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = watch.until - watch.start
        task = progress.add_task(watch.title, total=total, step=watch.start, until=watch.until, loss="-")
        ended = False
        while not ended:
            ended = process.poll() is not None  # asked before the last read, so that no row is missed
            for row in tail.read():
                step, loss = int(row["step"]), f"{row['loss']:.3f}"
                progress.update(task, completed=step - watch.start, step=step, loss=loss)
            if not ended:
                time.sleep(0.1)


def last_lines(log: Path, count: int = 30) -> str:
    """Return the end of a log, without torchrun's own report, which fills a screen and says less."""
    lines = log.read_text(errors="replace").splitlines()
    reports = (
        i for i, line in enumerate(lines) if "torch/distributed/elastic/multiprocessing/api.py" in line
    )
    end = next(reports, len(lines))
    return "\n".join((lines[:end] or lines)[-count:])
