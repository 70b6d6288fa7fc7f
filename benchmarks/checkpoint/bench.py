"""State shared by all figures, and the order in which their arms run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.peers import DeepSpeed
from benchmarks.checkpoint.ranks import Group
from benchmarks.checkpoint.table import Sample
from benchmarks.checkpoint.workspace import Workspace, settle_disk

Work = Callable[..., Any]
"""Function that all ranks run: `work(rank, ...)`."""

Arm = Callable[[], float]
"""Do the work once and return its seconds."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One run of the benchmark."""

    workspace: Workspace
    repeats: int
    options: dict[str, Any]
    """Options of the model."""
    pair_options: dict[str, Any]
    """Options of a smaller model of the same width, which is loaded between all pairs of topologies."""
    deepspeed: DeepSpeed | None
    """None if it isn't installed: then it isn't measured."""

    def save_arm(self, ranks: Group, name: str, function: Work, *args: Any, **options: Any) -> Arm:
        """Make an arm: `function(rank, fresh folder, ...)` on all ranks, and its files leave the cache."""

        def arm() -> float:
            folder = self.workspace.fresh(name)
            settle_disk()
            seconds = ranks.time(function, folder, *args, **options).seconds
            settle_disk(folder)
            return seconds

        return arm


def take_turns(arms: Mapping[str, Arm], repeats: int) -> dict[str, Sample]:
    """Run each arm once a round. The order rotates by one from round to round."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(arms[name]())
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def one_folder(workspace: Workspace, ranks: Group, name: str, function: Work, **options: Any) -> Path:
    """Run `function(rank, fresh folder)` on all ranks, untimed; return the folder, synced and cached."""
    folder = workspace.fresh(name)
    ranks.call(function, folder, **options)
    settle_disk()
    return folder
