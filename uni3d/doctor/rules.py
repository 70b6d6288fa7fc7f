"""What a run's config refuses by itself, whatever it is to load: the rules of `parallel`, without torch.

Tests hold them to those that the engine applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uni3d.config import Config, load_config

_MANY_STAGES = ("interleaved", "zero_bubble", "zero_bubble_v")
_SPLIT_BACKWARD = ("zero_bubble", "zero_bubble_v")


def refused_combination(config: Config) -> str | None:
    """Why a schedule doesn't go with the rest, as `parallel.combinations` has it; None if it does."""
    schedule, virtual = config.parallel.schedule, config.parallel.virtual_stages
    if schedule not in _MANY_STAGES and virtual > 1:
        return f"schedule {schedule} runs one stage on each rank, so virtual_stages({virtual}) must be 1"
    if schedule == "interleaved" and virtual == 1:
        return "schedule interleaved has nothing to interleave with virtual_stages 1"
    if schedule == "zero_bubble_v" and virtual != 2:
        return f"schedule zero_bubble_v needs virtual_stages 2, not {virtual}"
    if schedule in _SPLIT_BACKWARD and config.activation_checkpointing.mode != "none":
        return f"schedule {schedule} doesn't go with activation_checkpointing"
    if schedule in _SPLIT_BACKWARD and config.compile.enabled:
        return f"schedule {schedule} doesn't go with compile"
    return None


def fills_rounds(schedule: str, pp: int, accumulation: int) -> bool:
    """Whether a schedule can run so many micro batches, as `parallel.check_micro_batches` has it."""
    return schedule not in ("interleaved", "zero_bubble") or accumulation % max(1, accumulation // pp) == 0


def refused_zero(values: Mapping[str, Any], stage: int) -> str | None:
    """Why a config can't have another ZeRO stage; None if it can."""
    zero = {**(values.get("zero_optimization") or {}), "stage": stage}
    try:
        load_config({**values, "zero_optimization": zero})
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def nearest_batch(share: int, *, micro: float, schedule: str = "1f1b", pp: int = 1) -> tuple[int, int] | None:
    """Micro batch and accumulation, which multiply to a data-parallel rank's share of a global batch.

    The micro batch is the one nearest to what was given; of two as near, the smaller. None if the schedule
    can run none.
    """
    for size in sorted(_divisors(share), key=lambda n: (abs(n - micro), n)):
        if fills_rounds(schedule, pp, share // size):
            return size, share // size
    return None


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
