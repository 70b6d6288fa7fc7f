"""`uni3d inspect`: list the checkpoints of a run, or the atoms of a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from fnmatch import fnmatchcase
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, Run, Tag, progress_bar, say_json, say_table

if TYPE_CHECKING:
    import ckpt
    from uni3d.manifest import RunManifest


def inspect(
    run: Run,
    pattern: Annotated[
        str | None, Argument(help="With --atoms: only atoms whose names match, e.g. 'layers.0.*'.")
    ] = None,
    tag: Tag = None,
    atoms: Annotated[bool, Option("--atoms", help="List the atoms of one checkpoint.")] = False,
    stats: Annotated[
        bool, Option("--stats", help="With --atoms: read the data and show mean, std, min, max and NaNs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a run, or with --atoms the atoms in one.

    An atom is a parameter or buffer with its optimizer states, each stored in its full, unsharded shape.
    """
    import ckpt

    if not atoms and (pattern is not None or stats):
        raise ValueError(f"{'--stats' if stats else pattern} needs --atoms")
    rows = _atom_rows(ckpt.open_checkpoint(run, tag), pattern, stats) if atoms else _tag_rows(run, tag)
    if as_json:
        say_json(rows)
    else:
        say_table(rows)


def _tag_rows(run: str, tag: str | None) -> list[dict[str, Any]]:
    """Return a row for each committed tag, oldest first, or for the one asked for."""
    import ckpt
    from uni3d.manifest import RunManifest

    newest = ckpt.open_checkpoint(run, tag, renamed=tag is not None)
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
                "written on": _written_on(manifest) + _copied(checkpoint),
                "atoms": len(checkpoint.atoms),
                "bytes": sum(info.nbytes for info in checkpoint.arrays.values()),
            }
        )
    return rows


def _written_on(manifest: RunManifest) -> str:
    imported = manifest.imported_from
    return str(manifest.written_on or "unknown") if imported is None else f"imported from {imported}"


def _copied(checkpoint: ckpt.Checkpoint) -> str:
    return "" if checkpoint.saved_as == checkpoint.tag else f" (saved as {checkpoint.saved_as})"


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
