"""What every figure is given, and how its arms take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.ranks import Group
from benchmarks.checkpoint.table import Sample
from benchmarks.checkpoint.workspace import Workspace, settle_disk

Work = Callable[..., Any]
"""What all ranks run: `work(rank, ...)`."""

Arm = Callable[[], float]
"""Does the work once; returns its seconds."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run of the benchmark."""

    workspace: Workspace
    repeats: int
    options: dict[str, Any]
    """Of the model."""
    pair_options: dict[str, Any]
    """Of the smaller model of the same width whose checkpoint is read between all pairs of topologies."""
    deepspeed: str | None
    """A Python interpreter that has DeepSpeed."""

    def save_arm(self, ranks: Group, name: str, function: Work, *args: Any, **options: Any) -> Arm:
        """`function(rank, a fresh folder, ...)` on all ranks, as an arm whose files then leave the cache."""

        def arm() -> float:
            folder = self.workspace.fresh(name)
            settle_disk()
            seconds = ranks.time(function, folder, *args, **options).seconds
            settle_disk(folder)
            return seconds

        return arm


def take_turns(arms: Mapping[str, Arm], repeats: int) -> dict[str, Sample]:
    """Each arm once a round, in an order that moves on by one from round to round."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(arms[name]())
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def one_folder(workspace: Workspace, ranks: Group, name: str, function: Work, **options: Any) -> Path:
    """`function(rank, a fresh folder)` on all ranks, untimed; the folder, on the disk and in the cache."""
    folder = workspace.fresh(name)
    ranks.call(function, folder, **options)
    settle_disk()
    return folder
