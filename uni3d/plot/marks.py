"""The checkpoints of a run as marks on its curves, and the resizes that they tell of. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from uni3d.estimate.holders import written_on
from uni3d.plot.metrics import Resize, split_at

if TYPE_CHECKING:
    from ckpt.stores import Store
    from parallel.degrees import Ranks


@dataclass(frozen=True)
class Mark:
    """A committed checkpoint."""

    tag: str
    at: float
    """Its step, or its samples, whichever the x axis counts."""
    ranks: Ranks | None
    """That wrote it, if its manifest says so and it wasn't imported."""


def read_marks(run: Store, x: str) -> tuple[list[Mark], list[str]]:
    """The checkpoints of a run, oldest first; and a line for each that can't be marked.

    `x` is "step" or "samples".
    """
    from ckpt import CheckpointError, committed_tags
    from ckpt.format import MANIFEST, decode_manifest

    marks, problems = [], []
    for tag in committed_tags(run):
        where = run.where(f"{tag}/{MANIFEST}")
        try:
            manifest = decode_manifest(run.read(f"{tag}/{MANIFEST}"), where)
        except (OSError, CheckpointError) as error:
            problems.append(f"{tag} isn't marked: {error}")
            continue
        at = _place(manifest, x)
        if at is None:
            problems.append(f"{tag} isn't marked: {where} doesn't say its {x}")
        else:
            marks.append(Mark(tag, at, written_on(manifest)))
    return marks, problems


def _place(manifest: dict[str, Any], x: str) -> float | None:
    inner = (manifest.get("engine") or {}).get("global_samples")
    value = manifest.get("step") if x == "step" else inner
    return float(value) if isinstance(value, int | float) else None


def resizes_between(marks: Sequence[Mark]) -> list[Resize]:
    """Where the topology changes from a checkpoint to the next one.

    The run went on from the first of the two, as the second is the next that was written. Where it went back,
    the checkpoints that it went behind are no part of it.
    """
    kept: list[tuple[float, Mark]] = []
    for mark in marks:
        kept, _ = split_at(kept, mark.at)
        kept.append((mark.at, mark))
    pairs = [(a, b) for (_, a), (_, b) in pairwise(kept)]
    return [
        Resize(a.at, a.ranks, b.ranks)
        for a, b in pairs
        if a.ranks is not None and b.ranks is not None and a.ranks != b.ranks
    ]
