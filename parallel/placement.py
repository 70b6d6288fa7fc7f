"""Where a chain of layers is cut into pipeline stages, and which rank runs which stage. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from parallel.settings import Schedule


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Pipeline stages, in the order in which a micro batch passes through them, and their ranks."""

    ranks: tuple[int, ...]
    """Each stage's rank on the pipeline axis."""

    @classmethod
    def of(cls, pp: int, *, schedule: Schedule = "1f1b", virtual_stages: int = 1) -> Placement:
        """Deal out the stages in rounds, `stage = rank + round * pp`; the V schedule reverses its second."""
        forth = range(pp)
        rounds = [
            reversed(forth) if schedule == "zero_bubble_v" and i % 2 else forth for i in range(virtual_stages)
        ]
        return cls(ranks=tuple(rank for one in rounds for rank in one))

    @cached_property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.ranks)

    def on(self, rank: int) -> list[int]:
        """Return the stages on a rank, first to last."""
        return [stage for stage, place in enumerate(self.ranks) if place == rank]

    def is_last(self, stage: int) -> bool:
        """Return whether a stage's outputs are the model's."""
        return stage == self.stages - 1


def check_layers(layers: int, stages: int) -> None:
    """Check that every pipeline stage gets a layer.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if layers < stages:
        raise ValueError(
            f"a pipeline of {stages} stages needs at least {stages} layers, but the model has {layers}"
        )


def balanced_cuts(costs: Sequence[float], parts: int) -> list[tuple[int, int]]:
    """Cut `costs` into `parts` non-empty runs so that the most costly run is as cheap as possible.

    Returns the runs as `(first, end)`. There must be at least as many costs as parts. The linear partition
    problem, by dynamic programming over the position of the last cut.
    """
    total = [0, *accumulate(costs)]
    # best[p][n]: the cheapest possible worst run when the first n costs are cut into p runs; cut[p][n]: where
    # the last of these runs begins.
    best = [[0.0] + [float("inf")] * len(costs)]
    cut: list[list[int]] = [[0] * (len(costs) + 1)]
    for p in range(1, parts + 1):
        best.append([float("inf")] * (len(costs) + 1))
        cut.append([0] * (len(costs) + 1))
        for n in range(p, len(costs) + 1):
            for start in range(p - 1, n):
                worst = max(best[p - 1][start], total[n] - total[start])
                if worst < best[p][n]:
                    best[p][n], cut[p][n] = worst, start
    runs, end = [], len(costs)
    for p in range(parts, 0, -1):
        runs.append((cut[p][end], end))
        end = cut[p][end]
    return runs[::-1]
