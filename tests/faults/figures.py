"""Figures of the campaigns: how many faults were tried, and what they broke.

`make faults` collects them in the file `FAULTS_OUT`, and prints it as a table by this script.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

KINDS = ("lost", "torn", "wrong", "other")
"""A checkpoint that must be there isn't; one is neither the old nor the new; numbers were never saved, but
are read without an error; anything else, such as an error of another kind or a next save that fails."""
SHOWN = 20
OFTEN = 200


class Campaign:
    """A count of points tried and of faults found, which fails the test at its end if there are any."""

    def __init__(self, name: str, planned: int) -> None:
        self.name, self.planned, self.tried = name, planned, 0
        self.found: Counter[str] = Counter()
        self.told: list[str] = []
        self.begun = time.monotonic()

    def point(self, seed: int, label: str, problems: list[tuple[str, str]]) -> None:
        """Count a point and its problems, each of a kind and a text."""
        self.tried += 1
        for kind in {kind for kind, _ in problems}:
            assert kind in KINDS
            self.found[kind] += 1
        if problems:
            self.told.append(f"FAULTS_SEED={seed}, {label}: " + "; ".join(f"{k}: {t}" for k, t in problems))
        if self.tried % OFTEN == 0:
            self.write()

    def write(self) -> None:
        """Write the figures so far, which outlive a campaign that is cut off."""
        if out := os.environ.get("FAULTS_OUT"):
            path = Path(out)
            all_figures = json.loads(path.read_text()) if path.exists() else {}
            all_figures[self.name] = self.figures() | ({"told": self.told[:SHOWN]} if self.told else {})
            path.write_text(json.dumps(all_figures, indent=1) + "\n")

    def end(self) -> None:
        """Write the figures, and fail if anything was found."""
        assert self.tried > 0 or "FAULTS_SEED" in os.environ
        self.write()
        if self.told:
            shown = "\n".join(self.told[:SHOWN])
            pytest.fail(f"{self.name}: {len(self.told)} of {self.tried} points:\n{shown}", pytrace=False)

    def figures(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.begun)
        counts = {kind: self.found[kind] for kind in KINDS}
        return {"planned": self.planned, "tried": self.tried, **counts, "seconds": seconds}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table of Markdown."""
    columns = ["planned", "tried", *KINDS, "seconds"]
    rows = [["campaign", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(f"{row[column]:,}" for column in columns)] for name, row in figures.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    found: dict[str, dict[str, Any]] = {}
    for name in sys.argv[1:]:
        found |= json.loads(Path(name).read_text())
    print(table(found))
