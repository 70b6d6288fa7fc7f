"""What ranks send each other in a step, and how long they wait for each other in a pipeline, on paper.

Bytes are those that one rank sends, with collectives as rings: an all-reduce of n bytes over k ranks sends
2 n (k - 1) / k of them, an all-gather or a reduce-scatter of n bytes in all half of that (Patarasuk and Yuan
2009).
"""

from __future__ import annotations

from typing import NamedTuple

from uni3d.estimate.gpt import EMBEDDING
from uni3d.estimate.job import Job, Stage
from uni3d.estimate.zero import sent


class Traffic(NamedTuple):
    """Bytes that the rank which sends most sends in a step, by axis."""

    tp: int
    pp: int
    dp: int

    @property
    def total(self) -> int:
        return sum(self)


def bubble(job: Job) -> float:
    """The share of a step in which a rank waits for others, with stages that are even.

    In units of one micro batch's forward and backward pass through a rank's layers, a step is m of them and a
    bubble, for p stages and v stretches of layers on each:

        GPipe, 1F1B   p - 1               (Huang et al. 2019; Narayanan et al. 2021, section 2.2)
        interleaved   (p - 1) / v         (Narayanan et al. 2021)
        zero_bubble   (p - 1) / (3 v)     (ZB-H1 of Qi et al. 2023, section 2: (p - 1) (T_F + T_B - T_W), with
                                          T_F = T_B = T_W: forward, backward, weights' gradients)
        ZBV           (p - 1) / (3 v)     (v = 2. Qi et al. 2023, section 6, have 0: from each rank's own
                                          start to its own end. Ours wait for the gradients' norm)

    They are what torch's schedules come to when they are played through with these times; a test does.
    """
    p, v, m = job.ranks.pp, job.virtual_stages, job.accumulation
    waits = {
        "gpipe": p - 1.0,
        "1f1b": p - 1.0,
        "interleaved": (p - 1) / v,
        "zero_bubble": (p - 1) / (3 * v),
        "zero_bubble_v": (p - 1) / (3 * v),
    }[job.order]
    return waits / (m + waits)


def traffic(job: Job) -> Traffic:
    """What the ranks that send most send in a step, on each axis."""
    return Traffic(
        tp=max(_tensor(job, stage) for stage in job.kinds),
        pp=max(_pipeline(job, stage) for stage in job.kinds),
        dp=max(_data(job, stage) for stage in job.kinds),
    )


def ring(n_bytes: int, ranks: int) -> int:
    """What a rank sends in an all-gather or a reduce-scatter of `n_bytes` in all; an all-reduce is two."""
    return n_bytes * (ranks - 1) // ranks


def _tensor(job: Job, stage: Stage) -> int:
    """Sums of activations over the tensor-parallel ranks, in a step of one pipeline rank.

    A layer sums what its two row-wise projections gave; in its backward pass the gradients of what attention
    and feed-forward were given. Sequence parallelism splits each sum into its two halves, a reduce-scatter
    and an all-gather, and sends as much.
    """
    # A layer is computed again until all that its backward pass needs is there: before its last sum.
    again = -(-stage.layers // job.every) if job.recompute == "full" else 0
    # Of the ends: what was looked up in parts; the gradient of what the head was given.
    sums = stage.layers * 4 + again + len(stage.ends)
    rows = sums * job.tokens
    if job.shape.positions == "learned" and "embed" in stage.ends:
        rows += job.seq_len  # looked up in parts as well, once for all samples
    size = job.compute_bytes * rows * job.shape.hidden
    return job.accumulation * 2 * ring(size, job.ranks.tp)


def _pipeline(job: Job, stage: Stage) -> int:
    """Activations to the next stage and their gradients to the one before, for each micro batch."""
    size = job.compute_bytes * job.tokens * job.shape.hidden
    apart = job.shape.tied_head and len(stage.ends) == 1  # each sends its gradient to the other
    tied = tuple(weight for weight in job.shape.links[0].weights if weight.name == EMBEDDING and apart)
    neighbours = stage.neighbours - (2 if stage.turns else 0)
    return job.accumulation * neighbours * size + 4 * job.shard(tied)


def _data(job: Job, stage: Stage) -> int:
    """Parameters gathered and gradients summed, by `uni3d.estimate.zero`, padding included."""
    return sent(
        sum(job.shard(unit) for unit in [*stage.units, stage.root]) * job.shards,
        stage=job.ranks.zero,
        dp=job.ranks.dp,
        shard_group=job.shard_group,
        compute_bytes=job.compute_bytes,
        reduce_bytes=job.reduce_bytes,
        accumulation=job.accumulation,
    ).total
