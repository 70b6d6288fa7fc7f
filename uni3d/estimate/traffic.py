"""Bytes that ranks send in a step, and the share of a step that they wait in a pipeline.

Bytes are counted for one rank, with collectives as rings: an all-reduce of n bytes over k ranks sends
2 n (k - 1) / k. An all-gather or reduce-scatter of n bytes in total sends half of that (Patarasuk and Yuan
2009).
"""

from __future__ import annotations

from typing import NamedTuple

from uni3d.estimate.gpt import EMBEDDING
from uni3d.estimate.job import Job, Stage
from uni3d.estimate.zero import Sent, sent


class Traffic(NamedTuple):
    """Bytes sent in a step by the rank that sends most, for each axis."""

    tp: int
    pp: int
    dp: int

    @property
    def total(self) -> int:
        return sum(self)


def bubble(job: Job) -> float:
    """Return the share of a step in which a rank waits for others, with equal stages.

    The unit is one micro batch's forward and backward pass through a rank's layers. A step takes m units and
    a bubble. With p stages and v stretches of layers on each, the bubble is:

        GPipe, 1F1B   p - 1               (Huang et al. 2019; Narayanan et al. 2021, section 2.2)
        interleaved   (p - 1) / v         (Narayanan et al. 2021)
        zero_bubble   (p - 1) / (3 v)     (ZB-H1 of Qi et al. 2023, section 2: (p - 1) (T_F + T_B - T_W), with
                                          T_F = T_B = T_W: forward, backward, weights' gradients)
        ZBV           (p - 1) / (3 v)     (v = 2. Qi et al. 2023, section 6, have 0, counted from each rank's
                                          own start to its own end. Here ranks wait for the gradient norm)

    A test simulates torch's schedules with these times, and gets the same.
    """
    p, v, m = job.ranks.pp, job.virtual_stages, job.accumulation
    shrunk = {"gpipe": 1, "1f1b": 1, "interleaved": v, "zero_bubble": 3 * v, "zero_bubble_v": 3 * v}
    waits = (p - 1) / shrunk[job.order]
    return waits / (m + waits)


def traffic(job: Job) -> Traffic:
    """Return the traffic of a step, the maximum over the ranks for each axis."""
    return Traffic(
        tp=max(_tensor(job, stage) for stage in job.kinds),
        pp=max(_pipeline(job, stage) for stage in job.kinds),
        dp=data_sent(job).total,
    )


def ring(n_bytes: int, ranks: int) -> int:
    """Return the bytes sent in an all-gather or reduce-scatter of `n_bytes` in all; an all-reduce is two."""
    return n_bytes * (ranks - 1) // ranks


def _tensor(job: Job, stage: Stage) -> int:
    """Return the bytes of all-reduces over the tensor-parallel ranks.

    Sequence parallelism splits each sum into a reduce-scatter and an all-gather, and sends as much.
    """
    rows = sums(job, stage) * job.tokens
    if job.shape.positions == "learned" and "embed" in stage.ends:
        rows += job.seq_len  # also a partial lookup, once for all samples
    size = job.compute_bytes * rows * job.shape.hidden
    return job.accumulation * 2 * ring(size, job.ranks.tp)


def sums(job: Job, stage: Stage) -> int:
    """Return the sums over the tensor-parallel ranks that a micro batch takes on a stage.

    A layer sums the outputs of its two row-wise projections, and in the backward pass the gradients of the
    inputs of attention and feed-forward. The embedding sums its partial lookups, the head the gradient of its
    input.
    """
    # Recomputation stops as soon as the backward pass has its tensors, which is before a layer's last sum.
    again = -(-stage.layers // job.every) if job.recompute == "full" else 0
    return stage.layers * 4 + again + len(stage.ends)


def _pipeline(job: Job, stage: Stage) -> int:
    """Return the bytes of activations to the next stage and of gradients to the previous one."""
    size = job.compute_bytes * job.tokens_between * job.shape.hidden
    apart = job.shape.tied_head and len(stage.ends) == 1  # each sends its gradient to the other
    tied = tuple(weight for weight in job.shape.links[0].weights if weight.name == EMBEDDING and apart)
    neighbours = stage.neighbours - (2 if stage.turns else 0)
    return job.accumulation * neighbours * size + 4 * job.shard(tied)


def data_sent(job: Job) -> Sent:
    """Return the bytes of ZeRO's collectives, padding included, on the stage that sends most."""
    return max((_data(job, stage) for stage in job.kinds), key=lambda each: each.total)


def _data(job: Job, stage: Stage) -> Sent:
    """Return the bytes of a stage's collectives (`uni3d.estimate.zero`)."""
    last = next((unit for unit in reversed(stage.units) if unit), ())
    kept = job.shard(stage.root) + job.shard(last) if "head" in stage.ends else 0
    return sent(
        sum(job.shard(unit) for unit in [*stage.units, stage.root]) * job.shards,
        kept=kept * job.shards,
        stage=job.ranks.zero,
        dp=job.ranks.dp,
        shard_group=job.shard_group,
        compute_bytes=job.compute_bytes,
        reduce_bytes=job.reduce_bytes,
        accumulation=job.accumulation,
    )
