"""The three batch sizes of a config, any of which follows from the other two."""

from __future__ import annotations

from pydantic import Field

from parallel.combinations import fills_rounds
from parallel.settings import Schedule
from uni3d.config.strict import Strict


class BatchSizes(Strict):
    """The keys of a config that set batch sizes."""

    train_batch_size: int | None = Field(default=None, gt=0)
    """Samples in a global batch, i.e. per optimizer step."""
    train_micro_batch_size_per_gpu: int | None = Field(default=None, gt=0)
    """Samples that a data-parallel rank computes at once."""
    gradient_accumulation_steps: int | None = Field(default=None, gt=0)
    """Micro batches per optimizer step on each data-parallel rank; a pipeline overlaps them."""


class BatchTriad(Strict):
    """Resolved batch sizes: train_batch = micro_batch * accumulation * dp."""

    train_batch: int
    micro_batch: int
    accumulation: int


def batch_triad(sizes: BatchSizes, dp: int) -> BatchTriad:
    """Derive the missing ones of the three batch sizes by DeepSpeed's rules.

    Accumulation is 1 if only one batch size is given.

    Raises:
        ValueError: they don't multiply (the message shows the equation), or no batch size is given.
    """
    total = sizes.train_batch_size
    micro = sizes.train_micro_batch_size_per_gpu
    steps = sizes.gradient_accumulation_steps
    if total is None and micro is None:
        raise ValueError("config: give train_batch_size or train_micro_batch_size_per_gpu")
    given = (
        f"train_batch_size({total}) = train_micro_batch_size_per_gpu({micro}) * "
        f"gradient_accumulation_steps({steps}) * dp({dp})"
    )
    if total is None:
        assert micro is not None, "one of them is given"
        steps = steps or 1
        total = micro * steps * dp
    elif micro is None:
        steps = steps or 1
        micro = total // (steps * dp)
    elif steps is None:
        steps = total // (micro * dp)
    if micro * steps * dp != total or micro < 1 or steps < 1:
        raise ValueError(f"config: {given.replace('None', '?')} has no solution in whole numbers; change one")
    return BatchTriad(train_batch=total, micro_batch=micro, accumulation=steps)


def nearest_batch(
    share: int, *, micro: float, schedule: Schedule = "1f1b", pp: int = 1
) -> tuple[int, int] | None:
    """Return micro batch and accumulation that multiply to a data-parallel rank's share of a global batch.

    The micro batch is the one nearest to `micro`; if two are equally near, the smaller one. None if the
    schedule can run none of them.
    """
    divisors = (n for n in range(1, share + 1) if share % n == 0)
    for size in sorted(divisors, key=lambda n: (abs(n - micro), n)):
        if fills_rounds(schedule, pp, share // size):
            return size, share // size
    return None
