"""`Engine.enclose_parts`: each part of a step is enclosed once, in order, under every schedule."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from marks import slow
from models import Stack, global_batches, make_engine, seeded, train
from ranks import Ranks

from parallel.spans import no_span

Passed = tuple[str, int, int]
"""Part, stage, micro batch."""
MICRO_BATCHES = 4


def parts_case(pp: int, parallel: dict[str, Any]) -> tuple[list[Passed], bool]:
    """Return the parts of one step in the order in which they ended, and whether one was inside another."""
    given = {"pp": pp, "device": "cpu", **parallel}
    engine = make_engine(seeded(Stack), micro=3, config={"parallel": given, "train_batch_size": 12})
    train(engine, global_batches(1))
    ended: list[Passed] = []
    inside, nested = False, False

    @contextmanager
    def span(part: str, *, stage: int = 0, micro_batch: int = 0) -> Iterator[None]:
        nonlocal inside, nested
        nested, inside = nested or inside, True
        yield
        inside = False
        ended.append((part, stage, micro_batch))

    engine.enclose_parts(span)
    train(engine, global_batches(1))
    engine.enclose_parts(no_span)
    train(engine, global_batches(1))
    return ended, nested


@pytest.mark.parametrize(
    ("pp", "parallel", "stages"),
    [
        (1, {}, [[0]]),
        (2, {}, [[0], [1]]),
        slow(2, {"schedule": "interleaved", "virtual_stages": 2}, [[0, 2], [1, 3]]),
        (2, {"schedule": "zero_bubble"}, [[0], [1]]),
        slow(2, {"schedule": "zero_bubble_v", "virtual_stages": 2}, [[0, 3], [1, 2]]),
    ],
)
def test_each_part_is_enclosed_once(
    ranks: Ranks, pp: int, parallel: dict[str, Any], stages: list[list[int]]
) -> None:
    last = max(map(max, stages))
    for own, (ended, nested) in zip(stages, ranks.run(pp, parts_case, pp, parallel), strict=True):
        assert not nested
        assert (ended[0], ended[-1]) == (("data", 0, 0), ("step", 0, 0))
        passes = ended[1:-1]
        assert len(set(passes)) == len(passes)
        expected = {(stage, number) for stage in own for number in range(MICRO_BATCHES)}
        by_part = {part: [p[1:] for p in passes if p[0] == part] for part in {p[0] for p in passes}}
        losses = [(last, number) for number in range(MICRO_BATCHES)] if pp > 1 and last in own else []
        assert by_part.pop("loss", []) == losses
        assert {*by_part.pop("forward")} == expected
        # A backward pass is whole or in two parts; torch's first stage runs both as the second.
        backward, weights = by_part.pop("backward", []), by_part.pop("weights", [])
        assert {*backward} | {*weights} == expected
        assert bool(weights) == ("zero" in parallel.get("schedule", ""))
        assert by_part == {}
        for earlier, later in pairwise(("forward", "backward", "weights")):
            for where in expected:
                found = [i for part in (earlier, later) for i, p in enumerate(passes) if p == (part, *where)]
                assert found == sorted(found)
