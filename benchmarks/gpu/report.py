"""Rows of the figures, as a table for `benchmarks/RESULTS.md` and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["done", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    measured: str
    beside: str = ""
    """Peer or raw limit that the figure is measured beside, with its own figure."""
    bar: str = ""
    met: bool | None = None
    """True if the bar is reached; None without one."""
    figures: dict[str, Any] = field(default_factory=dict)
    """All figures behind the row."""


@dataclass(frozen=True, kw_only=True)
class PartReport:
    name: str
    status: Status
    seconds: float
    rows: list[Row]
    error: str = ""
    """Why it failed or was skipped."""


def table(reports: Sequence[PartReport]) -> str:
    """Format rows, and a row for each part that failed or was skipped, as a markdown table."""
    lines = ["| what | measured | beside it | bar | |", "| --- | --- | --- | --- | --- |"]
    for report in reports:
        for row in report.rows:
            verdict = {None: "", True: "met", False: "**missed**"}[row.met]
            lines.append(_line([row.what, row.measured, row.beside, row.bar, verdict]))
        if report.status != "done":
            lines.append(_line([report.name, f"**{report.status}**: {report.error}", "", "", ""]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |"


def heading(machine: dict[str, Any], date: str) -> str:
    """Describe the machine in a line."""
    gpu = "no GPU"
    if machine["gpu"] is not None:
        memory = machine["gpu_memory"] / 2**30
        gpu = f"{machine['gpu']} ({memory:.0f} GiB), driver {machine['driver']}, CUDA {machine['cuda']}"
    return (
        f"{date}: {gpu}, torch {machine['torch']}, Python {machine['python']}, "
        f"{machine['cores']} host cores, {machine['memory'] / 2**30:.0f} GiB of host memory."
    )


def write(path: Path, document: dict[str, Any], reports: Sequence[PartReport]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document | {"parts": [asdict(report) for report in reports]}, indent=1) + "\n")
