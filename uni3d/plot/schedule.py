"""Picture of a pipeline's schedule: what each rank runs when in one step. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uni3d.plot.figure import COLOURS, GREY, make_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS_OF = {
    "forward": COLOURS[5],
    "loss": COLOURS[5],
    "backward": COLOURS[4],
    "weights": COLOURS[2],
    "step": "0.8",
}
"""Colour of each part of a step; taking the data isn't drawn."""
LABELS = {
    "forward": "forward",
    "backward": "backward",
    "weights": "backward, weights",
    "step": "optimizer step, and waiting for its sums",
}
NARROWEST = 0.012
"""Share of the width from which on a box has its number."""
FADED = 0.45
"""Opacity of the boxes of a rank's second stage."""


def draw_schedule(passes: Sequence[Sequence[Mapping[str, Any]]], path: Path, title: str = "") -> None:
    """Draw the passes of one step, a row for each rank; write the picture to a new file.

    A pass has `part`, `stage`, `micro_batch`, and `begin` and `end` in seconds of a clock that all ranks
    share. Boxes have the number of their micro batch. What is white is waiting.
    """
    drawn = [[one for one in rank if one["part"] in COLOURS_OF] for rank in passes]
    everything = [one for rank in drawn for one in rank]
    begin, end = min(p["begin"] for p in everything), max(p["end"] for p in everything)
    figure = make_figure(9, 1.1 + 0.42 * len(passes))
    axes = figure.add_subplot()
    for row, rank in enumerate(drawn):
        first = min((p["stage"] for p in rank if p["part"] == "forward"), default=0)
        for one in rank:
            later = one["part"] != "step" and one["stage"] != first
            _box(axes, row, one, begin, narrow=NARROWEST * (end - begin), opacity=FADED if later else 1.0)
    axes.set_yticks(range(len(passes)), [f"rank {i}" for i in range(len(passes))])
    axes.set_ylim(len(passes) - 0.45, -0.55)
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    parts = {one["part"] for one in everything}
    boxes = [
        axes.bar(0, 0, color=COLOURS_OF[part], label=text) for part, text in LABELS.items() if part in parts
    ]
    figure.legend(
        handles=boxes, loc="outside upper center", ncols=len(boxes), frameon=False, title=title or None
    )
    save(figure, path, force=False)


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
            fontsize=8,
            color=GREY,
        )
