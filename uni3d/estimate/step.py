"""Time of a step: compute, the pipeline's bubble, and communication that no computation hides.

    compute   operations of the slowest pipeline stage, at the rate that the passes reach
    bubble    waits of `traffic.bubble`, in which a micro batch counts with its tp and pp communication
    tp, pp    nothing hides these: a layer, or the next stage, waits for them
    dp        ZeRO's collectives run beside the passes (on GPUs); counted is what lasts longer than those

A ring over k ranks, m of them on each node, sends its bytes between nodes over the links of all m: the node's
ranks divide the ring's channels among them. So a rank sends 1 / m of its bytes to other nodes. Each of the
k - 1 steps of a ring also has a latency. `benchmarks/planner.py` compares the time with published
runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

from uni3d.estimate.gpt import Link
from uni3d.estimate.job import Job, cut_stages
from uni3d.estimate.traffic import Traffic, bubble, data_sent, sums, traffic
from uni3d.estimate.zero import times

ERROR = 0.25
"""Largest relative error of the time on nearly all published runs (`benchmarks/RESULTS.md`)."""

SELECTIVE = 0.03
"""Share of a step's time that selective recomputation adds: all but matrix products and attention, which is
cheap but not free. No published run measures it."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one rank, for the estimate of a step's time."""

    flops: float
    """Floating-point operations per second that passes reach, counted as in `operations`."""
    inside: float
    """Bytes per second that a rank sends inside its node."""
    between: float
    """Bytes per second that a rank sends to another node, all ranks of a node sending at once."""
    ranks_per_node: int
    step_inside: float = 3.4e-6
    """Seconds of latency of a ring's step inside a node. The defaults are those by which NCCL chooses its
    algorithms (`hwLatencies` in src/graph/tuning.cc: rings, NVLink and network, simple protocol)."""
    step_between: float = 14e-6
    """Seconds of latency of a ring's step to another node."""


class Seconds(NamedTuple):
    """Parts of a step's time. The communication is what no computation hides."""

    compute: float
    bubble: float
    tp: float
    pp: float
    dp: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a job's step; see `cost`."""

    bubble: float
    """Share of the pipeline's time in which a rank waits."""
    traffic: Traffic
    slow_bytes: int
    """Bytes of the traffic that a rank sends to other nodes."""
    parts: Seconds

    @property
    def seconds(self) -> float:
        return self.parts.total


class _Ring(NamedTuple):
    """Collectives of a step along an axis."""

    sent: int
    """Bytes that a rank sends."""
    rounds: int
    """Number of times that data goes around: an all-reduce is two."""
    ranks: int
    on_node: int
    """Number of these ranks on each node."""

    @property
    def nodes(self) -> int:
        return ceil(self.ranks / self.on_node)

    @property
    def slow_bytes(self) -> int:
        return self.sent // self.on_node if self.nodes > 1 else 0

    def seconds(self, machine: Machine) -> float:
        far, near = self.nodes - 1, self.ranks - self.nodes
        latency = self.rounds * (near * machine.step_inside + far * machine.step_between)
        return max(self.sent / machine.inside, self.slow_bytes / machine.between) + latency


def cost(job: Job, machine: Machine) -> Cost:
    """Estimate the time of a step and its parts."""
    sent, waits = traffic(job), bubble(job)
    tp, pp = _tensor(job, sent.tp, machine), _pipeline(job, sent.pp, machine)
    dp = list(_data(job, machine))
    compute = operations(job) / machine.flops
    exposed = Seconds(
        compute=compute,
        bubble=0.0,
        tp=tp.seconds(machine),
        pp=pp.seconds(machine),
        dp=max(0.0, sum(ring.seconds(machine) for ring in dp) - _hiding(job, compute)),
    )
    busy = exposed.compute + exposed.tp + exposed.pp
    return Cost(
        bubble=waits,
        traffic=sent,
        slow_bytes=sum(ring.slow_bytes for ring in [tp, pp, *dp]),
        parts=exposed._replace(bubble=busy * waits / (1 - waits)),
    )


def operations(job: Job) -> float:
    """Return the floating-point operations of a step on a rank of the pipeline's slowest stage.

    For each token, with layers of hidden size D and sequences of S tokens (Narayanan et al. 2021, section 5.1
    and appendix):

        matrices        6 for each element: 2 in the forward, 4 in the backward pass
        attention       12 S D in each layer: two products with all S keys, a third of it in the forward pass.
                        Causal kernels leave out half of them. The papers' counts don't, nor does this, so
                        that a rate from either fits the other
        recomputation   the forward pass of a layer again, without its last product. torch stops when the
                        backward pass has its tensors, and a layer's result isn't one of them
    """
    shape, every = job.shape, job.every
    layer, head = _elements(shape.links[1]), _elements(shape.links[-1])
    attention = 2 * job.seq_len * shape.hidden
    forward = {
        "none": 0.0,
        "selective": SELECTIVE * 3 * (layer + attention),
        "full": layer - shape.ffn * shape.hidden + attention,
    }[job.recompute]
    slowest = max(
        6 * (layers * (layer + attention) + head * heads) + 2 * ceil(layers / every) * forward
        for layers, heads in _stages(shape, job.ranks.pp, job.virtual_stages, job.balance, job.schedule)
    )
    return slowest * job.tokens * job.accumulation / job.ranks.tp


def _elements(link: Link) -> int:
    """Return the elements of the link's matrices that tokens are multiplied with."""
    return link.cost - 1


@lru_cache
def _stages(*job: Any) -> tuple[tuple[int, int], ...]:
    """Return the different pairs of layers and heads on the pipeline's stages."""
    return tuple({(stage.layers, int("head" in stage.ends)) for stage in cut_stages(*job)})


def _hiding(job: Job, compute: float) -> float:
    """Return the part of the passes' time beside which ZeRO's collectives run.

    ZeRO stages 0 and 1 gather parameters in the first micro batch's forward pass, and reduce gradients in the
    last one's backward pass: as long as one micro batch. Stages 2 and 3 reduce in every one. On CPUs torch's
    `fully_shard` waits for each collective.
    """
    if job.device == "cpu":
        return 0.0
    return compute if job.ranks.zero >= 2 else compute / job.accumulation


def _tensor(job: Job, sent: int, machine: Machine) -> _Ring:
    rounds = 2 * job.accumulation * max(sums(job, stage) for stage in job.kinds)
    return _Ring(sent, rounds, job.ranks.tp, min(job.ranks.tp, machine.ranks_per_node))


def _pipeline(job: Job, sent: int, machine: Machine) -> _Ring:
    """Return the bytes to neighbouring stages, each of which may be on another node, as one rank's."""
    apart = job.ranks.pp > 1 and job.ranks.total > machine.ranks_per_node
    return _Ring(sent, 0, 2 if apart else 1, 1)


def _data(job: Job, machine: Machine) -> Iterator[_Ring]:
    """Yield the rings of ZeRO: over the ranks that shard, and over those that replicate."""
    shards, dp = job.shards, job.ranks.dp
    sent = data_sent(job)
    near = max(1, machine.ranks_per_node // job.ranks.tp)  # data-parallel ranks on a node
    units = 1 + max(sum(map(bool, stage.units)) for stage in job.kinds)
    rounds = units * sum(times(job.ranks.zero, job.accumulation))
    yield _Ring(sent.all_gather + sent.reduce_scatter, rounds, shards, min(near, shards))
    yield _Ring(sent.all_reduce, 2 * units, dp // shards, max(1, min(near, dp) // shards))
