"""Figures as rows of a table: ours, the yardstick, their ratio, the bar, and if it holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

HEADINGS = ("figure", "ours", "the yardstick", "ratio", "the bar", "holds?")


@dataclass(frozen=True)
class Sample:
    """Measurements, one for each round."""

    values: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, middle, high = (number(x) for x in (min(self.values), self.median, max(self.values)))
        spread = f" ({low} to {high})" if low != high else ""
        return f"{middle}{spread} {self.unit}"

    def to_json(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "values": list(self.values),
        }


@dataclass(frozen=True)
class Bar:
    """Target of a row.

    `times_as_fast`: the yardstick's time over ours is at least `limit`. `times_as_much`: ours over the
    yardstick's is at most `limit`. `at_most`: ours is at most `limit`, in its own unit.
    """

    kind: Literal["times_as_fast", "times_as_much", "at_most"]
    limit: float

    def text(self, unit: str) -> str:
        if self.kind == "at_most":
            return f"≤ {number(self.limit)} {unit}"
        return f"{'≥' if self.kind == 'times_as_fast' else '≤'} {number(self.limit)} x"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. A row without a bar is only for comparison."""

    figure: str
    ours: Sample
    yardstick: str = ""
    theirs: Sample | None = None
    bar: Bar | None = None
    parts: Mapping[str, Sample] = field(default_factory=dict)
    """Samples that it is made of or was chosen from; in the JSON, not in the table."""

    @property
    def ratio(self) -> float | None:
        """Ratio of the medians: times as fast as the yardstick, or as much if the bar is `times_as_much`."""
        if self.theirs is None:
            return None
        as_much = self.bar is not None and self.bar.kind == "times_as_much"
        above, below = (self.ours, self.theirs) if as_much else (self.theirs, self.ours)
        return above.median / below.median if below.median else float("inf")

    @property
    def holds(self) -> bool | None:
        """True if the bar holds; None without a bar, or without a measured yardstick for its ratio."""
        if self.bar is None:
            return None
        if self.bar.kind == "at_most":
            return self.ours.median <= self.bar.limit
        if self.ratio is None:
            return None
        if self.bar.kind == "times_as_fast":
            return self.ratio >= self.bar.limit
        return self.ratio <= self.bar.limit

    def cells(self) -> tuple[str, ...]:
        theirs = f"{self.yardstick}: {self.theirs}" if self.theirs else self.yardstick
        return (
            self.figure,
            str(self.ours),
            theirs,
            "" if self.ratio is None else f"{self.ratio:.2f} x",
            "" if self.bar is None else self.bar.text(self.ours.unit),
            {None: "", True: "yes", False: "NO"}[self.holds],
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "figure": self.figure,
            "ours": self.ours.to_json(),
            "yardstick": self.yardstick,
            "theirs": None if self.theirs is None else self.theirs.to_json(),
            "ratio": self.ratio,
            "bar": None if self.bar is None else {"kind": self.bar.kind, "limit": self.bar.limit},
            "holds": self.holds,
            "parts": {name: part.to_json() for name, part in self.parts.items()},
        }


def number(x: float) -> str:
    """Format with three significant digits."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def render(rows: Sequence[Row]) -> str:
    """Render the rows as an aligned Markdown table."""
    table = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in table
    ]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)
