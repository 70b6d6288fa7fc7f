"""Draw which rank holds which part of an atom, before and after a resize."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import ckpt
from parallel.degrees import Ranks
from uni3d.plot.figure import COLOURS, GREY, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rectangle = tuple[int, int, int, int]
"""First row, rows, first column, columns."""
SIZES = (11, 9, 7.5, 6.5)
"""Font sizes of labels in points. The first that fits is used."""
THIN = 12
"""Boxes narrower than this many pixels have a finer edge."""
TICK_ROOM = 0.045
"""Smallest distance between two ticks, as a fraction of the axis."""
NUMBERING = (
    "Ranks are numbered with pp outermost and tp innermost. Colours are tensor-parallel parts and shades are "
    "ZeRO's; where tp doesn't cut the atom, colours are ZeRO's parts."
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One half of the picture: the parts of an atom on one topology."""

    title: str
    ranks: Ranks
    parts: Mapping[int, ckpt.Box]
    """Box by rank, for the ranks that have the atom."""
    notes: Sequence[str]


def drawn_dims(shape: Sequence[int], sides: Sequence[Side]) -> tuple[int, ...]:
    """Return the dims to draw, at most two: those that are cut, then the first ones."""
    parts = [part for side in sides for part in side.parts.values()]
    cut = [d for d, n in enumerate(shape) if any(length[d] not in (0, n) for _, length in parts)]
    rest = [d for d in range(len(shape)) if d not in cut]
    assert len(cut) <= 2, "tensor parallelism cuts one dim, ZeRO the first"
    return tuple(sorted([*cut, *rest][:2]))


def group_ranks(parts: Mapping[int, ckpt.Box], dims: Sequence[int]) -> dict[Rectangle, list[int]]:
    """Return the ranks that hold each rectangle, without ranks that hold nothing."""
    groups: dict[Rectangle, list[int]] = defaultdict(list)
    for rank, (offset, length) in sorted(parts.items()):
        if prod(length):
            spans = [(offset[d], length[d]) for d in dims]
            spans = [(0, 1)] * (2 - len(spans)) + spans  # a strip is one row
            groups[(*spans[0], *spans[1])].append(rank)
    return dict(groups)


def name_ranks(ranks: Sequence[int]) -> str:
    """Return e.g. "rank 3", "ranks 0, 2", "ranks 0-7", "ranks 0, 8, … 56 (8)"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    steps = {b - a for a, b in pairwise(ranks)}
    if len(ranks) > 2 and steps == {1}:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"ranks {ranks[0]}, {ranks[1]}, … {ranks[-1]} ({len(ranks)})"


def draw_layout(title: str, shape: Sequence[int], sides: Sequence[Side]) -> Figure:
    """Draw the atom once per side, rows downwards and columns to the right."""
    dims = drawn_dims(shape, sides)
    figure = make_figure(11, 6 if len(dims) == 2 else 3.4)
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    groups = [group_ranks(side.parts, dims) for side in sides]
    figure.suptitle(title)
    figure.supxlabel(NUMBERING, fontsize=8, color=GREY)
    for axes, side, boxes in zip(panels, sides, groups, strict=True):
        _prepare(axes, shape, dims, side, boxes)
    figure.draw_without_rendering()  # lays it out
    for axes, side, boxes in zip(panels, sides, groups, strict=True):
        _draw_boxes(axes, boxes, side.ranks, strip=len(dims) < 2)
    return figure


def _prepare(
    axes: Axes, shape: Sequence[int], dims: Sequence[int], side: Side, boxes: Mapping[Rectangle, Any]
) -> None:
    """Set the title, axes and notes around the boxes."""
    rows, columns = (shape[dims[0]] if len(dims) == 2 else 1), (shape[dims[-1]] if dims else 1)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)  # downwards, as matrices are written
    axes.set_title(side.title, fontsize=11, loc="left")
    axes.set_xticks(_ticks({0, columns, *(e for _, _, c, n in boxes for e in (c, c + n))}, columns))
    extent = f"dim {dims[-1]} ({columns:,})" if dims else "a single number"
    axes.set_xlabel("\n".join([extent, *side.notes]), loc="left")
    axes.set_yticks([])
    if len(dims) == 2:
        axes.set_yticks(_ticks({0, rows, *(e for r, n, _, _ in boxes for e in (r, r + n))}, rows))
        axes.set_ylabel(f"dim {dims[0]} ({rows:,})")
    axes.tick_params(labelsize=8)


def _ticks(edges: set[int], size: int) -> list[int]:
    """Return the edges of boxes, without those too close to the one before, but always with the last."""
    kept: list[int] = []
    for edge in sorted(edges):
        if not kept or edge - kept[-1] >= TICK_ROOM * size:
            kept.append(edge)
    if kept[-1] != size:
        kept[-1] = size
    return kept


def _draw_boxes(axes: Axes, boxes: Mapping[Rectangle, Sequence[int]], ranks: Ranks, *, strip: bool) -> None:
    """Fill each box of a panel that is laid out, and write its ranks into it if there is room."""
    from matplotlib.patches import Rectangle as Patch

    whole = axes.get_window_extent()
    by_tensor = _cut_by_tensor(ranks, boxes)
    too_small = set()  # rows and columns of boxes without room: measuring is slow, and hundreds are alike
    for (first, rows, left, columns), held_by in boxes.items():
        tensor, part = held_by[0] % ranks.tp, held_by[0] % ranks.of_a_stage // ranks.tp
        hue, shade = (tensor, part) if by_tensor else (part, 0)
        colour = _mixed(COLOURS[hue % len(COLOURS)], (0.45, 0.65)[shade % 2])
        room = columns * whole.width / axes.get_xlim()[1], rows * whole.height / axes.get_ylim()[0]
        line = 1.5 if min(room) > THIN else 0.3
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white", "linewidth": line}
        axes.add_patch(Patch((left, first), columns, rows, **style))
        size = str(columns) if strip else f"{rows} x {columns}"
        middle = left + columns / 2, first + rows / 2
        if (rows, columns) not in too_small and not _label(axes, middle, name_ranks(held_by), size, room):
            too_small.add((rows, columns))


def _label(axes: Axes, middle: tuple[float, float], name: str, size: str, room: tuple[float, float]) -> bool:
    """Write the ranks and the size of their part, or the ranks alone, as large as fits; return if any did."""
    for words in (f"{name}\n{size}", name):
        for points in SIZES:
            text = axes.text(*middle, words, fontsize=points, ha="center", va="center")
            extent = text.get_window_extent()
            if extent.width < 0.94 * room[0] and extent.height < 0.94 * room[1]:
                return True
            text.remove()
    return False


def _cut_by_tensor(ranks: Ranks, boxes: Mapping[Rectangle, Sequence[int]]) -> bool:
    """Return whether tensor-parallel neighbours hold different parts."""
    neighbours: dict[int, set[Rectangle]] = defaultdict(set)
    for box, held_by in boxes.items():
        for rank in held_by:
            neighbours[rank // ranks.tp].add(box)
    return any(len(found) > 1 for found in neighbours.values())


def _mixed(colour: str, white: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    r, g, b = (channel + (1 - channel) * white for channel in to_rgb(colour))
    return r, g, b
