"""Batch sizes that suit a number of ranks."""

from __future__ import annotations

from parallel.combinations import fills_rounds
from parallel.settings import Schedule


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
