"""Topologies for a world size and a memory limit, fastest first by estimate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.degrees import Ranks
from uni3d.estimate.job import Job, RecomputeMode
from uni3d.estimate.memory import StageMemory, memory, worst
from uni3d.estimate.step import Cost, Machine, cost


@dataclass(frozen=True, kw_only=True)
class Proposal:
    job: Job
    cost: Cost
    memory: StageMemory
    """Memory of the worst stage."""

    @property
    def need(self) -> int:
        """Bytes that a rank needs."""
        return self.memory.peak.total


RECOMPUTE: tuple[RecomputeMode, ...] = ("none", "selective", "full")
LARGEST_MICRO_BATCH = 64


def judge(job: Job, machine: Machine) -> Proposal:
    return Proposal(job=job, cost=cost(job, machine), memory=worst(memory(job)))


def propose(job: Job, world: int, limit: float, machine: Machine) -> list[Proposal]:
    """Return the topologies of `world` ranks that fit in `limit` bytes per rank, fastest first.

    If none fits, return the one that needs the least memory. All keep the global batch, the schedule and the
    precision of `job`. For each pp x dp x tp, the ZeRO stages, micro batches and recompute modes (at least as
    much as `job` has) compete. The fastest that fits wins, and among equally fast ones the smallest.

    Raises:
        ValueError: no split of the ranks suits the model and the batch.
    """
    found: dict[tuple[int, int, int], Proposal] = {}
    candidates = [(cost(candidate, machine), candidate) for candidate in _candidates(job, world, machine)]
    if not candidates:
        raise ValueError(
            f"no topology of {world} ranks suits this model and a batch of {job.batch}: tp must divide "
            "heads, kv heads and ffn, dp the batch, and there are no more pipeline stages than layers"
        )
    nearest: Proposal | None = None
    for price, candidate in sorted(candidates, key=lambda pair: pair[0].seconds):
        r = candidate.ranks
        best = found.get((r.pp, r.dp, r.tp))
        if best is not None and price.seconds > best.cost.seconds:
            continue
        proposal = Proposal(job=candidate, cost=price, memory=worst(memory(candidate)))
        if nearest is None or proposal.need < nearest.need:
            nearest = proposal
        if proposal.need <= limit and (best is None or proposal.need < best.need):
            found[r.pp, r.dp, r.tp] = proposal
    assert nearest is not None, "there are candidates"
    return sorted(found.values(), key=lambda p: p.cost.seconds) or [nearest]


def splits(job: Job, world: int, ranks_per_node: int) -> Iterator[Ranks]:
    """Yield every possible topology with tp inside a node. With dp 1 there is nothing to shard: ZeRO 1."""
    cut = [job.shape.heads, job.shape.kv_heads, job.shape.ffn, *([job.seq_len] * job.sequence_parallel)]
    for pp, dp, tp in factorizations(world):
        if tp > ranks_per_node or any(n % tp for n in cut):
            continue
        if job.batch % dp or pp * job.virtual_stages > len(job.shape.links):
            continue
        for zero in (0, 1, 2, 3) if dp > 1 else (1,):
            yield Ranks(pp=pp, dp=dp, tp=tp, zero=zero)


def factorizations(world: int) -> Iterator[tuple[int, int, int]]:
    """Yield every pp, dp and tp with `pp * dp * tp == world`, by ascending tp, then pp."""
    for tp in _divisors(world):
        for pp in _divisors(world // tp):
            yield pp, world // tp // pp, tp


def _candidates(job: Job, world: int, machine: Machine) -> Iterator[Job]:
    """Yield the job on each split, with every micro batch and recompute mode to try."""
    for ranks in splits(job, world, machine.ranks_per_node):
        share = job.batch // ranks.dp
        for mode in RECOMPUTE[RECOMPUTE.index(job.recompute) :]:
            every = job.every if mode == job.recompute else 1
            for micro in range(1, min(share, LARGEST_MICRO_BATCH) + 1):
                if share % micro == 0:
                    sizes: dict[str, Any] = {"micro_batch": micro, "accumulation": share // micro}
                    yield replace(job, ranks=ranks, shard_group=None, recompute=mode, every=every, **sizes)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
