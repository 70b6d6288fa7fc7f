"""Loading into existing arrays: compare, agree, then read.

All ranks agree on the difference between their targets and the checkpoint before any target changes, so a
load goes ahead on all ranks or fails on all. Its report lists every array that was restored, defaulted or
dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from ckpt.comm import Comm, agreed, distinct, union
from ckpt.errors import CheckpointError, PartialLoadError
from ckpt.read import Checkpoint, pieces
from ckpt.shards import ArrayKey, Shard, UnfilledShard
from ckpt.threads import cores, for_each

Leave = Callable[[ArrayKey], str | None]
Target = Shard | UnfilledShard


@dataclass(kw_only=True)
class LoadReport:
    """Outcome of a load for each array, over all ranks; names are `atom/state`."""

    tag: str
    restored: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    """Restored values besides the arrays."""
    defaulted: dict[str, str] = field(default_factory=dict)
    """Arrays that were expected but not in the checkpoint, and so left as they were -> the reason."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Arrays of the checkpoint that were not loaded -> the reason."""
    left_out: list[str] = field(default_factory=list)
    """Parts of another framework's checkpoint that aren't read, each with the reason."""
    bytes_read: int = 0
    """Bytes that this rank read."""

    def __str__(self) -> str:
        besides = f" and {len(self.extra)} extra states" if self.extra else ""
        parts = [f"{self.tag}: {len(self.restored)} arrays{besides} restored"]
        for label, names in (("defaulted", self.defaulted), ("dropped", self.dropped)):
            parts.append(f"{len(names)} {label}" + (f" ({_some(names)})" if names else ""))
        if self.left_out:
            parts.append(f"left out: {'; '.join(self.left_out)}")
        return ", ".join(parts)


def load(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    *,
    comm: Comm,
    strict: bool = True,
    leave: Leave = lambda key: None,
    threads: int | None = None,
) -> LoadReport:
    """Fill this rank's `targets` from the checkpoint. Collective.

    Args:
        strict: raise on missing and unexpected arrays, rather than only report them. A different shape or
            dtype is always an error.
        leave: returns the reason why an array of the checkpoint is deliberately not loaded, or None. Arrays
            with a reason aren't unexpected.

    Raises:
        CheckpointError: the targets don't fit; the same on all ranks, and no target has changed.
        PartialLoadError: data is damaged; the same on all ranks, and targets may have changed.
    """
    everyone = _wanted_by_all({t.spec.key for t in targets}, comm)
    report = agreed(comm, lambda: _compare(checkpoint, targets, everyone, strict, leave))
    there = [t for t in targets if t.spec.key in checkpoint.arrays]
    try:
        report.bytes_read = agreed(comm, lambda: _read_all(checkpoint, there, threads))
    except CheckpointError as error:
        raise PartialLoadError(str(error)) from error
    return report


def _compare(
    checkpoint: Checkpoint, targets: Sequence[Target], everyone: set[ArrayKey], strict: bool, leave: Leave
) -> LoadReport:
    """Return the report; raise if the load can't go ahead. `everyone` has the targets' keys of all ranks."""
    there = checkpoint.arrays
    for target in targets:
        info = there.get(target.spec.key)
        if info and (info.shape, info.dtype) != (target.spec.shape, target.spec.dtype):
            raise CheckpointError(
                f"{'/'.join(target.spec.key)} is {info.dtype}{list(info.shape)} in {checkpoint.url}, "
                f"but the model's is {target.spec.dtype}{list(target.spec.shape)}; "
                "load it into the model that was saved"
            )
    restored = sorted("/".join(key) for key in everyone & there.keys())
    missing = sorted("/".join(key) for key in everyone - there.keys())
    defaulted = dict.fromkeys(missing, "not in the checkpoint")
    reasons = {"/".join(key): leave(key) for key in sorted(there.keys() - everyone)}
    unexpected = [name for name, reason in reasons.items() if reason is None]
    dropped = dict.fromkeys(unexpected, "not in the model or its optimizer")  # shown first
    dropped |= {name: reason for name, reason in reasons.items() if reason is not None}
    if strict and (missing or unexpected):
        problems = [f"{checkpoint.url} doesn't fit the model and optimizer"]
        if missing:
            problems.append(f"{len(missing)} missing in the checkpoint: {_some(missing)}")
        if unexpected:
            problems.append(f"{len(unexpected)} unexpected in the checkpoint: {_some(unexpected)}")
        raise CheckpointError("; ".join(problems))
    return LoadReport(tag=checkpoint.tag, restored=restored, defaulted=defaulted, dropped=dropped)


def _wanted_by_all(wanted: set[ArrayKey], comm: Comm) -> set[ArrayKey]:
    """Return the union of all ranks' keys. Among ranks with equal keys, only the first sends them."""
    digest = blake2b(json.dumps(sorted(wanted)).encode(), digest_size=16).digest()
    speaks = distinct(comm, lambda: digest)[digest].first == comm.rank
    return comm.all_reduce(wanted if speaks else set(), union)


def _read_all(checkpoint: Checkpoint, targets: Sequence[Target], threads: int | None) -> int:
    """Read every piece of every target, with a few threads; return the bytes read."""
    jobs = [
        (piece, target.data)
        for target in targets
        for piece in pieces(checkpoint.arrays[target.spec.key], target.spec.box)
    ]
    workers = checkpoint.store.threads or threads or cores()
    return sum(for_each(lambda job: checkpoint.read_piece(*job), jobs, workers))


def _some(names: Sequence[str] | dict[str, str], limit: int = 8) -> str:
    shown = list(names)[:limit]
    return ", ".join(shown) + (", ..." if len(names) > limit else "")
