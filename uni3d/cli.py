"""The command `uni3d`. Answers without loading torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from uni3d import __version__, cli_config, cli_export, cli_plan, cli_upkeep
from uni3d.terminal import AsJson, Run, Tag, complain, in_bytes, out, say, say_json

if TYPE_CHECKING:
    import ckpt

app = typer.Typer(
    name="uni3d",
    help="Look into uni3d's checkpoints, get the weights out, and look after them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command; what is the user's to mend is one line and exit code 1, never a traceback."""
    try:
        app()
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


@app.command()
def inspect(
    run: Run,
    tag: Tag = None,
    atoms: Annotated[bool, typer.Option("--atoms", help="List the atoms of one checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Which checkpoints there are, or with --atoms what is in one."""
    import ckpt

    rows = _atom_rows(ckpt.open_checkpoint(run, tag)) if atoms else _tag_rows(run, tag)
    if as_json:
        say_json(rows)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, int) else "left", overflow="fold")
    formats: dict[str, Callable[[Any], str]] = {
        "bytes": in_bytes,
        "created": lambda x: x[:16].replace("T", " "),
        "latest": lambda x: "*" if x else "",
    }
    for row in rows:
        table.add_row(*(Text(formats.get(key, str)(value)) for key, value in row.items()))
    out.print(table)


def _tag_rows(run: str, tag: str | None) -> list[dict[str, Any]]:
    """A row for each committed tag of a run (or the one asked for), oldest first."""
    import ckpt

    newest = ckpt.open_checkpoint(run, tag)
    alone = tag is not None or not newest.folder  # `run` is a checkpoint's own folder
    checkpoints = [newest] if alone else [ckpt.open_checkpoint(run, t) for t in ckpt.committed_tags(run)]
    rows = []
    for checkpoint in checkpoints:
        manifest = checkpoint.manifest
        rows.append(
            {
                "tag": checkpoint.tag,
                "latest": not alone and checkpoint.tag == newest.tag,
                "step": manifest["step"],
                "created": manifest["created"],
                "written on": _topology(manifest["writer"]),
                "atoms": len(checkpoint.atoms),
                "bytes": sum(info.nbytes for info in checkpoint.arrays.values()),
            }
        )
    return rows


def _topology(writer: dict[str, Any]) -> str:
    return " ".join(f"{axis}{n}" for axis, n in writer["topology"].items()) + f" zero{writer['zero_stage']}"


def _atom_rows(checkpoint: ckpt.Checkpoint) -> list[dict[str, Any]]:
    """A row for each array of a checkpoint."""
    from ckpt import CheckpointError

    rows = [
        {
            "atom": key.atom,
            "state": key.state,
            "dtype": info.dtype,
            "shape": "x".join(map(str, info.shape)) or "scalar",
            "chunks": len(info.chunks),
            "bytes": info.nbytes,
        }
        for key, info in checkpoint.arrays.items()
    ]
    if not rows:
        raise CheckpointError(f"{checkpoint.url} has no atoms")
    return rows


for command in (
    cli_export.export,
    cli_upkeep.verify,
    cli_upkeep.clean,
    cli_upkeep.prune,
    cli_plan.plan,
    cli_config.config,
):
    app.command()(command)
