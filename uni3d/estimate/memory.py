"""Memory of each rank, on paper: what is held from step to step, and the fullest moment of a step.

A step is walked through as the engine takes it: at its fullest, a rank has as many micro batches in flight as
its schedule lets it, and runs the backward pass of one of them, link by link from the last. The fullest of
these moments, and of the optimizer's step, is the peak. Ranks of a pipeline stage need the same, so that the
answer is one for each stage; the worst counts.

What isn't in it: the process itself, the CUDA context and NCCL's buffers (about 1-2 GiB on a GPU), what the
allocator keeps for itself, a compiler's own buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from uni3d.estimate.activations import Activations, of_link, of_loss, products
from uni3d.estimate.gpt import Link
from uni3d.estimate.job import Job, Stage


class Memory(NamedTuple):
    """Bytes on one rank at the fullest moment of a step."""

    parameters: int
    """The sharded ones, in fp32."""
    optimizer: int
    gradients: int
    """Those that are there at that moment, summed up or not."""
    gathered: int
    """Whole parameters, in the type that is computed in."""
    activations: int
    """Of all micro batches in flight, and what the backward pass at that moment makes."""
    loss: int
    """Logits, and what the loss is computed with."""
    communication: int
    """Buffers of ZeRO's collectives."""
    pipeline: int
    """What is received from and kept for other stages, and the batch itself."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What each rank of one pipeline stage needs."""

    rank: int
    """Of the pipeline."""
    links: tuple[str, str]
    """The first and the last that it has."""
    peak: Memory
    host: int
    """Of the host's memory, with offload: parameters, gradients and optimizer states."""
    in_flight: int
    """Micro batches, of one stretch of layers each, whose activations are held at the same time."""


def memory(job: Job) -> list[StageMemory]:
    """What each pipeline rank needs, first to last."""
    return [_stage(job, rank, stage) for rank, stage in enumerate(job.stages)]


def worst(stages: list[StageMemory]) -> StageMemory:
    return max(stages, key=lambda stage: stage.peak.total)


def in_flight(job: Job, rank: int) -> int:
    """Micro batches whose activations a pipeline rank holds at the same time, counted by stretch of layers.

    GPipe: all. 1F1B: as many as there are stages from here on (Narayanan et al. 2021, section 2.2).
    Interleaved: its warm-up and one. Zero-bubble keeps activations until the weights' gradients, `rank` micro
    batches later (Qi et al. 2023, ZB-H1). ZBV: as much as 1F1B's first stage, in stretches of half the size.
    """
    pp, v, m = job.ranks.pp, job.virtual_stages, job.accumulation
    if pp == 1 and v == 1:
        return 1
    per_round = m // max(1, m // pp)
    held = {
        "gpipe": m * v,
        "1f1b": pp - rank,
        "interleaved": (v - 1) * per_round + 2 * (pp - 1 - rank) + 1,
        "zero_bubble": (v - 1) * per_round + (pp - 1 - rank) + 1 + rank,
        "zero_bubble_v": v * pp,
    }[job.order]
    return min(held, m * v)


class _Moment(NamedTuple):
    """What a rank holds at a moment, beside what it holds from step to step."""

    gradients: int
    gathered: int
    activations: int
    loss: int
    communication: int


def _stage(job: Job, rank: int, stage: Stage) -> StageMemory:
    shard = 4 * sum(job.shard(unit) for unit in [*stage.units, stage.root])
    flying = in_flight(job, rank)
    last = job.accumulation == 1
    walk = _Walk(job, stage, rank)
    moments = [*walk.backward(flying, again=job.accumulation * job.virtual_stages > flying, last=last)]
    if not last:  # the last one, when no other is left, and gradients are reduced
        moments += walk.backward(1, again=True, last=True)
    moments.append(_Moment(shard, 0, 0, 0, 0))
    fullest = max(moments, key=sum)
    steady = (0, 0) if job.offload else (shard, job.moments * shard)
    peak = Memory(*steady, *fullest, _pipeline(job, stage))
    names = [link.name for link in stage.links]
    host = (2 + job.moments) * shard if job.offload else 0
    return StageMemory(rank=rank, links=(names[0], names[-1]), peak=peak, host=host, in_flight=flying)


class _Walk:
    """Through the backward pass of one micro batch on a pipeline stage, link by link from the last."""

    def __init__(self, job: Job, stage: Stage, rank: int) -> None:
        self._job = job
        self._rank = rank
        self._stage = stage
        self._acts = _activations(job, stage.links)
        if "embed" not in stage.ends:  # what the first link keeps of its input lies in the pipeline's buffer
            self._acts[0] = self._acts[0]._replace(kept=self._acts[0].kept - self._acts[0].given)
        self._whole = [job.whole(unit) for unit in stage.units]
        self._shard = [job.shard(unit) for unit in stage.units]
        self._root = job.whole(stage.root), job.shard(stage.root)
        self._loss = of_loss(job) if "head" in stage.ends else (0, 0)

    def backward(self, flying: int, *, again: bool, last: bool) -> Iterator[_Moment]:
        """Its moments, while `flying - 1` other micro batches wait for theirs.

        `again` says that the micro batches before have left their gradients, `last` that it is the step's
        last.
        """
        job, v = self._job, self._job.virtual_stages
        reduced = last or job.ranks.zero >= 2
        kept = sum(each.kept for each in self._acts)
        alive = kept + max(0, flying - v) * kept // v
        # In the hands of torch's pipeline stage the logits stay through their micro batch's backward pass; a
        # single stage has let go of them by then.
        loss_kept, loss_work = self._loss
        logits = loss_kept // 2
        if job.ranks.pp * v == 1:
            loss_kept, logits = loss_kept - logits, 0
        waiting = loss_kept * ((flying - 1) // v)
        leaving = 0  # what the link before was summed in: it goes when the next one is summed
        for i in reversed(range(len(self._acts))):
            each, gathered = self._acts[i], self._gathered(i)
            before = self._gradients(i, again=again, reduced=reduced)
            is_head = self._stage.links[i].name == "head"
            if is_head:
                yield _Moment(before, gathered, alive, waiting + loss_kept + loss_work, 0)
            own, peak, leaves = self._summed(i, again=again, reduced=reduced)
            following = self._prefetched(i)
            busy = alive + each.again + each.work
            loss = waiting + logits
            yield _Moment(
                before + own, gathered, busy, loss + (loss_work // 2 if is_head else 0), following + leaving
            )
            alive -= each.kept
            yield _Moment(before, gathered, alive, loss, following + peak)
            leaving = leaves
        if flying > 1 and job.schedule == "zero_bubble" and "embed" not in self._stage.ends:
            yield self._halfway(flying, again=again, reduced=reduced)

    def _halfway(self, flying: int, *, again: bool, reduced: bool) -> _Moment:
        """Between the halves of a backward pass: nothing that was kept has gone, and the gradients of what
        matrix products gave have come, from which the weights' are computed `rank` micro batches later.
        (torch's first stage, which sends no gradient on, takes both halves at once.)
        """
        job, v, rank = self._job, self._job.virtual_stages, self._rank
        halves = min(rank, flying - 1) + 1  # micro batches between the two
        layers = sum(link.name.startswith("layers.") for link in self._stage.links)
        loss_kept, loss_work = self._loss
        kept = flying * sum(each.kept for each in self._acts) // v + halves * layers * products(job) // v
        loss = loss_kept * (-(-flying // v)) + halves * (loss_work // 2) // v
        before = self._gradients(len(self._acts) - 1, again=again, reduced=reduced)
        return _Moment(before, self._gathered(0), kept, loss, self._prefetched(0))

    def _summed(self, i: int, *, again: bool, reduced: bool) -> tuple[int, int, int]:
        """Of link `i`'s gradients: themselves as they are made; the most memory that summing them takes, with
        them and beyond what was there; what is left of that until the next link's are summed.
        """
        job = self._job
        whole = self._whole[i] + (self._root[0] if i == 0 else 0)
        shard = self._shard[i] + (self._root[1] if i == 0 else 0)
        own, buffer = job.compute_bytes * whole, job.reduce_bytes * whole
        if not reduced:  # added up whole, which needs another tensor if that is in another type
            return own, own + (0 if again or job.precision == job.reduce else buffer), 0
        added = (
            buffer if again and job.ranks.zero <= 1 else 0
        )  # they were added to what was there, and both go
        copy = buffer if job.shards == 1 else 0  # fully_shard divides by 1 then, into a tensor of its own
        packed = buffer + (0 if added else own)
        return (
            own,
            max(packed, buffer - added + job.reduce_bytes * shard + copy),
            buffer if job.ranks.dp > 1 else 0,
        )

    def _gradients(self, i: int, *, again: bool, reduced: bool) -> int:
        """What is there when the backward pass of link `i` begins.

        ZeRO stages 0 and 1 keep gradients whole while micro batches are accumulated, and reduce them in the
        step's last backward pass; the others reduce them link by link each time.
        """
        job = self._job

        def left(whole: int, shard: int, *, reduced: bool) -> int:
            return 4 * shard if reduced else job.reduce_bytes * whole

        total = left(sum(self._whole[i + 1 :]), sum(self._shard[i + 1 :]), reduced=reduced)
        if again:
            yet = sum(self._whole[: i + 1]) + self._root[0], sum(self._shard[: i + 1]) + self._root[1]
            total += left(*yet, reduced=job.ranks.zero >= 2)
        return total

    def _gathered(self, i: int) -> int:
        """Whole parameters while link `i` runs its backward pass."""
        if self._job.in_place:
            return 0
        units = self._whole if self._job.ranks.zero < 3 else self._whole[i : i + 1]
        return self._job.compute_bytes * (sum(units) + self._root[0])

    def _prefetched(self, i: int) -> int:
        """ZeRO stage 3 gathers the next link while one runs, into a buffer as large."""
        if self._job.in_place or self._job.ranks.zero < 3:
            return 0
        return self._job.compute_bytes * next((n for n in reversed(self._whole[:i]) if n), 0)


def _activations(job: Job, links: list[Link]) -> list[Activations]:
    """Of a rank's links; of its layers, every so many are computed again."""
    kinds: dict[tuple[str, bool], Activations] = {}
    found, layer = [], 0
    for link in links:
        is_layer = link.name.startswith("layers.")
        again = is_layer and job.recompute != "none" and layer % job.every == 0
        kind = "layer" if is_layer else link.name, again
        if kind not in kinds:
            kinds[kind] = of_link(job, link, recomputed=again)
        found.append(kinds[kind])
        layer += is_layer
    return found


def _pipeline(job: Job, stage: Stage) -> int:
    """The batch as the loader and the pipeline have it; and a buffer for each micro batch and neighbour.

    torch's stages keep one for every micro batch of a step, for activations and for their gradients.
    """
    batch = 2 * 2 * 8 * job.tokens * job.accumulation  # inputs and targets, int64, one by one and together
    wide = job.compute_bytes * job.shape.hidden * job.tokens
    return batch + stage.neighbours * job.accumulation * wide
