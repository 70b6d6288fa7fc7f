"""Read a run's curves from its metrics files, and its checkpoints as marks on them. Loads no torch.

Two kinds of metrics files are read: JSON lines, one object per step, as `examples/megatron_gpt/train.py`
writes them; and DeepSpeed's CSV files, one per curve, as `uni3d.observe.monitors` writes them.

A run that resumes from an earlier checkpoint repeats the steps after it. Metrics files are appended to, so
these steps appear twice. The later line counts; earlier lines from that step on are abandoned.
"""

from __future__ import annotations

import csv
import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckpt import CheckpointError, committed_tags, open_store
from ckpt.format import MANIFEST, decode_manifest
from ckpt.stores import Store
from parallel.degrees import Ranks
from uni3d.manifest import RunManifest

JSON_LINES = "metrics.jsonl"
"""Name of the metrics file in a run's folder. `RUN.jsonl` beside the folder is read too."""
CSV_PREFIX = "Train_Samples_"
CSV_NAMES = {"train_loss": "loss", "grad_norm": "grad_norm", "lr": "lr"}
"""Curve by the last part of its CSV file's name. The curves are also the keys of the JSON objects."""

Point = tuple[float, float]
"""x and y; y may be NaN or infinite."""


@dataclass
class Curve:
    """One curve, with the stretches that the run abandoned."""

    points: list[Point] = field(default_factory=list)
    """Points that count, by ascending x."""
    abandoned: list[list[Point]] = field(default_factory=list)
    """One stretch for each time that the run resumed from an earlier checkpoint."""

    def add(self, x: float, y: float | None) -> None:
        """Add a point and abandon all from `x` on. With `y` None, only abandon."""
        self.points, lost = split_at(self.points, x)
        if lost:
            self.abandoned.append(lost)
        if y is not None:
            self.points.append((x, y))


@dataclass(frozen=True)
class Resize:
    """A change of the run's topology."""

    at: float
    """Last x on the old topology."""
    before: Ranks
    after: Ranks

    def __str__(self) -> str:
        return f"{self.before} → {self.after}"


@dataclass
class Metrics:
    """Content of a run's metrics files."""

    x: str
    """Unit of the x axis: "step" or "samples"."""
    curves: dict[str, Curve]
    """Curves by name: `loss`, `grad_norm` and `lr`, as far as present."""
    topologies: list[tuple[float, Ranks]] = field(default_factory=list)
    """x and topology of each line that gives one, without abandoned lines."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of unreadable lines by file, mostly lines cut short by a crash."""

    def resizes(self) -> list[Resize]:
        """Return where the topology changes from one line to the next."""
        return _resizes(self.topologies)


@dataclass(frozen=True)
class Mark:
    """A committed checkpoint on the x axis."""

    tag: str
    at: float
    """Step or samples of the checkpoint, in the unit of the x axis."""
    ranks: Ranks | None
    """Topology that wrote it, or None if unknown or imported."""


def split_at(points: list[Any], x: float) -> tuple[list[Any], list[Any]]:
    """Split sorted points into those before `x`, and those from `x` on."""
    if not points or points[-1][0] < x:  # the usual case, without a search
        return points, []
    n = bisect_left(points, x, key=lambda point: point[0])
    return points[:n], points[n:]


def find_metrics(run: Store) -> list[str]:
    """Return the metrics files of a run, in its folder or beside it.

    Raises:
        FileNotFoundError: there are none. The message names the places searched.
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
    if tables := _tables(run):
        return [run.where(table) for table in tables]
    looked = f"{run.where(JSON_LINES)}, {beside} and {run.where(CSV_PREFIX)}*.csv"
    raise FileNotFoundError(
        f"{run.where('')} has no metrics: looked for {looked}; give the file, or a csv_monitor's folder, "
        "with --metrics"
    )


def read_metrics(sources: Sequence[str]) -> Metrics:
    """Read files of one kind, given in the order in which they were written.

    Each source is the path or URL of a JSON lines file, of a monitor's CSV file, or of a folder of CSV files.

    Raises:
        OSError: a file can't be read.
        ValueError: the files are of two kinds, or none of them has a curve.
    """
    files = list(_files(sources))
    tables = [name.endswith(".csv") for name, _ in files]
    if any(tables) and not all(tables):
        raise ValueError(
            f"{files[0][0]} and {files[tables.index(not tables[0])][0]} are of two kinds: "
            "the x axis is steps in one and samples in the other; give files of one kind"
        )
    metrics = Metrics("samples" if all(tables) else "step", {})
    for name, text in files:
        if left_out := (_read_table if all(tables) else _read_lines)(metrics, name, text):
            metrics.left_out[name] = left_out
    if not metrics.curves:
        names = ", ".join(name for name, _ in files)
        raise ValueError(f"{names}: no line with a number of loss, grad_norm or lr in it")
    return metrics


def _files(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and text of each file."""
    for source in sources:
        folder, name = _folder_and_name(source)
        inner = open_store(source)
        tables = [] if source.endswith((".jsonl", ".csv", ".json")) else _tables(inner)
        if tables:
            yield from ((inner.where(table), _text(inner, table)) for table in tables)
        else:
            yield source, _text(folder, name)


def _folder_and_name(path: str) -> tuple[Store, str]:
    folder, separator, name = path.rpartition("/")
    return open_store(folder or ("/" if separator else ".")), name


def _tables(folder: Store) -> list[str]:
    """Return the names of the CSV files in a monitor's folder that are drawn."""
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
    """Add a file of JSON lines; return the number of unreadable lines."""
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
    """Return the object of a line, or None if the line is cut short or has no step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and _is_number(row.get("step")) and math.isfinite(row["step"])
    return row if known else None


def _ranks(row: Mapping[str, Any]) -> Ranks | None:
    try:
        return Ranks(**{axis: int(row[axis]) for axis in ("pp", "dp", "tp", "zero")})
    except (KeyError, TypeError, ValueError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_table(metrics: Metrics, name: str, text: str) -> int:
    """Add a monitor's CSV file; return the number of unreadable rows."""
    key = name.rpartition("/")[2].removeprefix(CSV_PREFIX).removesuffix(".csv")
    if key not in CSV_NAMES:
        wanted = ", ".join(f"{CSV_PREFIX}{known}.csv" for known in CSV_NAMES)
        raise ValueError(f"{name}: unknown curve; expected a file named {wanted}")
    lines = text.splitlines()
    cut_short = bool(text) and not text.endswith(("\n", "\r"))  # the start of a number is a number too
    if cut_short:
        del lines[-1]
    if lines and lines[0].startswith("step,"):
        del lines[0]
    left_out = int(cut_short)
    for row in csv.reader(lines):
        try:
            x, y = map(float, row)
            if not math.isfinite(x):
                raise ValueError
        except ValueError:
            left_out += bool(row)
            continue
        metrics.curves.setdefault(CSV_NAMES[key], Curve()).add(x, y)
    return left_out


def read_marks(run: Store, x: str) -> tuple[list[Mark], list[str]]:
    """Return a run's checkpoints, oldest first, and a line for each that can't be marked.

    `x` is the unit of the x axis, "step" or "samples".
    """
    marks, problems = [], []
    for tag in committed_tags(run):
        where = run.where(f"{tag}/{MANIFEST}")
        try:
            manifest = RunManifest.read(decode_manifest(run.read(f"{tag}/{MANIFEST}"), where), where)
        except (OSError, CheckpointError) as error:
            problems.append(f"{tag} isn't marked: {error}")
            continue
        at = manifest.step if x == "step" else manifest.engine.global_samples
        if at is None:
            problems.append(f"{tag} isn't marked: {where} doesn't say its {x}")
        else:
            marks.append(Mark(tag, float(at), manifest.written_on))
    return marks, problems


def resizes_between(marks: Sequence[Mark]) -> list[Resize]:
    """Return where the topology changes from one checkpoint to the next.

    The first of the two is the last one written before the change, so the run is taken to have resumed from
    it. Checkpoints behind one that the run went back to don't count.
    """
    kept: list[tuple[float, Ranks | None]] = []
    for mark in marks:
        kept, _ = split_at(kept, mark.at)
        kept.append((mark.at, mark.ranks))
    return _resizes(kept)


def _resizes(topologies: Sequence[tuple[float, Ranks | None]]) -> list[Resize]:
    pairs = pairwise(topologies)
    return [Resize(x, a, b) for (x, a), (_, b) in pairs if a is not None and b is not None and a != b]
