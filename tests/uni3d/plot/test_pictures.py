"""Contents of the pictures of `uni3d plot`, read from matplotlib's objects."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from marks import slow
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

import parallel
from uni3d.estimate.save import part_boxes
from uni3d.plot.curves import draw_curves, topology_label
from uni3d.plot.layout import Side, draw_layout, drawn_dims, name_ranks
from uni3d.plot.metrics import Mark, Metrics, Resize, read_metrics


def metrics_of(tmp_path: Path, rows: list[dict[str, Any]]) -> Metrics:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_metrics([str(path)])


def test_what_is_drawn(tmp_path: Path) -> None:
    """Pieces, abandoned stretches, gaps and NaN of a curve; resizes through all panels; checkpoints."""
    a, b = parallel.Ranks(pp=1, dp=2, tp=1, zero=1), parallel.Ranks(pp=2, dp=2, tp=1, zero=1)
    rows = [{"step": n, "loss": 9.0 - n, "grad_norm": 1.0, "lr": 0.1, **vars(a)} for n in range(1, 7)]
    rows += [{"step": n, "loss": 1.0, "grad_norm": 1.0, "lr": 0.1, **vars(b)} for n in (5, 6, 7, 60)]
    rows[7]["loss"] = math.nan
    metrics = metrics_of(tmp_path, rows)
    marks = [Mark("t4", 4, a), Mark("t500", 500, b)]
    figure = draw_curves("tiny", metrics, metrics.resizes(), marks)
    loss, norm, rate = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "gradient norm", "learning rate"]
    assert rate.get_xlabel() == "optimizer step"
    lines = [list(map(tuple, np.asarray(line.get_xydata()).round(3).tolist())) for line in loss.lines]
    drawn = str(lines)
    assert str([(1, 8), (2, 7), (3, 6), (4, 5)]).replace(" ", "") in drawn.replace(".0", "").replace(" ", "")
    assert any(line == [(5, 4), (6, 3)] for line in lines), "the abandoned one"
    after = next(line for line in loss.lines if list(line.get_xdata())[:1] == [5] and line.get_zorder() > 1)
    assert list(after.get_xdata()) == [5, 6, 7, 60, 60], "broken before 60"
    assert [math.isnan(y) for y in after.get_ydata()] == [False, True, False, True, False]
    crosses = next(line for line in loss.lines if line.get_marker() == "x")
    assert list(crosses.get_xdata()) == [6]
    for axes in (loss, norm, rate):
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[4.5, 4.5]]
    ticks = next(line for line in rate.lines if line.get_marker() == "^")
    assert list(ticks.get_xdata()) == [4], "t500 lies beyond the curves"
    assert [text.get_text() for text in loss.texts] == ["2 ranks\npp1 dp2 tp1 zero1"]
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert sorted(names)[1:] == ["abandoned: repeated from an earlier checkpoint", "checkpoint", str(b)]
    title = figure.get_suptitle()
    assert title == "Run tiny: loss, gradient norm, learning rate, resized once"


def test_a_topology_that_comes_back_has_its_colour_again(tmp_path: Path) -> None:
    places = [{"pp": 1, "dp": d, "tp": 1, "zero": 1} for d in (1, 2, 1)]
    metrics = metrics_of(tmp_path, [{"step": n, "loss": 1.0, **places[n // 10]} for n in range(30)])
    (axes,) = draw_curves("x", metrics, metrics.resizes(), []).axes
    first, second, third = (to_hex(line.get_color()) for line in axes.lines if line.get_linestyle() == "-")
    assert first == third != second


def test_a_point_without_neighbours_is_seen(tmp_path: Path) -> None:
    steps = [*range(200), 1000]
    metrics = metrics_of(tmp_path, [{"step": n, "loss": 1.0 if n != 1 else math.inf} for n in steps])
    (axes,) = draw_curves("x", metrics, [], []).axes
    dots = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(dots.get_xdata()) == [0, 1000]


def test_a_gradient_norm_that_explodes_is_on_a_log_scale(tmp_path: Path) -> None:
    for largest, scale in ((50.0, "linear"), (5000.0, "log")):
        norms = [1.0, largest, 2.0, math.inf]
        rows = [{"step": n, "grad_norm": norm} for n, norm in enumerate(norms)]
        (axes,) = draw_curves("x", metrics_of(tmp_path, rows), [], []).axes
        assert axes.get_yscale() == scale


@pytest.mark.parametrize(("resized", "labelled"), [([500, 750], 3), ([985, 990, 995], 1)])
def test_topologies_are_labelled_where_there_is_room(
    tmp_path: Path, resized: list[int], labelled: int
) -> None:
    """Topologies without room are in the legend, and no label overlaps another."""
    metrics = metrics_of(tmp_path, [{"step": n, "loss": 1.0} for n in range(1000)])
    places = [parallel.Ranks(pp=n + 1, dp=64, tp=8, zero=1) for n in range(len(resized) + 1)]
    resizes = [Resize(at, *pair) for at, pair in zip(resized, pairwise(places), strict=True)]
    figure = draw_curves("x", metrics, resizes, [])
    texts = [text.get_text() for text in figure.axes[0].texts]
    in_legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert len(texts) >= labelled
    assert texts[0] == topology_label(places[0])
    assert in_legend == {str(ranks) for ranks in places if topology_label(ranks) not in texts}
    assert_apart(figure, list(figure.axes[0].texts))


def test_many_resizes_keep_their_labels_apart(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path, [{"step": n, "loss": 1.0} for n in range(1000)])
    places = [parallel.Ranks(pp=n + 1, dp=64, tp=8, zero=1) for n in range(41)]
    resizes = [Resize(20 * n + 20, *pair) for n, pair in enumerate(pairwise(places))]
    figure = draw_curves("x", metrics, resizes, [])
    assert len(figure.axes[0].texts) >= 3
    assert_apart(figure, list(figure.axes[0].texts))


def test_another_run_is_a_dashed_line(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path, [{"step": n, "loss": 1.0, "lr": 1.0} for n in range(9)])
    other = metrics_of(tmp_path, [{"step": n, "loss": 2.0, "lr": 1.0} for n in range(5)])
    figure = draw_curves("x", metrics, [], [], ("other", other))
    (line,) = (line for line in figure.axes[0].lines if line.get_linestyle() == "--")
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
    assert list(line.get_ydata()) == [2.0] * 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["other"]


def assert_apart(figure: Figure, texts: list[Any]) -> None:
    """Check that no text overlaps another or the figure's edge."""
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in texts]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


# --- ranks ---------------------------------------------------------------------------------------------


def side(parts: dict[int, Any], **degrees: int) -> Side:
    ranks = parallel.Ranks(**{"pp": 1, "dp": 1, "tp": 1, "zero": 1, **degrees})
    return Side(title="", ranks=ranks, parts=parts, notes=[])


def test_boxes_are_rectangles_with_their_ranks() -> None:
    """Two replicas of a matrix in 2 x 2 parts, and a rank with an empty part."""
    parts = {
        4 * copy + 2 * r + c: ((3 * r, 4 * c), (3 if r == 0 else 2, 4))
        for copy in (0, 1)
        for r in (0, 1)
        for c in (0, 1)
    }
    sides = [side(parts, dp=4, tp=2), side({0: ((0, 0), (5, 8)), 1: ((0, 0), (0, 8))}, dp=2)]
    left, right = draw_layout("Which", (5, 8), sides).axes
    found = {
        (patch.get_y(), patch.get_x(), patch.get_height(), patch.get_width())
        for patch in left.patches
        if isinstance(patch, Rectangle)
    }
    assert found == {(0, 0, 3, 4), (0, 4, 3, 4), (3, 0, 2, 4), (3, 4, 2, 4)}
    assert {text.get_text() for text in left.texts} == {
        "ranks 0, 4\n3 x 4",
        "ranks 1, 5\n3 x 4",
        "ranks 2, 6\n2 x 4",
        "ranks 3, 7\n2 x 4",
    }
    for text in left.texts:  # in its own box
        x, y = text.get_position()
        assert (x < 4, y < 3) == (text.get_text()[6] in "02", text.get_text()[6] in "01")
    assert [text.get_text() for text in right.texts] == ["rank 0\n5 x 8"]
    assert len(right.patches) == 1
    assert list(left.get_yticks()) == [0, 3, 5]
    assert left.get_ylim() == (5, 0), "downwards, as matrices are written"
    colours = [to_hex(patch.get_facecolor()) for patch in left.patches]
    assert len(set(colours)) == 4


@pytest.mark.parametrize(("dp", "tp"), [(3, 1), (24, 1), (2, 8), (64, 8), slow(512, 2)])
@pytest.mark.parametrize("tp_dim", [0, 1])
def test_labels_stay_apart_with_many_ranks(dp: int, tp: int, tp_dim: int) -> None:
    shape = (4096, 1024)
    boxes = part_boxes(shape, tp_dim, dp=dp, tp=tp, shards=dp)
    figure = draw_layout("Which", shape, [side({r: tuple(b) for r, b in enumerate(boxes)}, dp=dp, tp=tp)])
    (axes,) = figure.axes
    assert len(axes.patches) == len(set(boxes))
    assert_apart(figure, list(axes.texts))
    marks = [t for t in (*axes.get_xticklabels(), *axes.get_yticklabels()) if t.get_text()]
    assert_apart(figure, marks)


def test_other_dims() -> None:
    """Two of three dims are drawn, those that are cut; a vector and a number are drawn as a strip."""
    sides = [side({0: ((0, 0, 0), (2, 6, 4)), 1: ((2, 0, 0), (2, 6, 4)), 2: ((0, 0, 4), (2, 6, 4))})]
    assert drawn_dims((4, 6, 8), sides) == (0, 2)
    (axes,) = draw_layout("Which", (4, 6, 8), sides).axes
    assert {p.get_bbox().bounds for p in axes.patches} == {(0, 0, 4, 2), (0, 2, 4, 2), (4, 0, 4, 2)}
    (strip,) = draw_layout("Which", (5,), [side({0: ((0,), (3,)), 1: ((3,), (2,))}, dp=2)]).axes
    assert {p.get_bbox().bounds for p in strip.patches} == {(0, 0, 3, 1), (3, 0, 2, 1)}
    assert [text.get_text() for text in strip.texts] == ["rank 0\n3", "rank 1\n2"]
    (number,) = draw_layout("Which", (), [side({0: ((), ()), 1: ((), ())}, dp=2)]).axes
    assert [text.get_text() for text in number.texts] == ["ranks 0, 1\n1"]


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0, 2"),
        (range(8), "ranks 0-7"),
        ([0, 2, 4, 6], "ranks 0, 2, 4, 6"),
        (range(0, 512, 8), "ranks 0, 8, … 504 (64)"),
    ],
)
def test_names_of_ranks(ranks: Any, name: str) -> None:
    assert name_ranks(list(ranks)) == name
