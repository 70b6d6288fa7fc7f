"""Picture of a pipeline's schedule: what each rank runs when in one step. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uni3d.plot.figure import COLOURS, make_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Ranks = Sequence[Sequence[Mapping[str, Any]]]
"""Passes of a step, by rank."""
COLOURS_OF = {
    "forward": COLOURS[5],
    "loss": COLOURS[5],
    "backward": COLOURS[4],
    "weights": COLOURS[2],
    "step": "0.88",
}
"""Colour of each part of a step; taking the data isn't drawn."""
LABELS = {
    "forward": "forward",
    "backward": "backward",
    "weights": "backward, weights",
    "step": "optimizer step, and waiting for its sums",
}
INK = "0.1"
NARROWEST = 0.009
"""Share of the width from which on a box has its number."""
FADED = 0.45
"""Opacity of the boxes of a rank's second stage."""


def draw_schedules(panels: Mapping[str, Ranks], path: Path, *, force: bool = False) -> None:
    """Draw the passes of a step on each rank, a panel for each title, and write the picture.

    A pass has `part`, `stage`, `micro_batch`, and `begin` and `end` in seconds of a clock that all ranks
    share. Boxes have the number of their micro batch. What is white is waiting.
    """
    drawn = {
        title: [[p for p in rank if p["part"] in COLOURS_OF] for rank in ranks]
        for title, ranks in panels.items()
    }
    heights = [1.0 + len(ranks) for ranks in drawn.values()]
    figure = make_figure(9, 0.8 + 0.36 * sum(heights))
    rows = figure.subplots(len(drawn), squeeze=False, height_ratios=heights)
    longest = max(_span(ranks)[1] - _span(ranks)[0] for ranks in drawn.values())
    for (axes,), (title, ranks) in zip(rows, drawn.items(), strict=True):
        _panel(axes, ranks, longest)
        axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("milliseconds")
    parts = {one["part"] for ranks in drawn.values() for rank in ranks for one in rank}
    boxes = [
        axes.bar(0, 0, color=COLOURS_OF[part], label=text) for part, text in LABELS.items() if part in parts
    ]
    figure.legend(handles=boxes, loc="outside upper center", ncols=len(boxes), frameon=False)
    save(figure, path, force=force)


def _span(ranks: Ranks) -> tuple[float, float]:
    """Return when the first pass begins and the last one ends."""
    passes = [one for rank in ranks for one in rank]
    return min(p["begin"] for p in passes), max(p["end"] for p in passes)


def _panel(axes: Axes, ranks: Ranks, seconds: float) -> None:
    begin, _ = _span(ranks)
    for row, rank in enumerate(ranks):
        first = min((p["stage"] for p in rank if p["part"] == "forward"), default=0)
        for one in rank:
            later = one["part"] != "step" and one["stage"] != first
            _box(axes, row, one, begin, narrow=NARROWEST * seconds, opacity=FADED if later else 1.0)
    axes.set_yticks(range(len(ranks)), [f"rank {i}" for i in range(len(ranks))])
    axes.set_ylim(len(ranks) - 0.45, -0.55)
    axes.set_xlim(0, 1e3 * seconds)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _box(
    axes: Axes, row: int, one: Mapping[str, Any], begin: float, *, narrow: float, opacity: float
) -> None:
    left, width = 1e3 * (one["begin"] - begin), 1e3 * (one["end"] - one["begin"])
    axes.barh(
        row,
        width,
        left=left,
        height=0.8,
        color=COLOURS_OF[one["part"]],
        alpha=opacity,
        edgecolor="white",
        linewidth=0.6,
    )
    if one["part"] in ("forward", "backward", "weights") and width > 1e3 * narrow:
        axes.text(
            left + width / 2,
            row,
            str(one["micro_batch"] + 1),
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
        )
