"""What a run's metrics files say: its curves, and on which topology each step was taken. No torch, no numpy.

Two kinds of files are read: JSON lines, one object for each step, as `examples/megatron_gpt/train.py` writes
them; and the CSV files of DeepSpeed's monitor, one for each curve, as `uni3d.observe.monitors` writes them.

A run that resumes from a checkpoint goes back, and takes again the steps after it. Files are appended to, so
these are there twice: the later line counts, and what was written before from that step on is abandoned.
"""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt.stores import Store
    from parallel.degrees import Ranks

JSON_LINES = "metrics.jsonl"
"""In a run's folder; or beside it, with the run's name."""
CSV_PREFIX = "Train_Samples_"
CSV_NAMES = {"train_loss": "loss", "grad_norm": "grad_norm", "lr": "lr"}
"""End of a CSV file's name -> curve. The curves' names are also the keys of the JSON objects."""

Point = tuple[float, float]
"""x and y. y may be NaN or infinite."""


@dataclass
class Curve:
    """One curve, as it was written."""

    points: list[Point] = field(default_factory=list)
    """x grows; what counts."""
    abandoned: list[list[Point]] = field(default_factory=list)
    """What was taken back: a stretch for each time that the run was resumed from an earlier checkpoint."""

    def add(self, x: float, y: float | None) -> None:
        """Go on at `x`, or from there again; without a `y` nothing is known there."""
        self.points, lost = split_at(self.points, x)
        if lost:
            self.abandoned.append(lost)
        if y is not None:
            self.points.append((x, y))


@dataclass(frozen=True)
class Resize:
    """The run went on with another topology."""

    at: float
    """The last x before it."""
    before: Ranks
    after: Ranks

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


@dataclass
class Metrics:
    """All that was read."""

    x: str
    """What the x axis counts: "step" or "samples"."""
    curves: dict[str, Curve]
    """Of `loss`, `grad_norm` and `lr` those that there are."""
    topologies: list[tuple[float, Ranks]] = field(default_factory=list)
    """By x, for the lines that say it, without what was abandoned."""
    left_out: dict[str, int] = field(default_factory=dict)
    """File -> how many of its lines could not be read: those that a crash cut short, mostly."""

    def resizes(self) -> list[Resize]:
        pairs = pairwise(self.topologies)
        return [Resize(x, before, after) for (x, before), (_, after) in pairs if before != after]


def split_at(points: list[Any], x: float) -> tuple[list[Any], list[Any]]:
    """Those before `x`, and those from there on."""
    if not points or points[-1][0] < x:  # almost always
        return points, []
    n = bisect_left(points, x, key=lambda point: point[0])
    return points[:n], points[n:]


def find_metrics(run: Store) -> list[str]:
    """The metrics files that belong to a run: in its folder, or beside it.

    Raises:
        FileNotFoundError: there are none; says where they were looked for.
    """
    place = run.where("").rstrip("/")
    if place.rpartition("/")[2] in ("", ".", ".."):
        place = str(Path(place or "/").resolve())
    beside = f"{place}.jsonl"
    if run.exists(JSON_LINES):
        return [run.where(JSON_LINES)]
    folder, name = _folder_and_name(beside)
    if folder.exists(name):
        return [beside]
    tables = _tables(run)
    if tables:
        return [run.where(table) for table in tables]
    looked = f"{run.where(JSON_LINES)}, {beside} and {run.where(CSV_PREFIX)}*.csv"
    raise FileNotFoundError(
        f"{run.where('')} has no metrics: looked for {looked}; give the file, or a csv_monitor's folder, "
        "with --metrics"
    )


def read_metrics(sources: Sequence[str]) -> Metrics:
    """Read files of one kind, in the order in which they were written.

    Each is a path or a URL of a JSON lines file, of a monitor's CSV file, or of the folder of these.

    Raises:
        OSError: one can't be read.
        ValueError: they are of two kinds, or there is nothing in them.
    """
    files = list(_files(sources))
    tables = [name.endswith(".csv") for name, _ in files]
    if any(tables) and not all(tables):
        raise ValueError(
            f"{files[0][0]} and {files[tables.index(not tables[0])][0]} are of two kinds, "
            "with steps and with samples on the x axis; give files of one kind"
        )
    metrics = Metrics("samples" if all(tables) else "step", {})
    for name, text in files:
        read = _read_table if all(tables) else _read_lines
        left_out = read(metrics, name, text)
        if left_out:
            metrics.left_out[name] = left_out
    if not metrics.curves:
        known = "loss, grad_norm or lr"
        raise ValueError(f"{', '.join(name for name, _ in files)}: no line with a number of {known} in it")
    return metrics


def _files(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and text of each file."""
    from ckpt import open_store

    for source in sources:
        folder, name = _folder_and_name(source)
        inner = open_store(source)
        tables = [] if source.endswith((".jsonl", ".csv", ".json")) else _tables(inner)
        if tables:
            yield from ((inner.where(table), _text(inner, table)) for table in tables)
        else:
            yield source, _text(folder, name)


def _folder_and_name(path: str) -> tuple[Store, str]:
    from ckpt import open_store

    folder, separator, name = path.rpartition("/")
    return open_store(folder or ("/" if separator else ".")), name


def _tables(folder: Store) -> list[str]:
    """A monitor's files of the curves that are drawn."""
    names = [f"{CSV_PREFIX}{name}.csv" for name in CSV_NAMES]
    return [name for name in folder.names() if name in names]


def _text(folder: Store, name: str) -> str:
    try:
        return folder.read(name).decode(errors="replace")
    except IsADirectoryError:
        raise FileNotFoundError(
            f"{folder.where(name)} is a folder without {CSV_PREFIX}*.csv of a csv_monitor; give a file"
        ) from None
    except OSError as error:
        raise OSError(f"{folder.where(name)} can't be read: {error.strerror or error}") from None


def _read_lines(metrics: Metrics, name: str, text: str) -> int:
    """Add a file of JSON lines; returns how many lines were left out."""
    left_out = 0
    for line in text.splitlines():
        if not line.strip():
            continue
        row = _row(line)
        if row is None:
            left_out += 1
            continue
        x, ranks = float(row["step"]), _ranks(row)
        metrics.topologies, _ = split_at(metrics.topologies, x)
        if ranks is not None:
            metrics.topologies.append((x, ranks))
        for key in CSV_NAMES.values():
            y = float(row[key]) if _is_number(row.get(key)) else None
            if y is not None or key in metrics.curves:
                metrics.curves.setdefault(key, Curve()).add(x, y)
    return left_out


def _row(line: str) -> dict[str, Any] | None:
    """The object of a line, if it says of which step it is; None for half a line, or anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and _is_number(row.get("step")) and math.isfinite(row["step"])
    return row if known else None


def _ranks(row: Mapping[str, Any]) -> Ranks | None:
    from parallel.degrees import Ranks

    try:
        return Ranks(**{axis: int(row[axis]) for axis in ("pp", "dp", "tp", "zero")})
    except (KeyError, TypeError, ValueError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_table(metrics: Metrics, name: str, text: str) -> int:
    """Add a monitor's CSV file; returns how many rows were left out."""
    key = name.rpartition("/")[2].removeprefix(CSV_PREFIX).removesuffix(".csv")
    if key not in CSV_NAMES:
        wanted = ", ".join(f"{CSV_PREFIX}{known}.csv" for known in CSV_NAMES)
        raise ValueError(f"{name}: which curve is that? expected one of {wanted}")
    lines = text.splitlines()
    cut_short = bool(text) and not text.endswith(("\n", "\r"))  # half a number is a number, too
    left_out = int(cut_short)
    for row in csv.reader(_without_header(lines[:-1] if cut_short else lines)):
        try:
            x, y = map(float, row)
            if not math.isfinite(x):
                raise ValueError
        except ValueError:
            left_out += bool(row)
            continue
        metrics.curves.setdefault(CSV_NAMES[key], Curve()).add(x, y)
    return left_out


def _without_header(lines: Sequence[str]) -> Iterable[str]:
    return lines[1:] if lines and lines[0].startswith("step,") else lines
