"""`uni3d inspect`: list the checkpoints of a run, or the atoms of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import (
    AnyRun,
    AsJson,
    From,
    Tag,
    left_out,
    open_any,
    progress_bar,
    say,
    say_json,
    say_table,
)

if TYPE_CHECKING:
    import ckpt
    from uni3d.manifest import RunManifest


def inspect(
    run: AnyRun,
    pattern: Annotated[
        str | None, Argument(help="With --atoms: only atoms whose names match, e.g. 'layers.0.*'.")
    ] = None,
    tag: Tag = None,
    atoms: Annotated[bool, Option("--atoms", help="List the atoms of one checkpoint.")] = False,
    stats: Annotated[
        bool, Option("--stats", help="With --atoms: read the data and show mean, std, min, max and NaNs.")
    ] = False,
    kind: From = "auto",
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run, or with --atoms the atoms in one.

    An atom is a parameter or buffer with its optimizer states, each stored in its full, unsharded shape.
    Another framework's checkpoint is shown as uni3d import would write it.
    """
    if not atoms and (pattern is not None or stats):
        raise ValueError(f"{'--stats' if stats else pattern} needs --atoms")
    newest = open_any(run, tag, kind, renamed=tag is not None)
    rows = _atom_rows(newest, pattern, stats) if atoms else _tag_rows(run, tag, newest)
    if as_json:
        say_json(rows)
        return
    say_table(rows)
    for line in left_out(newest):
        say(f"left out: {line}")


def _tag_rows(run: str, tag: str | None, newest: ckpt.Checkpoint) -> list[dict[str, Any]]:
    """Return a row for each committed tag, oldest first, or for the one asked for."""
    import ckpt
    from uni3d.manifest import RunManifest

    alone = tag is not None or not newest.folder  # `run` is a single checkpoint's folder
    tags = [newest.tag] if alone else ckpt.committed_tags(run)
    rows = []
    for each in tags:
        checkpoint = newest if each == newest.tag else ckpt.open_checkpoint(run, each, renamed=True)
        manifest = RunManifest.of(checkpoint)
        rows.append(
            {
                "tag": checkpoint.tag,
                "latest": not alone and checkpoint.tag == newest.tag,
                "step": manifest.step,
                "created": manifest.created,
                "written on": _written_on(checkpoint, manifest),
                "atoms": len(checkpoint.atoms),
                "bytes": sum(info.nbytes for info in checkpoint.arrays.values()),
            }
        )
    return rows


def _written_on(checkpoint: ckpt.Checkpoint, manifest: RunManifest) -> str:
    from uni3d.importers.in_place import ForeignCheckpoint

    imported = manifest.imported_from
    if isinstance(checkpoint, ForeignCheckpoint):
        return f"{imported}, in place"
    where = str(manifest.written_on or "unknown") if imported is None else f"imported from {imported}"
    return where if checkpoint.saved_as == checkpoint.tag else f"{where} (saved as {checkpoint.saved_as})"


def _atom_rows(checkpoint: ckpt.Checkpoint, pattern: str | None, stats: bool) -> list[dict[str, Any]]:
    """Return a row for each array of a checkpoint."""
    import ckpt

    infos = {k: i for k, i in checkpoint.arrays.items() if pattern is None or fnmatchcase(k.atom, pattern)}
    if not infos:
        matching = "" if pattern is None else f" matching {pattern!r}"
        raise ckpt.CheckpointError(f"{checkpoint.url} has no atoms{matching}")
    numbers: dict[ckpt.ArrayKey, dict[str, Any]] = {}
    if stats:
        total = sum(info.nbytes for info in infos.values())
        with progress_bar("reading", total) as progress:
            found = ckpt.statistics(checkpoint, list(infos), progress=progress)
        numbers = {key: _numbers(of) for key, of in found.items()}
    return [
        {
            "atom": key.atom,
            "state": key.state,
            "dtype": info.dtype,
            "shape": "x".join(map(str, info.shape)) or "scalar",
            "files": sum(1 for _ in info.grid.files()),
            "chunks": len(info.sums),
            "bytes": info.nbytes,
            **numbers.get(key, {}),
        }
        for key, info in infos.items()
    ]


def _numbers(of: ckpt.Statistics) -> dict[str, Any]:
    """Return statistics as columns. Infinities become text, as JSON has none."""
    names = {"least": "min", "most": "max"}
    return {
        names.get(key, key): value if value is None or isfinite(value) else str(value)
        for key, value in asdict(of).items()
    }
