"""Bytes that ZeRO makes a rank hold, by the formulas of `uni3d.estimate.zero`."""

from __future__ import annotations

from typing import NamedTuple

from parallel.degrees import shard_count
from uni3d.estimate.zero import MASTER_BYTES, beside_shards


class Held(NamedTuple):
    """Bytes that a rank holds, each at the fullest moment of a step."""

    parameters: int
    gradients: int
    optimizer: int


def held(
    parameters: int,
    *,
    stage: int,
    dp: int,
    shard_group: int | None = None,
    compute_bytes: int = 4,
    reduce_bytes: int = 4,
    accumulation: int = 1,
) -> Held:
    """Return what a rank holds of a model part with so many trained parameters, with Adam's two moments."""
    shards = shard_count(dp, stage, shard_group)
    shard = MASTER_BYTES * parameters // shards
    copies, sums = beside_shards(
        parameters,
        parameters,
        stage=stage,
        shards=shards,
        compute_bytes=compute_bytes,
        reduce_bytes=reduce_bytes,
        accumulation=accumulation,
    )
    return Held(shard + copies, max(sums, shard), 2 * shard)
