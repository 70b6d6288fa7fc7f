"""`uni3d plot`: draw a run's training curves, or how an atom is sharded before and after a resize."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, Run, answer, err, open_run, plural

if TYPE_CHECKING:
    from uni3d.plot.metrics import Mark, Metrics, Resize

Degree = Annotated[
    int | None, Option(help="With --layout: degree after the resize.", show_default="as before")
]


def plot(
    run: Run,
    output: Annotated[
        Path | None,
        Argument(help="PNG file to write.", show_default="named after the run, in the current folder"),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        Option(
            help="File or URL with the curves: JSON lines, or the CSV file or folder of csv_monitor. Can be "
            "repeated; files are read in the order given.",
            show_default="RUN/metrics.jsonl, RUN.jsonl or RUN/Train_Samples_*.csv",
        ),
    ] = None,
    compare: Annotated[str | None, Option(help="Another run, whose loss is drawn as a dashed line.")] = None,
    layout: Annotated[
        bool, Option("--layout", help="Draw how an atom is sharded over ranks, before and after a resize.")
    ] = False,
    atom: Annotated[
        str | None, Option(help="With --layout: the atom to draw.", show_default="the largest sharded matrix")
    ] = None,
    tag: Annotated[
        str | None,
        Option(
            help="With --layout: the checkpoint before the resize.",
            show_default="the newest if degrees are given, else the last one before a resize",
        ),
    ] = None,
    world_size: Annotated[
        int | None, Option(help="With --layout: ranks after the resize.", show_default="pp x dp x tp")
    ] = None,
    pp: Degree = None,
    dp: Degree = None,
    tp: Degree = None,
    zero: Annotated[
        int | None, Option(help="With --layout: ZeRO stage after the resize.", show_default="as before")
    ] = None,
    force: Annotated[bool, Option("--force", help="Overwrite OUTPUT if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a run's training curves, or with --layout how a tensor is sharded.

    The curves are loss, gradient norm and learning rate; changes of topology (resizes) are marked.


    With --layout, the topology before the resize is that of --tag. The one after is given by --pp, --dp,
    --tp, --zero and --world-size (one pipeline stage per rank), or else is that of the next checkpoint
    written on another topology.
    """
    from uni3d.plot.figure import check_matplotlib, check_output

    degrees = {"pp": pp, "dp": dp, "tp": tp, "zero": zero, "world-size": world_size}
    only = {"atom": atom, "tag": tag, **degrees}
    given = [f"--{name}" for name, value in only.items() if value is not None]
    if given and not layout:
        raise ValueError(f"{given[0]} needs --layout")
    if layout and (other := "--metrics" if metrics else "--compare" if compare else None):
        raise ValueError(f"{other} and --layout are mutually exclusive")
    path = output or Path(f"{_name(run)}{'-layout' if layout else ''}.png")
    check_output(path, force)
    check_matplotlib()
    if layout:
        row = _layout(run, path, force, atom, tag, degrees)
        answer(row, _layout_lines(row), as_json)
    else:
        row = _curves(run, path, force, metrics or [], compare)
        answer(row, _curve_lines(row), as_json)


def _name(run: str) -> str:
    """Return the name of a run, for its plot's file and title."""
    name = run.rstrip("/").rpartition("/")[2]
    return Path(run).resolve().name or "run" if name in ("", ".", "..") else name


# --- curves --------------------------------------------------------------------------------------------


def _curves(run: str, path: Path, force: bool, given: list[str], compare: str | None) -> dict[str, Any]:
    from uni3d.plot.curves import draw_curves
    from uni3d.plot.figure import save
    from uni3d.plot.metrics import find_metrics, read_marks, read_metrics, resizes_between

    store = open_run(run)
    sources = given or find_metrics(store)
    metrics = read_metrics(sources)
    marks, problems = read_marks(store, metrics.x)
    for name, n in metrics.left_out.items():
        _note(f"{name}: skipped {plural(n, 'line')} (truncated, or not of a step)")
    for problem in problems:
        _note(problem)
    resizes = metrics.resizes() if metrics.topologies else resizes_between(marks)
    compared = (_name(compare), read_metrics(find_metrics(open_run(compare)))) if compare else None
    if compared and (compared[1].x != metrics.x or "loss" not in compared[1].curves):
        raise ValueError(f"--compare {compare}: expected a loss by {metrics.x}, as in {sources[0]}")
    save(draw_curves(_name(run), metrics, resizes, marks, compared), path, force)
    return _curves_row(path, sources, metrics, resizes, marks) | {"compare": compare}


def _note(line: str) -> None:
    err().print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _curves_row(
    path: Path, sources: list[str], metrics: Metrics, resizes: list[Resize], marks: list[Mark]
) -> dict[str, Any]:
    """Return what was drawn, for JSON."""
    return {
        "output": str(path),
        "sources": sources,
        "x": metrics.x,
        "curves": {
            key: {
                "points": len(curve.points),
                "first": curve.points[0][0] if curve.points else None,
                "last": curve.points[-1][0] if curve.points else None,
                "not_finite": sum(not isfinite(y) for _, y in curve.points),
                "abandoned": sum(map(len, curve.abandoned)),
            }
            for key, curve in metrics.curves.items()
        },
        "resizes": [{"after": r.at, "from": vars(r.before), "to": vars(r.after)} for r in resizes],
        "resizes_from": "metrics" if metrics.topologies else "checkpoints",
        "checkpoints": [{"tag": mark.tag, "at": mark.at} for mark in marks],
        "left_out": sum(metrics.left_out.values()),
    }


def _curve_lines(row: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{curve['points']} of {key}" for key, curve in row["curves"].items())
    lines = [f"{row['output']}: points: {counts}; from {', '.join(row['sources'])}"]
    if n := max(curve["abandoned"] for curve in row["curves"].values()):
        lines.append(f"{plural(n, 'point')} abandoned when the run resumed from an earlier checkpoint")
    for resize in row["resizes"]:
        before, after = (_topology(resize[key]) for key in ("from", "to"))
        lines.append(f"after {row['x']} {resize['after']:g}: {before} → {after}")
    if not row["resizes"]:
        lines.append(f"no resizes according to the {row['resizes_from']}")
    return lines


def _topology(ranks: Mapping[str, int]) -> str:
    return " ".join(f"{axis}{n}" for axis, n in ranks.items())


# --- ranks ---------------------------------------------------------------------------------------------


def _layout(
    run: str, path: Path, force: bool, atom: str | None, tag: str | None, degrees: dict[str, int | None]
) -> dict[str, Any]:
    from uni3d.plot.figure import save
    from uni3d.plot.layout import draw_layout, drawn_dims
    from uni3d.plot.resize import before_and_after, choose_atom, side_of

    before, after = before_and_after(run, tag, degrees)
    name = choose_atom(before, after, atom)
    sides = [side_of(name, place) for place in (before, after)]
    shape = before.source.shapes[name]
    size = " x ".join(f"{n:,}" for n in shape) or "a single number"
    save(draw_layout(f"Which rank holds which part of {name} ({size})", shape, sides), path, force)
    return {
        "output": str(path),
        "atom": name,
        "shape": list(shape),
        "drawn_dims": list(drawn_dims(shape, sides)),
        **{
            key: {
                "tag": place.tag,
                "topology": None if place.imported else vars(place.holders.ranks),
                "imported_from": place.imported,
                "boxes": {
                    rank: {"offset": list(offset), "shape": list(length)}
                    for rank, (offset, length) in side.parts.items()
                },
                "notes": list(side.notes),
            }
            for key, place, side in zip(("before", "after"), (before, after), sides, strict=True)
        },
    }


def _layout_lines(row: Mapping[str, Any]) -> list[str]:
    shape = "x".join(map(str, row["shape"])) or "scalar"
    lines = [f"{row['output']}: {row['atom']} ({shape})"]
    for key in ("before", "after"):
        side = row[key]
        written = f" ({side['tag']})" if side["tag"] else ""
        boxes = {(*box["offset"], *box["shape"]) for box in side["boxes"].values() if 0 not in box["shape"]}
        on = len(side["boxes"])
        parts = f"{plural(len(boxes), 'part')} on {plural(on, 'rank')}"
        if source := side["imported_from"]:
            place = f"imported from {source}"
        else:
            place = _topology(side["topology"])
        lines.append(f"{key}: {place}{written}: {parts}")
    return lines
