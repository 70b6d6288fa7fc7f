"""What can't be combined: refused before any work is done, each with its reason.

Everything that isn't in `REFUSED` is meant to train, under every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from parallel.settings import Schedule, Settings
from parallel.topology import Degrees

MANY_STAGES: frozenset[Schedule] = frozenset({"interleaved", "zero_bubble", "zero_bubble_v"})
"""Schedules that take several stages on each rank."""

SPLIT_BACKWARD: frozenset[Schedule] = frozenset({"zero_bubble", "zero_bubble_v"})
"""Schedules that compute the inputs' gradients first and the weights' when there is nothing else to do."""


class Refusal(NamedTuple):
    """One kind of combination that doesn't train."""

    what: str
    """What is combined, for a table."""
    applies: Callable[[Settings, Degrees], bool]
    reason: str
    """Why, and what to do instead."""


REFUSED: list[Refusal] = [
    Refusal(
        "schedule gpipe or 1f1b, virtual_stages above 1",
        lambda s, _: s.schedule not in MANY_STAGES and s.virtual_stages > 1,
        "it runs one stage on each rank; use interleaved, zero_bubble or zero_bubble_v for several",
    ),
    Refusal(
        "schedule interleaved, virtual_stages 1",
        lambda s, _: s.schedule == "interleaved" and s.virtual_stages == 1,
        "with one stage on each rank there is nothing to interleave; use 1f1b, or virtual_stages 2 or more",
    ),
    Refusal(
        "schedule zero_bubble_v, virtual_stages other than 2",
        lambda s, _: s.schedule == "zero_bubble_v" and s.virtual_stages != 2,
        "a V is two stages on each rank; use virtual_stages 2",
    ),
    Refusal(
        "schedule zero_bubble or zero_bubble_v, activation_checkpointing full or selective",
        lambda s, _: s.schedule in SPLIT_BACKWARD and s.recompute is not None,
        "its backward pass comes in two parts, for which torch computes a layer again as often as it has "
        "weights (full), or not at all (selective); use interleaved or 1f1b",
    ),
    Refusal(
        "schedule zero_bubble or zero_bubble_v, compile",
        lambda s, _: s.schedule in SPLIT_BACKWARD and s.compile is not None,
        "its backward pass comes in two parts, and that of a compiled layer is one; use interleaved or 1f1b",
    ),
]


def check_combination(settings: Settings, degrees: Degrees) -> None:
    """Check that what is wanted can be had together.

    Raises:
        ValueError: naming what can't be combined, and why.
    """
    for refusal in REFUSED:
        if refusal.applies(settings, degrees):
            raise ValueError(
                f"{refusal.what}: refused with schedule {settings.schedule}, "
                f"virtual_stages({settings.virtual_stages}) and {degrees}: {refusal.reason}"
            )


def check_micro_batches(settings: Settings, pp: int, micro_batches: int) -> None:
    """Check that a step's micro batches can be run by the schedule, which some do in rounds of the same size.

    Raises:
        ValueError: they can't.
    """
    rounds = max(1, micro_batches // pp)
    if settings.schedule in ("interleaved", "zero_bubble") and micro_batches % rounds:
        raise ValueError(
            f"schedule {settings.schedule} runs micro batches in rounds of one size, at least pp({pp}), but "
            f"gradient_accumulation_steps({micro_batches}) isn't divisible by its {rounds} rounds; use a "
            f"multiple of {pp}, or another schedule"
        )
