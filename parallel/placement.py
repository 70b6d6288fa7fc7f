"""Which rank of the pipeline computes which stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from parallel.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The stages of a pipeline, in the order in which a micro batch goes through them, on its ranks."""

    ranks: tuple[int, ...]
    """Of each stage, its place on the pipeline axis."""

    @classmethod
    def of(cls, settings: Settings, pp: int) -> Placement:
        """Round after round, `stage = rank + i * pp`; for the V schedule the second round goes back."""
        forth = range(pp)
        rounds = [
            reversed(forth) if settings.schedule == "zero_bubble_v" and i % 2 else forth
            for i in range(settings.virtual_stages)
        ]
        return cls(ranks=tuple(rank for there in rounds for rank in there))

    @cached_property
    def stages(self) -> int:
        """How many there are."""
        return len(self.ranks)

    def on(self, rank: int) -> list[int]:
        """The stages on a rank."""
        return [stage for stage, place in enumerate(self.ranks) if place == rank]

    def is_last(self, stage: int) -> bool:
        """Whether a stage's outputs are the model's."""
        return stage == self.stages - 1
