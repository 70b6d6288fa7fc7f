"""The command `uni3d`. Answers without loading torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

import ckpt
from uni3d import __version__

app = typer.Typer(
    name="uni3d",
    help="Look into uni3d's checkpoints, and get the weights out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Run = Annotated[str, typer.Argument(help="Folder that a run was saved to, or one checkpoint's own folder.")]
Tag = Annotated[str | None, typer.Option(help="Which checkpoint; the newest committed one by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def main() -> None:
    """Run the command; what is the user's to mend is one line and exit code 1, never a traceback."""
    try:
        app()
    except (ckpt.CheckpointError, ValueError, OSError) as error:
        err.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"uni3d {__version__}", highlight=False)
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
    rows = _atom_rows(ckpt.open_checkpoint(run, tag)) if atoms else _tag_rows(run, tag)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for key, value in rows[0].items():
        table.add_column(key, justify="right" if isinstance(value, int) else "left", overflow="fold")
    formats: dict[str, Callable[[Any], str]] = {
        "bytes": _bytes,
        "created": lambda x: x[:16].replace("T", " "),
        "latest": lambda x: "*" if x else "",
    }
    for row in rows:
        table.add_row(*(formats.get(key, str)(value) for key, value in row.items()))
    out.print(table)


def _tag_rows(run: str, tag: str | None) -> list[dict[str, Any]]:
    """A row for each committed tag of a run (or the one asked for), oldest first."""
    newest = ckpt.open_checkpoint(run, tag)
    alone = tag is not None or newest.folder == Path(run)  # `run` is a checkpoint's own folder
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
        raise ckpt.CheckpointError(f"{checkpoint.folder} has no atoms")
    return rows


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    tag: Tag = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights as one fp32 state_dict in a safetensors file, whatever topology saved them."""
    checkpoint = ckpt.open_checkpoint(run, tag)
    if output.suffix != ".safetensors":
        raise ValueError(f"{output} must end in .safetensors, the format that is written")
    total = sum(info.nbytes for info in ckpt.weights(checkpoint).values())
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=total)
        size = ckpt.export_safetensors(checkpoint, output, progress=lambda n: progress.advance(task, n))
    tensors = len(ckpt.weights(checkpoint))
    if as_json:
        print(json.dumps({"output": str(output), "tag": checkpoint.tag, "tensors": tensors, "bytes": size}))
    else:
        out.print(f"{output}: {tensors} tensors, {_bytes(size)}, from {checkpoint.tag}", highlight=False)


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
