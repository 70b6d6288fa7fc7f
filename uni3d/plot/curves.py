"""The picture of a run: loss, gradient norm and learning rate, where it was resized, where it was saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from uni3d.plot.figure import COLOURS, GREY, make_figure, plain, renderer_of, size_of
from uni3d.plot.marks import Mark
from uni3d.plot.metrics import Curve, Metrics, Point, Resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from parallel.degrees import Ranks

PANELS = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
X_LABELS = {"step": "optimizer step", "samples": "samples"}
GAP = 5
"""A line is broken where points are missing for so many times the usual distance."""
FEW = 100
"""Up to so many points, each is marked."""
DECADES = 100
"""A gradient norm that spans more than this is drawn on a log scale."""
SHELVES = 8
"""Rows for the labels of resizes; those that find no room in them have none."""
LABEL_SIZE = 8
ROW = 13
"""Points from one row to the next."""
MOST_NAMED = 9
"""Topologies in the legend."""
ABANDONED = "abandoned: the run went back to a checkpoint, and took these steps again"
NOT_FINITE = "NaN or infinite"
CHECKPOINT = "checkpoint"

Stretch = tuple[float, float, str, "Ranks | None"]
"""Where a topology begins and ends on the x axis, its colour, and it."""


def draw_curves(name: str, metrics: Metrics, resizes: Sequence[Resize], marks: Sequence[Mark]) -> Figure:
    """The curves of the run `name`, one above the other."""
    shown = [key for key in PANELS if key in metrics.curves]
    figure = make_figure(10, 1.6 + 2.8 + 1.7 * (len(shown) - 1))
    heights = [2.8 if key == "loss" else 1.7 for key in shown]
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    xs = sorted({x for key in shown for x, _ in metrics.curves[key].points})
    cuts = [_middle(xs, resize.at) for resize in resizes]
    stretches = _stretches(cuts, resizes, metrics)
    legend: dict[str, Any] = {}
    for axes, key in zip(panels, shown, strict=True):
        _draw_curve(axes, metrics.curves[key], stretches, legend)
        axes.set_ylabel(PANELS[key])
        for cut in cuts:
            axes.axvline(cut, color=GREY, linewidth=1, linestyle=":")
        plain(axes)
    if "grad_norm" in shown:
        _perhaps_log(panels[shown.index("grad_norm")], metrics.curves["grad_norm"])
    _mark_checkpoints(panels[-1], marks, xs, legend)
    panels[-1].set_xlabel(X_LABELS[metrics.x])
    for key in (CHECKPOINT, NOT_FINITE, ABANDONED):  # the topologies come first
        if key in legend:
            legend[key] = legend.pop(key)
    style: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(list(legend.values()), list(legend), ncols=3, **style)
    unlabelled = _label_resizes(figure, panels[0], list(zip(cuts, map(resize_label, resizes), strict=True)))
    figure.suptitle(_title(name, shown, resizes, unlabelled))
    return figure


def _title(name: str, shown: Sequence[str], resizes: Sequence[Resize], unlabelled: int) -> str:
    curves = ", ".join(PANELS[key] for key in shown)
    times = "once" if len(resizes) == 1 else f"{len(resizes)} times"
    resized = f", resized {times}" if resizes else ""
    rest = f" ({unlabelled} without a label, for lack of room)" if unlabelled else ""
    return f"Run {name}: {curves}{resized}{rest}"


def resize_label(resize: Resize) -> str:
    before, after = resize.before.total, resize.after.total
    ranks = f"{before} → {after} ranks" if before != after else f"{after} rank{'s' * (after != 1)}"
    return f"{resize} ({ranks})"


def _middle(xs: Sequence[float], at: float) -> float:
    """Between `at` and the next point."""
    after = next((x for x in xs if x > at), at)
    return (at + after) / 2


def _stretches(cuts: Sequence[float], resizes: Sequence[Resize], metrics: Metrics) -> list[Stretch]:
    """A topology has the same colour whenever it comes back."""
    alone = metrics.topologies[0][1] if metrics.topologies else None
    order = [resizes[0].before, *(r.after for r in resizes)] if resizes else [alone]
    colours = {ranks: COLOURS[i % len(COLOURS)] for i, ranks in enumerate(dict.fromkeys(order))}
    edges = [-math.inf, *cuts, math.inf]
    return [(a, b, colours[ranks], ranks) for a, b, ranks in zip(edges, edges[1:], order, strict=False)]


def _draw_curve(axes: Axes, curve: Curve, stretches: Sequence[Stretch], legend: dict[str, Any]) -> None:
    spacing = _spacing(curve.points)
    for lost in curve.abandoned:
        (line,) = axes.plot(*_lines(lost, spacing), color="0.78", linewidth=6, zorder=1)
        legend.setdefault(ABANDONED, line)
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(curve.points) <= FEW else {}
    for begin, end, colour, ranks in stretches:
        part = [point for point in curve.points if begin < point[0] <= end]
        (line,) = axes.plot(*_lines(part, spacing), color=colour, linewidth=1.5, **marker)
        if not marker:
            axes.plot(*_alone(part, spacing), "o", color=colour, markersize=2.5)
        if ranks is not None and (str(ranks) in legend or len(legend) < MOST_NAMED):
            legend.setdefault(str(ranks), line)
    bad = [x for x, y in curve.points if not math.isfinite(y)]
    if bad:
        above = axes.get_xaxis_transform()  # x in steps, y as a part of the axes' height
        style: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.5, "color": "black", "clip_on": False}
        (crosses,) = axes.plot(bad, [1.0] * len(bad), "x", transform=above, **style)
        legend.setdefault(NOT_FINITE, crosses)


def _spacing(points: Sequence[Point]) -> float:
    """The usual distance between points."""
    distances = [b - a for (a, _), (b, _) in pairwise(points)]
    return median(distances) if distances else math.inf


def _breaks(points: Sequence[Point], spacing: float) -> list[bool]:
    """For each point whether it is far from the one before."""
    pairs = pairwise(points)
    return [True, *(b - a > GAP * spacing for (a, _), (b, _) in pairs)][: len(points)]


def _lines(points: Sequence[Point], spacing: float) -> tuple[list[float], list[float]]:
    """x and y for a line that is broken at gaps and at what isn't finite."""
    xs: list[float] = []
    ys: list[float] = []
    for (x, y), broken in zip(points, _breaks(points, spacing), strict=True):
        if broken and xs:
            xs.append(x)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y if math.isfinite(y) else math.nan)
    return xs, ys


def _alone(points: Sequence[Point], spacing: float) -> tuple[list[float], list[float]]:
    """The points that a line doesn't show: those without a neighbour."""
    ends = [not math.isfinite(y) for _, y in points]
    broken = _breaks(points, spacing)
    before = [broken[i] or i == 0 or ends[i - 1] for i in range(len(points))]
    after = [i + 1 == len(points) or broken[i + 1] or ends[i + 1] for i in range(len(points))]
    alone = [p for p, end, b, a in zip(points, ends, before, after, strict=True) if b and a and not end]
    return [x for x, _ in alone], [y for _, y in alone]


def _perhaps_log(axes: Axes, curve: Curve) -> None:
    values = [y for _, y in curve.points if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > DECADES * min(values):
        axes.set_yscale("log")


def _mark_checkpoints(axes: Axes, marks: Sequence[Mark], xs: Sequence[float], legend: dict[str, Any]) -> None:
    """Small ticks on the x axis, of those that lie where there are curves."""
    places = sorted({mark.at for mark in marks if xs and xs[0] <= mark.at <= xs[-1]})
    if places:
        below = axes.get_xaxis_transform()
        style: dict[str, Any] = {"markersize": 5, "color": "black", "clip_on": False, "linestyle": "none"}
        (ticks,) = axes.plot(places, [0.0] * len(places), marker="^", transform=below, **style)
        legend[CHECKPOINT] = ticks


def _label_resizes(figure: Figure, axes: Axes, labels: Sequence[tuple[float, str]]) -> int:
    """Put the labels in rows above the axes, none over another; returns how many found no room.

    From right to left, so that the line up to a label runs past those of later resizes, not through them.
    """
    renderer, unlabelled = renderer_of(figure), 0
    box, point = axes.get_window_extent(renderer), figure.dpi / 72
    rows: list[list[tuple[float, float]]] = []
    for x, label in sorted(labels, reverse=True):
        probe = figure.text(0, 0, label, fontsize=LABEL_SIZE)
        width, _ = size_of(probe, renderer)
        probe.remove()
        pixel = axes.transData.transform((x, axes.get_ylim()[0]))[0]
        left = max(box.x0, min(pixel, box.x1 - width))
        row = _free_row(rows, left - 6 * point, left + width + 6 * point)
        if row is None:
            unlabelled += 1
            continue
        axes.annotate(
            label,
            (x, 1),
            ((left - pixel) / point, 5 + ROW * row),
            xycoords=axes.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=LABEL_SIZE,
            color="0.2",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linestyle": ":",
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": ((pixel - left) / width, 0),
            },
        )
    return unlabelled


def _free_row(rows: list[list[tuple[float, float]]], begin: float, end: float) -> int | None:
    """The lowest row with room from `begin` to `end`, which is taken then."""
    for i in range(SHELVES):
        if i == len(rows):
            rows.append([])
        if all(end < a or b < begin for a, b in rows[i]):
            rows[i].append((begin, end))
            return i
    return None
