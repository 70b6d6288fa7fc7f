"""Draw a run's loss, gradient norm and learning rate, with its topologies and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from parallel.degrees import Ranks
from uni3d.plot.figure import COLOURS, GREY, make_figure
from uni3d.plot.metrics import Curve, Mark, Metrics, Point, Resize

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
X_LABELS = {"step": "optimizer step", "samples": "samples"}
GAP = 5
"""A line is broken where points are missing for this many times the usual distance."""
FEW = 100
"""Curves of up to this many points have a marker at each."""
DECADES = 100
"""A gradient norm whose maximum exceeds its minimum by this factor is drawn on a log scale."""
LABEL_SIZE = 8.5
MOST_NAMED = 9
"""Largest number of topologies in the legend."""
ABANDONED = "abandoned: repeated from an earlier checkpoint"
NOT_FINITE = "NaN or infinite"
CHECKPOINT = "checkpoint"

Stretch = tuple[float, float, str, Ranks | None]
"""Begin and end of a topology on the x axis, its colour, and the topology, if known."""


def draw_curves(
    name: str,
    metrics: Metrics,
    resizes: Sequence[Resize],
    marks: Sequence[Mark],
    compared: tuple[str, Metrics] | None = None,
) -> Figure:
    """Draw the curves of the run `name`, one above the other.

    `compared` is the name and the metrics of another run, whose loss is drawn as a dashed line.
    """
    shown = [key for key in PANELS if key in metrics.curves]
    heights = [2.6 if key == "loss" else 1.1 for key in shown]
    figure = make_figure(8, 1.5 + sum(heights))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    xs = sorted({x for key in shown for x, _ in metrics.curves[key].points})
    stretches = _stretches([_middle(xs, resize.at) for resize in resizes], resizes, metrics)
    legend: dict[str, Any] = {}
    for axes, key in zip(panels, shown, strict=True):
        _draw_curve(axes, metrics.curves[key], stretches, legend)
        axes.set_ylabel(PANELS[key])
        for begin, *_ in stretches[1:]:
            axes.axvline(begin, color=GREY, linewidth=1, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    if "grad_norm" in shown:
        _set_scale(panels[shown.index("grad_norm")], metrics.curves["grad_norm"])
    if compared is not None and "loss" in shown:
        other, points = compared[0], compared[1].curves["loss"].points
        style: dict[str, Any] = {"color": "black", "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 3}
        (legend[other],) = panels[shown.index("loss")].plot(*_lines(points, _spacing(points)), **style)
    _mark_checkpoints(panels[-1], marks, xs, legend)
    figure.align_ylabels(list(panels))
    panels[-1].set_xlabel(X_LABELS[metrics.x])
    figure.suptitle(_title(name, shown, resizes))
    for ranks in _label_topologies(figure, panels[0], stretches):
        legend.pop(str(ranks), None)
    below: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(list(legend.values()), list(legend), ncols=3, **below)
    return figure


def _title(name: str, shown: Sequence[str], resizes: Sequence[Resize]) -> str:
    curves = ", ".join(PANELS[key] for key in shown)
    times = {1: "once", 2: "twice"}.get(len(resizes), f"{len(resizes)} times")
    return f"Run {name}: {curves}{f', resized {times}' if resizes else ''}"


def _middle(xs: Sequence[float], at: float) -> float:
    """Return the middle between `at` and the next point."""
    after = next((x for x in xs if x > at), at)
    return (at + after) / 2


def _stretches(cuts: Sequence[float], resizes: Sequence[Resize], metrics: Metrics) -> list[Stretch]:
    """Return the topologies from left to right. One that comes back has its colour again."""
    alone = metrics.topologies[0][1] if metrics.topologies else None
    order = [resizes[0].before, *(r.after for r in resizes)] if resizes else [alone]
    colours = {ranks: COLOURS[i % len(COLOURS)] for i, ranks in enumerate(dict.fromkeys(order))}
    edges = [-math.inf, *cuts, math.inf]
    return [(a, b, colours[ranks], ranks) for a, b, ranks in zip(edges, edges[1:], order, strict=False)]


def _draw_curve(axes: Axes, curve: Curve, stretches: Sequence[Stretch], legend: dict[str, Any]) -> None:
    spacing = _spacing(curve.points)
    marker: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(curve.points) <= FEW else {}
    for begin, end, colour, ranks in stretches:
        xs, ys = _lines([point for point in curve.points if begin < point[0] <= end], spacing)
        (line,) = axes.plot(xs, ys, color=colour, linewidth=2, **marker)
        if not marker:
            axes.plot(*_alone(xs, ys), "o", color=colour, markersize=2.5)
        if ranks is not None and (str(ranks) in legend or len(legend) < MOST_NAMED):
            legend.setdefault(str(ranks), line)
    for lost in curve.abandoned:
        (line,) = axes.plot(*_lines(lost, spacing), color="0.78", linewidth=6, zorder=1)
        legend.setdefault(ABANDONED, line)
    bad = [x for x, y in curve.points if not math.isfinite(y)]
    if bad:
        above = axes.get_xaxis_transform()  # x in steps, y as a fraction of the axes' height
        style: dict[str, Any] = {"markersize": 6, "markeredgewidth": 1.5, "color": "black", "clip_on": False}
        (crosses,) = axes.plot(bad, [1.0] * len(bad), "x", transform=above, **style)
        legend.setdefault(NOT_FINITE, crosses)


def _spacing(points: Sequence[Point]) -> float:
    """Return the usual distance between points."""
    distances = [b - a for (a, _), (b, _) in pairwise(points)]
    return median(distances) if distances else math.inf


def _lines(points: Sequence[Point], spacing: float) -> tuple[list[float], list[float]]:
    """Return x and y of a line, with NaN where it is broken: at gaps, and at values that aren't finite."""
    xs: list[float] = []
    ys: list[float] = []
    for x, y in points:
        if xs and x - xs[-1] > GAP * spacing:
            xs.append(x)
            ys.append(math.nan)
        xs.append(x)
        ys.append(y if math.isfinite(y) else math.nan)
    return xs, ys


def _alone(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the points of a line that have no neighbour, which it doesn't show."""
    known = [False, *map(math.isfinite, ys), False]
    alone = [i for i in range(len(ys)) if known[i + 1] and not known[i] and not known[i + 2]]
    return [xs[i] for i in alone], [ys[i] for i in alone]


def _set_scale(axes: Axes, curve: Curve) -> None:
    values = [y for _, y in curve.points if math.isfinite(y)]
    if values and min(values) > 0 and max(values) > DECADES * min(values):
        axes.set_yscale("log")


def _mark_checkpoints(axes: Axes, marks: Sequence[Mark], xs: Sequence[float], legend: dict[str, Any]) -> None:
    """Draw checkpoints as triangles on the x axis, within the range of the curves."""
    places = sorted({mark.at for mark in marks if xs and xs[0] <= mark.at <= xs[-1]})
    if places:
        below = axes.get_xaxis_transform()
        style: dict[str, Any] = {"markersize": 5, "color": "black", "clip_on": False, "linestyle": "none"}
        (ticks,) = axes.plot(places, [0.0] * len(places), marker="^", transform=below, **style)
        legend[CHECKPOINT] = ticks


def _label_topologies(figure: Figure, axes: Axes, stretches: Sequence[Stretch]) -> set[Ranks]:
    """Write each topology's name above its first stretch; return those that had room.

    A label starts where its stretch does, or ends at the right edge of the axes. One that would run into the
    label before it is left out.
    """
    figure.draw_without_rendering()  # lays it out
    box, free, point = axes.get_window_extent(), -math.inf, figure.dpi / 72
    labelled: set[Ranks] = set()
    for begin, _, colour, ranks in stretches:
        if ranks is None or ranks in labelled:
            continue
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        text = axes.annotate(
            topology_label(ranks), (0, 1), (0, 4), fontsize=LABEL_SIZE, color=colour, **place
        )
        width = text.get_window_extent().width
        start = axes.transData.transform((begin, 0))[0] if math.isfinite(begin) else box.x0
        left = min(start, box.x1 - width)
        if left < free:
            text.remove()
            continue
        labelled.add(ranks)
        free = left + width + 8 * point
        text.xy = (left - box.x0) / box.width, 1
    return labelled


def topology_label(ranks: Ranks) -> str:
    """Return e.g. "4 ranks", and below it "pp2 dp2 tp1 zero1"."""
    return f"{ranks.total} rank{'s' * (ranks.total != 1)}\n{ranks}"
