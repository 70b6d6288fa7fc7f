"""Shared by the commands of `uni3d`: common arguments, and everything that prints.

Commands import `ckpt` when they run, not before, so that `uni3d --help` loads neither it nor numpy. rich is
loaded by what needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from ckpt import Checkpoint
    from ckpt.stores import Store

_LONGEST = 10_000
"""Characters of an error that are printed."""

Run = Annotated[str, Argument(help="Folder or URL of a run, or of a single checkpoint.", show_default=False)]
AnyRun = Annotated[
    str,
    Argument(
        help="Folder or URL of a run, or of a single checkpoint; or another framework's folder or file.",
        show_default=False,
    ),
]
From = Annotated[
    str, Option("--from", help="Kind of another framework's checkpoint, if it is one; as in uni3d import.")
]
RunOnly = Annotated[str, Argument(help="Folder or URL of a run.", show_default=False)]
Tag = Annotated[str | None, Option(help="Tag of the checkpoint.", show_default="the newest committed one")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be done, without doing it.")]


class CommandError(Exception):
    """An error that ends the command with an exit code other than 1."""

    def __init__(self, message: object, exit_code: int) -> None:
        super().__init__(str(message))
        self.exit_code = exit_code


@cache
def out() -> Console:
    """Return the console of stdout."""
    from rich.console import Console

    return Console()


@cache
def err() -> Console:
    """Return the console of stderr."""
    from rich.console import Console

    return Console(stderr=True)


def open_run(run: str) -> Store:
    """Open the folder of a run.

    Raises:
        CheckpointError: it doesn't exist, can't be read, or is a single checkpoint's folder. A mistyped name
            must not look like a run with nothing to do.
    """
    import ckpt
    from ckpt.errors import as_checkpoint_error
    from ckpt.format import MANIFEST

    store = ckpt.open_store(run)
    with as_checkpoint_error(f"{store.where('')} can't be read"):
        if store.exists(MANIFEST):
            what = "is the folder of a single checkpoint"
        elif not store.exists(""):
            what = "is not a folder"
        else:
            return store
    raise ckpt.CheckpointError(f"{store.where('')} {what}; give the folder of a run")


def open_any(
    run: str,
    tag: str | None,
    kind: str = "auto",
    *,
    states: bool = False,
    trains: bool = False,
    renamed: bool = False,
) -> Checkpoint:
    """Open uni3d's own checkpoint, or another framework's in place.

    Optimizer states that can't be read are left out unless `states` is true. `trains` is whether another
    trainer is to go on, for which the optimizer's class must be known. With `renamed`, a tag's folder may
    have another name than it was saved under.

    Raises:
        CheckpointError: there is none, or it is damaged, or lacks what is asked for.
    """
    from uni3d.importers import in_place

    found = in_place.open(run, tag, kind=kind, states=states, renamed=renamed)
    if trains and isinstance(found, in_place.ForeignCheckpoint):
        found.check_class()
    return found


def left_out(checkpoint: Checkpoint) -> list[str]:
    """Return what isn't read of another framework's checkpoint; nothing for our own."""
    return list(getattr(checkpoint, "left_out", []))


def say(line: object) -> None:
    """Print a line as it is, but for characters that steer the terminal."""
    print(_escaped(str(line)))


def _escaped(text: str) -> str:
    """Return the text with escapes for what would steer the terminal: a name may hold any character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def complain(error: object) -> None:
    """Print an error as one line on stderr."""
    from rich.text import Text

    text = _escaped(" ".join(str(error).splitlines()))
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}... ({len(text)} characters)"
    err().print(Text.assemble(("error:", "red"), f" {text}"), soft_wrap=True)


def say_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def answer(value: Any, lines: Iterable[object], as_json: bool) -> None:
    """Print a command's result, as JSON or as lines."""
    if as_json:
        say_json(value)
        return
    for line in lines:
        say(line)


def say_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one or more rows with the same keys as a table.

    Not through `rich.table`, which takes a millisecond per row: a checkpoint has tens of thousands.
    """
    from rich.cells import cell_len
    from rich.text import Text

    formats: dict[str, Callable[[Any], str]] = {
        "bytes": format_bytes,
        "created": lambda x: _cell(x)[:16].replace("T", " "),
        "latest": lambda x: "*" if x else "",
    }
    columns = []
    for key in rows[0]:
        show = formats.get(key, _cell)
        cells = [key, *(show(row[key]) for row in rows)]
        widths = [cell_len(cell) for cell in cells]
        right, width = any(isinstance(row[key], int | float) for row in rows), max(widths)
        columns.append([_padded(c, width - w, right) for c, w in zip(cells, widths, strict=True)])
    head, *lines = ("   ".join(cells).rstrip() for cells in zip(*columns, strict=True))
    out().print(Text(head, "bold"), soft_wrap=True)
    width = sum(cell_len(column[0]) + 3 for column in columns) - 3
    print("\n".join([("\u2500" if out().encoding.startswith("utf") else "-") * width, *lines]))


def _padded(cell: str, spaces: int, right: bool) -> str:
    return " " * spaces + cell if right else cell + " " * spaces


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _escaped(str(value))


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of bytes if stderr is a terminal. Yields the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(label, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)
