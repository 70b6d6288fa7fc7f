"""Micro batches for a data-parallel rank's share of a batch."""

from __future__ import annotations

from uni3d.config.batch import nearest_batch


def test_micro_batches_are_the_nearest_that_multiply() -> None:
    assert nearest_batch(12, micro=4) == (4, 3)
    assert nearest_batch(12, micro=5) == (4, 3)
    assert nearest_batch(10, micro=3.5) == (2, 5), "the smaller of two that are equally near"
    assert nearest_batch(7, micro=3) == (1, 7)
    assert nearest_batch(10, micro=2, schedule="interleaved", pp=2) == (1, 10), "5 make no two rounds"
    assert nearest_batch(5, micro=5, schedule="interleaved", pp=2) == (5, 1)
