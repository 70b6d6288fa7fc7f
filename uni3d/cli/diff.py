"""`uni3d diff`: compare two checkpoints."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from uni3d.cli.terminal import (
    AnyRun,
    AsJson,
    CommandError,
    left_out,
    open_any,
    progress_bar,
    say,
    say_json,
    say_table,
)

if TYPE_CHECKING:
    import ckpt

FirstTag = Annotated[str | None, Option(help="Tag in FIRST.", show_default="the newest committed one")]
SecondTag = Annotated[str | None, Option(help="Tag in SECOND.", show_default="the newest committed one")]


def diff(
    first: AnyRun,
    second: AnyRun,
    first_tag: FirstTag = None,
    second_tag: SecondTag = None,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor.

    Exits with 0 if they are identical, 1 if they differ, and 2 if one can't be read.
    """
    import ckpt

    try:
        a, b = open_any(first, first_tag, states=True), open_any(second, second_tag, states=True)
        with progress_bar("comparing", ckpt.common_bytes(a, b)) as progress:
            found = ckpt.compare(a, b, progress=progress)
    except (ckpt.CheckpointError, OSError) as error:
        raise CommandError(error, exit_code=2) from None
    if as_json:
        say_json({"first": a.url, "second": b.url, "differences": [_row(each) for each in found]})
    else:
        _print(a, b, found)
        for line in [*left_out(a), *left_out(b)]:
            say(f"left out: {line}")
    if found:
        raise Exit(1)


def _row(found: ckpt.Difference) -> dict[str, Any]:
    row: dict[str, Any] = {"atom": found.key.atom, "state": found.key.state, "differs": found.what}
    numbers = {"elements": found.elements, "absolute": found.absolute, "relative": found.relative}
    if found.what != "values":
        return row | dict.fromkeys(numbers)
    return row | {key: n if isfinite(n) else str(n) for key, n in numbers.items()}  # JSON has no infinity


def _print(a: ckpt.Checkpoint, b: ckpt.Checkpoint, found: list[ckpt.Difference]) -> None:
    arrays = len(a.arrays.keys() | b.arrays.keys())
    if not found:
        say(f"{arrays} arrays are identical")
        return
    say_table([_row(each) for each in found])
    values = [each for each in found if each.what == "values"]
    largest = ""
    if values:
        absolute, relative = max(v.absolute for v in values), max(v.relative for v in values)
        largest = f"; largest difference {absolute:.3g} absolute, {relative:.3g} relative"
    say(f"{len(found)} of {arrays} arrays differ{largest}")
