"""The command `uni3d`. Answers without loading torch."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated

import typer

from uni3d import __version__
from uni3d.cli import config, diff, doctor, export, import_, inspect, plan, plot, prune
from uni3d.cli.terminal import complain, say

app = typer.Typer(
    name="uni3d",
    help="Look into uni3d's checkpoints, get weights out and others' checkpoints in, and look after them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; what is the user's to mend is one line and exit code 1, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know a letter of a name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="uni3d")
    except (RuntimeError, ValueError, OSError) as error:
        from ckpt import CheckpointError

        if isinstance(error, RuntimeError) and not isinstance(error, CheckpointError):
            raise
        complain(error)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"uni3d {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


def _paragraphs(command: Callable[..., None]) -> str:
    """A command's docstring with no line breaks but between paragraphs: the terminal breaks lines itself."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (
    inspect.inspect,
    prune.verify,
    diff.diff,
    doctor.doctor,
    export.export,
    import_.import_,
    plot.plot,
    plan.plan,
    config.config,
    prune.clean,
    prune.prune,
):
    app.command(command.__name__.rstrip("_"), help=_paragraphs(command))(command)
