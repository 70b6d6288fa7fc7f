"""Peak memory of each pipeline rank in a training step, computed without running it.

A step is walked through as the engine runs it. At the peak, a rank has as many micro batches in flight as its
schedule allows, and runs the backward pass of one of them, link by link from the last. Each link is a moment
with its own memory; the optimizer step is one more. The peak is the largest of them. All ranks of a pipeline
stage need the same, so there is one result for each stage.

Not included: the process itself, the CUDA context and NCCL's buffers (about 1-2 GiB on a GPU), memory that
the allocator caches, and a compiler's buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from uni3d.estimate.activations import Activations, of_link, of_loss, products
from uni3d.estimate.gpt import Link
from uni3d.estimate.job import Job, Stage


class Memory(NamedTuple):
    """Bytes on one rank at the peak of a step."""

    parameters: int
    """Sharded parameters, in fp32."""
    optimizer: int
    gradients: int
    """Gradients at that moment, reduced or not."""
    gathered: int
    """Whole parameters, in the compute type."""
    activations: int
    """Activations of all micro batches in flight, and tensors of the running backward pass."""
    loss: int
    """Logits and the loss's own tensors."""
    communication: int
    """Buffers of ZeRO's collectives."""
    pipeline: int
    """Buffers for other stages, and the batch itself."""

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Memory of each rank of one pipeline stage."""

    rank: int
    """Pipeline rank."""
    links: tuple[str, str]
    """First and last link of the stage."""
    peak: Memory
    host: int
    """Host memory with offload: parameters, gradients and optimizer states."""
    in_flight: int
    """Micro batches with activations in memory, counted once for each stretch of layers."""


def memory(job: Job) -> list[StageMemory]:
    """Return the memory of each pipeline rank, first to last."""
    return [_stage(job, rank, stage) for rank, stage in enumerate(job.stages)]


def worst(stages: list[StageMemory]) -> StageMemory:
    return max(stages, key=lambda stage: stage.peak.total)


def in_flight(job: Job, rank: int) -> int:
    """Return the largest number of micro batches with activations on a pipeline rank.

    A micro batch counts once for each stretch of layers.

    GPipe: all. 1F1B: the number of stages from this one on (Narayanan et al. 2021, section 2.2). Interleaved:
    the warm-up and one more. Zero-bubble keeps activations until the weights' gradients, `rank` micro batches
    later (Qi et al. 2023, ZB-H1). ZBV: as 1F1B's first stage, in stretches of half the size.
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
    """Transient memory of a rank at one moment, on top of parameters and optimizer state."""

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
    if not last:  # the step's last backward pass: no other micro batch is left, and gradients are reduced
        moments += walk.backward(1, again=True, last=True)
    moments.append(_Moment(shard, 0, 0, 0, 0))
    fullest = max(moments, key=sum)
    steady = (0, 0) if job.offload else (shard, job.moments * shard)
    peak = Memory(*steady, *fullest, _pipeline(job, stage))
    names = [link.name for link in stage.links]
    host = (2 + job.moments) * shard if job.offload else 0
    return StageMemory(rank=rank, links=(names[0], names[-1]), peak=peak, host=host, in_flight=flying)


class _Walk:
    """Walk through the backward pass of one micro batch on a pipeline stage, link by link from the last."""

    def __init__(self, job: Job, stage: Stage, rank: int) -> None:
        self._job = job
        self._rank = rank
        self._stage = stage
        self._acts = _activations(job, stage.links)
        if "embed" not in stage.ends:  # the first link's input is the pipeline's receive buffer
            self._acts[0] = self._acts[0]._replace(kept=self._acts[0].kept - self._acts[0].given)
        self._whole = [job.whole(unit) for unit in stage.units]
        self._shard = [job.shard(unit) for unit in stage.units]
        self._root = job.whole(stage.root), job.shard(stage.root)
        self._loss = of_loss(job) if "head" in stage.ends else (0, 0)

    def backward(self, flying: int, *, again: bool, last: bool) -> Iterator[_Moment]:
        """Yield the moments of the pass, while `flying - 1` other micro batches wait for theirs.

        `again` is True if earlier micro batches have left gradients, `last` if this is the step's last pass.
        """
        job, v = self._job, self._job.virtual_stages
        reduced = last or job.ranks.zero >= 2
        kept = sum(each.kept for each in self._acts)
        alive = kept + max(0, flying - v) * kept // v
        # torch's pipeline stage keeps the logits through their micro batch's backward pass. Without a
        # pipeline they are freed before it.
        loss_kept, loss_work = self._loss
        logits = loss_kept // 2
        if job.ranks.pp * v == 1:
            loss_kept, logits = loss_kept - logits, 0
        waiting = loss_kept * ((flying - 1) // v)
        leaving = 0  # buffer in which the previous link was reduced, freed when the next link is reduced
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
            own_loss = loss_work // 2 if is_head else 0
            yield _Moment(before + own, gathered, busy, loss + own_loss, following + leaving)
            alive -= each.kept
            yield _Moment(before, gathered, alive, loss, following + peak)
            leaving = leaves
        if flying > 1 and job.schedule == "zero_bubble" and "embed" not in self._stage.ends:
            yield self._halfway(flying, again=again, reduced=reduced)

    def _halfway(self, flying: int, *, again: bool, reduced: bool) -> _Moment:
        """Return the moment between the two halves of a zero-bubble backward pass.

        All activations are still kept. Added to them are the gradients of matrix products' outputs, from
        which the weights' gradients are computed `rank` micro batches later. (torch's first stage sends no
        gradient on and runs both halves at once.)
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
        """Return three sizes of link `i`'s gradients.

        The first is the gradients as they are computed. The second is the peak while they are reduced, beyond
        the memory in use before. The third is the part of it that stays until the next link is reduced.
        """
        job = self._job
        whole = self._whole[i] + (self._root[0] if i == 0 else 0)
        shard = self._shard[i] + (self._root[1] if i == 0 else 0)
        own, buffer = job.compute_bytes * whole, job.reduce_bytes * whole
        if not reduced:  # accumulated whole, which needs another tensor if it is in another type
            return own, own + (0 if again or job.precision == job.reduce else buffer), 0
        # At stages 0 and 1 they were added to the accumulated ones, which are freed with them.
        added = buffer if again and job.ranks.zero <= 1 else 0
        copy = buffer if job.shards == 1 else 0  # fully_shard then divides by 1, into a new tensor
        packed = buffer + (0 if added else own)
        peak = max(packed, buffer - added + job.reduce_bytes * shard + copy)
        return own, peak, buffer if job.ranks.dp > 1 else 0

    def _gradients(self, i: int, *, again: bool, reduced: bool) -> int:
        """Return the bytes of gradients when the backward pass of link `i` begins.

        ZeRO stages 0 and 1 keep gradients whole while micro batches accumulate, and reduce them in the step's
        last backward pass. The others reduce them link by link in each pass.
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
        """Return the bytes of whole parameters during the backward pass of link `i`."""
        if self._job.in_place:
            return 0
        units = self._whole if self._job.ranks.zero < 3 else self._whole[i : i + 1]
        return self._job.compute_bytes * (sum(units) + self._root[0])

    def _prefetched(self, i: int) -> int:
        """Return the bytes of the buffer into which ZeRO stage 3 gathers the next link while `i` runs."""
        if self._job.in_place or self._job.ranks.zero < 3:
            return 0
        return self._job.compute_bytes * next((n for n in reversed(self._whole[:i]) if n), 0)


def _activations(job: Job, links: list[Link]) -> list[Activations]:
    """Return the activations of a rank's links; one of every `job.every` layers is recomputed."""
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
    """Return the bytes of the batch and of the pipeline's buffers.

    torch's stages keep a buffer for every micro batch of a step, for activations and for their gradients.
    """
    # Inputs and targets in int64: the loader has them as micro batches, the pipeline as one tensor.
    batch = 2 * 2 * 8 * job.tokens * job.accumulation
    wide = job.compute_bytes * job.shape.hidden * job.tokens_between
    return batch + stage.neighbours * job.accumulation * wide
