"""`uni3d diff`: whether two checkpoints hold the same, and if not, where and by how much."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uni3d.cli.terminal import AsJson, complain, progress_bar, say, say_json, say_table

if TYPE_CHECKING:
    import ckpt

One = Annotated[str, typer.Argument(help="A run's folder or URL, or one checkpoint's own.")]


def diff(
    first: One,
    second: One,
    first_tag: Annotated[str | None, typer.Option(help="Of the first; its newest by default.")] = None,
    second_tag: Annotated[str | None, typer.Option(help="Of the second; its newest by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints, tensor by tensor. Exit code 1 if they differ, 2 if one can't be read."""
    import ckpt

    try:
        a, b = ckpt.open_checkpoint(first, first_tag), ckpt.open_checkpoint(second, second_tag)
        with progress_bar("comparing", ckpt.common_bytes(a, b)) as progress:
            found = ckpt.compare(a, b, progress=progress)
    except (ckpt.CheckpointError, OSError) as error:
        complain(error)
        raise typer.Exit(2) from None
    if as_json:
        say_json({"first": a.url, "second": b.url, "differences": [_row(each) for each in found]})
    else:
        _print(a, b, found)
    if found:
        raise typer.Exit(1)


def _row(found: ckpt.Difference) -> dict[str, Any]:
    row: dict[str, Any] = {"atom": found.key.atom, "state": found.key.state, "differs": found.what}
    numbers = {"elements": found.elements, "absolute": found.absolute, "relative": found.relative}
    if found.what != "values":
        return row | dict.fromkeys(numbers)
    return row | {key: n if isfinite(n) else str(n) for key, n in numbers.items()}  # JSON has no infinity


def _print(a: ckpt.Checkpoint, b: ckpt.Checkpoint, found: list[ckpt.Difference]) -> None:
    arrays = len(a.arrays.keys() | b.arrays.keys())
    if not found:
        say(f"the same: {arrays} arrays")
        return
    say_table([_row(each) for each in found])
    values = [each for each in found if each.what == "values"]
    largest = ""
    if values:
        absolute, relative = max(v.absolute for v in values), max(v.relative for v in values)
        largest = f"; at most by {absolute:.3g}, and by {relative:.3g} of the larger value"
    say(f"{len(found)} of {arrays} arrays differ{largest}")
