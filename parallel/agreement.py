"""Errors that all ranks raise alike: they ran different layers, or one has a batch that doesn't fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    found = topology.host.all_reduce(None if reason is None else (topology.rank, reason), _first)
    assert found is not None, "some rank has a reason"
    return f"rank {found[0]}: {found[1]}"


def _first(reasons: list[tuple[int, str] | None]) -> tuple[int, str] | None:
    return next((reason for reason in reasons if reason is not None), None)


class _Ran(NamedTuple):
    """Traces of one rank."""

    rank: int
    traces: list[Trace]

    @property
    def late(self) -> bool:
        return any(trace.late for trace in self.traces)

    def differs(self, other: _Ran) -> bool:
        return [trace.digest for trace in self.traces] != [trace.digest for trace in other.traces]


_Told = dict[tuple[int, int], list[_Ran]]
"""Place along pp and tp -> the first rank there, and the first that differs or has late gradients."""


def explain(traces: Sequence[Trace], topology: Topology) -> str:
    """Return how the ranks' traces differ. Collective."""
    place = (topology.pp_rank, topology.tp_rank)
    told = topology.host.all_reduce({place: [_Ran(topology.rank, list(traces))]}, _merged)
    late = min((ran.rank for there in told.values() for ran in there if ran.late), default=None)
    pairs = [(there[0], there[-1]) for there in told.values() if there[0].differs(there[-1])]
    mine, other = min(pairs, key=lambda pair: pair[1].rank, default=(None, None))
    if late is not None and (other is None or late <= other.rank):
        return (
            f"rank {late} got a second gradient for a parameter whose layer had been reduced, as under "
            "reentrant checkpointing of a layer that is used twice; use checkpoint(use_reentrant=False)"
        )
    if mine is None or other is None:
        return (
            "the ranks' losses are a mean on some and a sum with a count on others; use one kind on all ranks"
        )
    pairs_of_traces = zip(mine.traces, other.traces, strict=True)
    a, b = next((a.order, b.order) for a, b in pairs_of_traces if a.digest != b.digest)
    if list(a) == list(b):
        return (
            f"ranks {mine.rank} and {other.rank} train different parameters (requires_grad differs); freeze "
            "the same ones on all ranks"
        )
    return (
        f"ranks {mine.rank} and {other.rank} ran different layers, so ZeRO stage 3 has summed gradients of "
        f"different ones: {_first_difference(a, b, mine.rank, other.rank)}; use ZeRO "
        "stage 0, 1 or 2, or run the same layers on all ranks"
    )


def _merged(parts: list[_Told]) -> _Told:
    """Merge what adjacent ranks tell. More of it would fill the memory of thousands of ranks."""
    found: _Told = {}
    for part in parts:
        for place, there in part.items():
            found.setdefault(place, []).extend(there)
    for place, (first, *others) in found.items():
        found[place] = [first, *[ran for ran in others if ran.late or ran.differs(first)][:1]]
    return found


def _first_difference(mine: Sequence[str], other: Sequence[str], first: int, rank: int) -> str:
    for i, (a, b) in enumerate(zip(mine, other, strict=False)):
        if a != b:
            return f"number {i + 1} in order was {a} on rank {first} and {b} on rank {rank}"
    return f"rank {first} went through {len(mine)} layers and rank {rank} through {len(other)}"
