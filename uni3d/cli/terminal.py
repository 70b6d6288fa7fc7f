"""What the commands of `uni3d` share: their arguments, and how they speak.

The commands import `ckpt` when they run, and not before: `uni3d --help` waits neither for it nor for numpy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

out = Console()
err = Console(stderr=True)

Run = Annotated[
    str,
    typer.Argument(
        help="Folder or URL that a run was saved to, or one checkpoint's own.", show_default=False
    ),
]
RunOnly = Annotated[str, typer.Argument(help="Folder or URL that a run was saved to.")]
Tag = Annotated[str | None, typer.Option(help="Which checkpoint; the newest committed one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]


def say(line: object) -> None:
    """Print a line as it is: unbroken, and with no brackets of a name taken for markup."""
    out.print(Text(str(line)), soft_wrap=True)


def complain(error: object) -> None:
    """Print one line to stderr, whatever the error's text is."""
    text = " ".join(str(error).splitlines()) + _whose()
    err.print(Text.assemble(("error:", "red"), f" {text}"), soft_wrap=True)


def _whose() -> str:
    """A hint, where a command was given a folder that another framework wrote; "" otherwise."""
    given = [Path(word) for word in sys.argv[2:] if not word.startswith("-")]
    if sys.argv[1:2] == ["import"] or not any(path.is_dir() for path in given):
        return ""
    from ckpt import CheckpointError
    from uni3d.importers.detect import kind_of

    for path in given:
        with suppress(CheckpointError, OSError):
            if path.is_dir():
                return f" ({path} looks like another framework's, {kind_of(path)}: uni3d import reads it)"
    return ""


def say_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def say_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of the same keys as a table; there is at least one.

    By hand, as rich takes a millisecond for each row, and a checkpoint has tens of thousands.
    """
    formats: dict[str, Callable[[Any], str]] = {
        "bytes": in_bytes,
        "created": lambda x: x[:16].replace("T", " "),
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
    out.print(Text(head, "bold"), soft_wrap=True)
    width = sum(cell_len(column[0]) + 3 for column in columns) - 3
    print("\n".join([("\u2500" if out.encoding.startswith("utf") else "-") * width, *lines]))


def _padded(cell: str, spaces: int, right: bool) -> str:
    return " " * spaces + cell if right else cell + " " * spaces


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, where that is a terminal; gives what is to be told the bytes done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(label, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda n: progress.advance(task, n)


def in_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
