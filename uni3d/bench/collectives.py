"""Times of collectives by kind, read from the events of torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

KINDS = {
    "all_gather": "allgather",
    "reduce_scatter": "reducescatter|alltoall",
    "all_reduce": "allreduce",
    "send_recv": "send|recv",
}
"""Names of the kinds, and what the name of an operation has, without underscores, in any case."""

_OF_GLOO, _OF_NCCL = re.compile(r"^gloo:"), re.compile(r"^nccl(Dev)?Kernel")


def seconds_by_kind(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Return the seconds a step in which collectives of each kind were under way.

    `events` are those of `torch.profiler.profile` in so many steps. Collectives of one kind that overlap
    count once. On CPUs they are gloo's, where reduce-scatters are exchanges (`parallel.sums`); on GPUs the
    kernels of NCCL.
    """
    spans: Mapping[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if (kind := _kind(event.name)) is not None:
            spans[kind].append((event.time_range.start, event.time_range.end))
    return {kind: 1e-6 * union(spans[kind]) / steps for kind in [*KINDS, "other"] if kind in spans}


def _kind(name: str) -> str | None:
    """Return the kind of a collective, or None for another event."""
    if not (_OF_GLOO.search(name) or _OF_NCCL.search(name)):
        return None
    plain = name.lower().replace("_", "")
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, plain)), "other")


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans `(begin, end)`."""
    total, covered = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, covered))
        covered = max(covered, end)
    return total
