"""The demo's picture: the losses of a run that was resized, and of one that was not."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from matplotlib.axes import Axes

from uni3d.plot.figure import COLOURS, make_figure, plain

Row = dict[str, float]
"""One line of a metrics file: `step`, `loss`, `pp`, `dp`, `tp`, `zero` and others."""


def draw(resized: list[Row], whole: list[Row], differences: list[float], limit: float, path: Path) -> None:
    """Both loss curves above, their relative difference by step below."""
    figure = make_figure(10, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    figure.suptitle("One run on three topologies, and the same run never interrupted")
    draw_losses(top, resized, whole)
    draw_differences(bottom, [row["step"] for row in resized], differences, limit)
    for axes in (top, bottom):
        plain(axes)
    figure.savefig(path)


def segments(rows: list[Row]) -> list[list[Row]]:
    """The rows, cut where the topology changes."""
    by_topology = itertools.groupby(rows, key=lambda row: (row["pp"], row["dp"], row["tp"], row["zero"]))
    return [list(part) for _, part in by_topology]


def draw_losses(axes: Axes, resized: list[Row], whole: list[Row]) -> None:
    for part, colour in zip(segments(resized), itertools.cycle(COLOURS)):
        steps = [row["step"] for row in part]
        pp, dp, tp, zero = (int(part[0][key]) for key in ("pp", "dp", "tp", "zero"))
        label = f"{pp * dp * tp} processes, ZeRO stage {zero}\n(pp, dp, tp) = ({pp}, {dp}, {tp})"
        axes.plot(steps, [row["loss"] for row in part], color=colour, linewidth=3.5, alpha=0.55)
        start = steps[0] - 0.5  # between the last step before the resize and the first after it
        if part[0] is not resized[0]:
            axes.axvline(start, color="0.3", linewidth=1, linestyle=":")
        # x in steps, y as a part of the axes' height: the labels stand in a row above the curves.
        above = axes.get_xaxis_transform()
        axes.annotate(
            label, (start, 1), (6, -4), xycoords=above, textcoords="offset points", va="top", color=colour
        )
    losses = [row["loss"] for row in whole]
    steps = [row["step"] for row in whole]
    axes.plot(steps, losses, "--", color="black", linewidth=1, label="never interrupted, 1 process")
    low, high = min(losses), max(losses)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.25 * (high - low))
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="lower left", frameon=False)


def draw_differences(axes: Axes, steps: list[float], differences: list[float], limit: float) -> None:
    shown = [value if value > 0 else math.nan for value in differences]  # a log scale has no zero
    axes.semilogy(steps, shown, ".", color="0.35", markersize=4)
    axes.axhline(limit, color="#b2182b", linewidth=1, linestyle="--")
    for y, text in ((limit, f"has to stay below {limit:g}"), (1e-9, "no dot: equal to the last bit")):
        axes.annotate(text, (steps[0], y), (0, 3), textcoords="offset points", color="0.35", fontsize=9)
    largest = max((value for value in differences if math.isfinite(value)), default=0.0)
    axes.set_ylim(1e-9, 10 * max(limit, largest))
    axes.set_ylabel("relative difference")
    axes.set_xlabel("optimizer step")
