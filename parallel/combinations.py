"""Combinations of settings that are refused before any work is done, each with its reason. Loads no torch.

Every combination that isn't in `REFUSED` is meant to train, under every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from parallel.settings import Schedule, Settings

MANY_STAGES: frozenset[Schedule] = frozenset({"interleaved", "zero_bubble", "zero_bubble_v"})
"""Schedules that take several stages on each rank."""

SPLIT_BACKWARD: frozenset[Schedule] = frozenset({"zero_bubble", "zero_bubble_v"})
"""Schedules that compute the inputs' gradients first, and the weights' when a rank would be idle."""

IN_ROUNDS: frozenset[Schedule] = frozenset({"interleaved", "zero_bubble"})
"""Schedules that run micro batches in rounds of equal size."""


class Refusal(NamedTuple):
    """A kind of combination that doesn't train."""

    what: str
    """The settings that are combined, for a table."""
    applies: Callable[[Settings], bool]
    reason: str
    """Why they don't go together, and what to do instead."""


REFUSED: list[Refusal] = [
    Refusal(
        "schedule gpipe or 1f1b, virtual_stages above 1",
        lambda s: s.schedule not in MANY_STAGES and s.virtual_stages > 1,
        "it runs one stage on each rank; use interleaved, zero_bubble or zero_bubble_v for several",
    ),
    Refusal(
        "schedule interleaved, virtual_stages 1",
        lambda s: s.schedule == "interleaved" and s.virtual_stages == 1,
        "with one stage on each rank there is nothing to interleave; use 1f1b, or virtual_stages 2 or more",
    ),
    Refusal(
        "schedule zero_bubble_v, virtual_stages other than 2",
        lambda s: s.schedule == "zero_bubble_v" and s.virtual_stages != 2,
        "a V is two stages on each rank; use virtual_stages 2",
    ),
    Refusal(
        "schedule zero_bubble or zero_bubble_v, activation_checkpointing full or selective",
        lambda s: s.schedule in SPLIT_BACKWARD and s.recompute is not None,
        "its backward pass comes in two parts, for which torch computes a layer again as often as it has "
        "weights (full), or not at all (selective); use interleaved or 1f1b",
    ),
    Refusal(
        "schedule zero_bubble or zero_bubble_v, compile",
        lambda s: s.schedule in SPLIT_BACKWARD and s.compile is not None,
        "its backward pass comes in two parts, and that of a compiled layer is one; use interleaved or 1f1b",
    ),
]


def check_combination(settings: Settings) -> None:
    """Check that the settings can be used together.

    Raises:
        ValueError: they can't; names the combination and the reason.
    """
    if (why := combination_refusal(settings)) is not None:
        raise ValueError(why)


def combination_refusal(settings: Settings) -> str | None:
    """Return why the settings can't be used together, or None if they can."""
    for refusal in REFUSED:
        if refusal.applies(settings):
            given = f"schedule {settings.schedule} with virtual_stages({settings.virtual_stages})"
            return f"{given} is refused ({refusal.what}): {refusal.reason}"
    return None


def check_micro_batches(settings: Settings, pp: int, micro_batches: int) -> None:
    """Check that the schedule can run a step's micro batches.

    Raises:
        ValueError: it runs them in rounds of equal size, and they don't divide into such rounds.
    """
    if not fills_rounds(settings.schedule, pp, micro_batches):
        rounds = _rounds(pp, micro_batches)
        raise ValueError(
            f"schedule {settings.schedule} runs micro batches in equal rounds of at least pp({pp}), but "
            f"gradient_accumulation_steps({micro_batches}) isn't divisible by its {rounds} rounds; use a "
            f"multiple of {pp}, or another schedule"
        )


def fills_rounds(schedule: Schedule, pp: int, micro_batches: int) -> bool:
    """Return whether a schedule can run this number of micro batches."""
    return schedule not in IN_ROUNDS or micro_batches % _rounds(pp, micro_batches) == 0


def _rounds(pp: int, micro_batches: int) -> int:
    return max(1, micro_batches // pp)


def pipeline_refusal(
    model: str, layers: int | None, *, loss_fn: bool, pp: int, virtual_stages: int = 1
) -> str | None:
    """Return why a model can't be cut into this many stages, as a predicate of the degree, or None if it can.

    `layers` is the number of its `pipeline_layers`, None if it declares none; `loss_fn` is whether it has
    one.
    """
    if pp * virtual_stages == 1:
        return None
    if layers is None:
        return f"needs a model with pipeline_layers, but {model} has none"
    if not loss_fn:
        return f"needs a model with a loss_fn(outputs, targets), but {model} has none"
    if layers < pp * virtual_stages:
        each = "" if virtual_stages == 1 else f", with {virtual_stages} stages on each rank,"
        return f"needs more layers{each} than the {layers} pipeline_layers of {model}"
    return None
