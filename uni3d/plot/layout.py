"""The picture of an atom on ranks: which of them holds which part, before a resize and after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

from uni3d.plot.figure import COLOURS, GREY, make_figure, renderer_of, size_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    import ckpt
    from parallel.degrees import Ranks

Rectangle = tuple[int, int, int, int]
"""First row, rows, first column, columns."""
SIZES = (11, 9, 7.5, 6.5)
"""Of labels, in points, the first that fits."""
THIN = 12
"""Pixels; narrower boxes get a finer edge."""
TICK_ROOM = 0.045
"""Between two ticks, as a part of the axis."""
NUMBERING = (
    "Ranks are numbered with pp outermost and tp innermost. Each tensor-parallel part has a colour, ZeRO's "
    "parts of it have shades; where tp cuts nothing, ZeRO's parts have colours."
)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two topologies."""

    title: str
    ranks: Ranks
    parts: Mapping[int, ckpt.Box]
    """By rank; of those that have the atom at all."""
    notes: Sequence[str]


def drawn_dims(shape: Sequence[int], sides: Sequence[Side]) -> tuple[int, ...]:
    """The dims that are drawn, at most two: those that are cut, then the first ones. The rest is whole."""
    parts = [part for side in sides for part in side.parts.values()]
    cut = [d for d, n in enumerate(shape) if any(length[d] not in (0, n) for _, length in parts)]
    rest = [d for d in range(len(shape)) if d not in cut]
    assert len(cut) <= 2, "tensor parallelism cuts one dim, ZeRO the first"
    return tuple(sorted([*cut, *rest][:2]))


def describe_dims(shape: Sequence[int], dims: Sequence[int]) -> str | None:
    """What is said of an atom that isn't two-dimensional."""
    hidden = [f"dim {d} ({n})" for d, n in enumerate(shape) if d not in dims]
    if not hidden:
        return None
    whole = f"{' and '.join(hidden)} {'is' if len(hidden) == 1 else 'are'} not cut"
    return f"{len(shape)}-D: drawn by dims {' and '.join(map(str, dims))}; {whole}"


def group_ranks(parts: Mapping[int, ckpt.Box], dims: Sequence[int]) -> dict[Rectangle, list[int]]:
    """The ranks that hold each rectangle; those that hold nothing are left out."""
    groups: dict[Rectangle, list[int]] = defaultdict(list)
    for rank, (offset, length) in sorted(parts.items()):
        if prod(length):
            spans = [(offset[d], length[d]) for d in dims]
            spans = [(0, 1)] * (2 - len(spans)) + spans  # a strip is one row
            groups[(*spans[0], *spans[1])].append(rank)
    return dict(groups)


def name_ranks(ranks: Sequence[int]) -> str:
    """E.g. "rank 3", "ranks 0, 2", "ranks 0-7", "ranks 0, 8, ... 56"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    steps = {b - a for a, b in pairwise(ranks)}
    if len(ranks) > 2 and steps == {1}:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    if len(ranks) <= 4:
        return f"ranks {', '.join(map(str, ranks))}"
    return f"ranks {ranks[0]}, {ranks[1]}, … {ranks[-1]} ({len(ranks)})"


def draw_layout(title: str, shape: Sequence[int], sides: Sequence[Side]) -> Figure:
    """The atom twice, side by side, rows downwards and columns to the right."""
    dims = drawn_dims(shape, sides)
    figure = make_figure(12, 6.4 if len(dims) == 2 else 3.4)
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    groups = [group_ranks(side.parts, dims) for side in sides]
    note = describe_dims(shape, dims)
    figure.suptitle(title + (f"\n{note}" if note else ""))
    figure.supxlabel(NUMBERING, fontsize=8, color=GREY)
    for axes, side, boxes in zip(panels, sides, groups, strict=True):
        _prepare(axes, shape, dims, side, boxes)
    renderer = renderer_of(figure)
    for axes, side, boxes in zip(panels, sides, groups, strict=True):
        _Panel(axes, boxes, renderer).draw(side.ranks, strip=len(dims) < 2)
    return figure


def _prepare(
    axes: Axes, shape: Sequence[int], dims: Sequence[int], side: Side, boxes: Mapping[Rectangle, Any]
) -> None:
    """All around the boxes."""
    rows, columns = (shape[dims[0]] if len(dims) == 2 else 1), (shape[dims[-1]] if dims else 1)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)  # downwards, as a matrix is written
    axes.set_title(side.title, fontsize=11, loc="left")
    axes.set_xticks(_ticks({0, columns, *(e for _, _, c, n in boxes for e in (c, c + n))}, columns))
    axes.set_xlabel(
        "\n".join([_extent(dims[-1], columns) if dims else "a single number", *side.notes]), loc="left"
    )
    axes.set_yticks([])
    if len(dims) == 2:
        axes.set_yticks(_ticks({0, rows, *(e for r, n, _, _ in boxes for e in (r, r + n))}, rows))
        axes.set_ylabel(_extent(dims[0], rows))
    axes.tick_params(labelsize=8)


def _extent(dim: int, size: int) -> str:
    return f"dim {dim}, {size:,} long"


def _ticks(edges: set[int], size: int) -> list[int]:
    """The edges of boxes, without those too near to the one before; the last one is always there."""
    kept: list[int] = []
    for edge in sorted(edges):
        if not kept or edge - kept[-1] >= TICK_ROOM * size:
            kept.append(edge)
    if kept[-1] != size:
        kept[-1] = size
    return kept


class _Panel:
    """The boxes of one side, drawn where everything else has found its place."""

    def __init__(self, axes: Axes, boxes: Mapping[Rectangle, Sequence[int]], renderer: RendererBase) -> None:
        self._axes = axes
        self._boxes = boxes
        self._renderer = renderer
        whole = axes.get_window_extent(renderer)
        self._row, self._column = whole.height / axes.get_ylim()[0], whole.width / axes.get_xlim()[1]
        self._too_small: list[tuple[float, float, int]] = []
        """Width, height and length of what found no room: to try is slow, and hundreds are alike."""

    def draw(self, ranks: Ranks, *, strip: bool) -> None:
        """Fill each box and name its ranks; where most are too small for that, name them together."""
        bands: dict[int, list[Rectangle]] = defaultdict(list)
        nameless: dict[int, list[Rectangle]] = defaultdict(list)
        names: dict[int, list[Text]] = defaultdict(list)
        by_tensor = _cut_by_tensor(ranks, self._boxes)
        for box, held_by in self._boxes.items():
            tensor, part = held_by[0] % ranks.tp, held_by[0] % ranks.of_a_stage // ranks.tp
            hue, shade, band = (tensor, part, tensor) if by_tensor else (part, 0, 0)
            self._fill(box, _mixed(COLOURS[hue % len(COLOURS)], (0.45, 0.65)[shade % 2]))
            bands[band].append(box)
            text = self._name(box, _texts(name_ranks(held_by), _size(box, strip)))
            if text is None:
                nameless[band].append(box)
            else:
                names[band].append(text)
        for band, boxes in bands.items():
            if 2 * len(nameless[band]) > len(boxes):
                for text in names[band]:
                    text.remove()
                self._name_together(boxes, strip)

    def _fill(self, box: Rectangle, colour: tuple[float, float, float]) -> None:
        from matplotlib.patches import Rectangle as Patch

        first, rows, left, columns = box
        line = 1.5 if min(rows * self._row, columns * self._column) > THIN else 0.3
        patch = Patch((left, first), columns, rows, facecolor=colour, edgecolor="white", linewidth=line)
        self._axes.add_patch(patch)

    def _name(self, box: Rectangle, texts: Sequence[str], **style: Any) -> Text | None:
        """Write the first of the texts that fits into the box, as large as it does, or on its side."""
        first, rows, left, columns = box
        width, height, length = 0.94 * columns * self._column, 0.94 * rows * self._row, len(texts[-1])
        if any(width <= w and height <= h and length >= n for w, h, n in self._too_small):
            return None
        x, y = left + columns / 2, first + rows / 2
        style |= {"ha": "center", "va": "center"}
        for words in texts:
            for angle in (0, 90):
                for size in SIZES:
                    text = self._axes.text(x, y, words, fontsize=size, rotation=angle, **style)
                    wide, high = size_of(text, self._renderer)
                    if wide < width and high < height:
                        return text
                    text.remove()
        self._too_small.append((width, height, length))
        return None

    def _name_together(self, boxes: Sequence[Rectangle], strip: bool) -> None:
        """One label for many boxes that lie side by side."""
        first, left = min(r for r, *_ in boxes), min(c for *_, c, _ in boxes)
        around = (
            first,
            max(r + n for r, n, *_ in boxes) - first,
            left,
            max(c + n for *_, c, n in boxes) - left,
        )
        held_by = sorted(rank for box in boxes for rank in self._boxes[box])
        largest = max(boxes, key=lambda box: box[1] * box[3])
        alike = all(box[1::2] == largest[1::2] for box in boxes)
        sizes = f"{len(boxes)} parts of {'' if alike else 'at most '}{_size(largest, strip)}"
        style = {"facecolor": "white", "edgecolor": GREY, "linewidth": 0.5, "alpha": 0.85, "pad": 2}
        self._name(around, _texts(name_ranks(held_by), sizes), bbox=style)


def _texts(name: str, size: str) -> list[str]:
    """What a box may be called, the longest first."""
    return [f"{name}\n{size}", name, name.partition(" ")[2]]


def _size(box: Rectangle, strip: bool) -> str:
    _, rows, _, columns = box
    return str(columns) if strip else f"{rows} x {columns}"


def _cut_by_tensor(ranks: Ranks, boxes: Mapping[Rectangle, Sequence[int]]) -> bool:
    """Whether tensor-parallel neighbours hold different parts."""
    neighbours: dict[int, set[Rectangle]] = defaultdict(set)
    for box, held_by in boxes.items():
        for rank in held_by:
            neighbours[rank // ranks.tp].add(box)
    return any(len(found) > 1 for found in neighbours.values())


def _mixed(colour: str, white: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    r, g, b = (channel + (1 - channel) * white for channel in to_rgb(colour))
    return r, g, b
