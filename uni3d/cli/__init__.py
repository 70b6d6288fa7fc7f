"""The command `uni3d`: one file per command, and none of them loads torch to answer `--help`.

Modules:
    inspect, verify, diff     look into checkpoints
    doctor, plan, plot        ask about topologies, before and after a resize
    bench                     measure a training on this machine
    export, import_           weights out, other frameworks' checkpoints in
    prune, clean              delete old checkpoints, and the remains of crashed saves
    config                    check a config
    terminal, plan_report     printing
"""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path
from typing import Annotated

import typer

from uni3d.cli import bench, clean, config, diff, doctor, export, import_, inspect, plan, plot, prune, verify
from uni3d.cli.terminal import CommandError, complain, say
from uni3d.version import __version__

app = typer.Typer(
    name="uni3d",
    help="Inspect, verify, compare, import, export and manage checkpoints; plan and plot training runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_OURS_ALONE = [["verify"], ["prune"], ["clean"], ["plot"]]
"""Commands that don't take another framework's checkpoint."""


def main() -> None:
    """Run a command. A user's mistake is one line on stderr and a non-zero exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # the terminal's encoding may lack a character of a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.freeze()  # modules live to the end: neither later imports nor the exit need look through them
    try:
        app(prog_name="uni3d")
    except (CommandError, RuntimeError, ValueError, OSError) as error:
        from ckpt import CheckpointError

        if isinstance(error, RuntimeError) and not isinstance(error, CheckpointError):
            raise
        hint = "" if isinstance(error, FileExistsError) else _foreign_hint()
        complain(f"{error}{hint}")
        sys.exit(error.exit_code if isinstance(error, CommandError) else 1)


def _foreign_hint() -> str:
    """Return a hint at `uni3d import` if an argument is another framework's checkpoint, else ""."""
    given = [Path(word) for word in sys.argv[2:] if not word.startswith("-")]
    if sys.argv[1:2] not in _OURS_ALONE or not any(path.is_dir() for path in given):
        return ""
    from ckpt import CheckpointError
    from uni3d.importers.detect import kind_of

    for path in given:
        with suppress(CheckpointError, OSError):
            if path.is_dir():
                return f" ({path} looks like a {kind_of(path)} checkpoint; convert it with uni3d import)"
    return ""


def _version(wanted: bool) -> None:
    if wanted:
        say(f"uni3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _paragraphs(command: Callable[..., None]) -> str:
    """Return a command's docstring with one line per paragraph, as the terminal wraps lines itself."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for module in (inspect, verify, diff, doctor, export, import_, plot, plan, bench, config, clean, prune):
    name = module.__name__.rpartition(".")[2]
    command = getattr(module, name)
    app.command(name.rstrip("_"), help=_paragraphs(command))(command)
