"""Errors that all ranks raise alike: they ran different layers, or one has a batch that doesn't fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from parallel.topology import Topology


class StepRefusedError(RuntimeError):
    """A step's gradients can't be right, so it wasn't taken. All ranks raise it, and training may go on."""


class BatchError(ValueError):
    """Micro batches don't fit the config or the model. No step was taken, and training may go on."""


class Trace(NamedTuple):
    """Record of what one pipeline stage of a rank ran since the last step."""

    late: int
    """Gradients that weren't reduced, as they came after their layer's reduction."""
    digest: int
    """Bits that differ where `order` does."""
    order: Sequence[str]
    """ZeRO stage 3: the names of the layers gathered and reduced, in order."""


def first_reason(reason: str | None, topology: Topology) -> str:
    """Return the first reason that a rank gives, and which rank. Collective."""
    everyone: list[str | None] = [reason] * topology.world_size
    dist.all_gather_object(everyone, reason)
    rank = next(rank for rank, given in enumerate(everyone) if given is not None)
    return f"rank {rank}: {everyone[rank]}"


def explain(traces: Sequence[Trace], topology: Topology) -> str:
    """Return how the ranks' traces differ. Collective."""
    place = (topology.pp_rank, topology.tp_rank)
    everyone: list[tuple[tuple[int, int], list[Trace]]] = [(place, list(traces))] * topology.world_size
    dist.all_gather_object(everyone, (place, list(traces)))
    firsts: dict[tuple[int, int], int] = {}
    for rank, (theirs, ran) in enumerate(everyone):
        if any(trace.late for trace in ran):
            return (
                f"rank {rank} got a second gradient for a parameter whose layer had been reduced, as under "
                "reentrant checkpointing of a layer that is used twice; use checkpoint(use_reentrant=False)"
            )
        first = firsts.setdefault(theirs, rank)
        for mine, other in zip(everyone[first][1], ran, strict=True):
            if mine.digest != other.digest and list(mine.order) == list(other.order):
                return (
                    f"ranks {first} and {rank} train different parameters (requires_grad differs); freeze "
                    "the same ones on all ranks"
                )
            if mine.digest != other.digest:
                return (
                    f"ranks {first} and {rank} ran different layers, so ZeRO stage 3 has summed gradients of "
                    f"different ones: {_first_difference(mine.order, other.order, first, rank)}; use ZeRO "
                    "stage 0, 1 or 2, or run the same layers on all ranks"
                )
    return "the ranks' losses are a mean on some and a sum with a count on others; use one kind on all ranks"


def _first_difference(mine: Sequence[str], other: Sequence[str], first: int, rank: int) -> str:
    for i, (a, b) in enumerate(zip(mine, other, strict=False)):
        if a != b:
            return f"number {i + 1} in order was {a} on rank {first} and {b} on rank {rank}"
    return f"rank {first} went through {len(mine)} layers and rank {rank} through {len(other)}"
