"""Copies of a tensor on several ranks: compared before a save, which writes one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

import torch

import ckpt
from parallel import HostComm
from uni3d.manifest import RunManifest
from uni3d.state import BUFFER, Held

SAMPLED = 1024
"""Elements of each tensor that are compared; copies that go their own ways differ everywhere."""

_Digests = dict[int, dict[str, tuple[int, bytes]]]
"""First rank that holds a part -> array -> a rank that holds it, and the digest of its sample."""


def check_copies(comm: HostComm, arrays: Sequence[Held]) -> None:
    """Check that ranks which hold the same part of an array have the same numbers. Collective.

    Compares `SAMPLED` elements of each. Buffers may differ: rank 0's are saved.

    Raises:
        ckpt.CheckpointError: they differ; the same on all ranks, naming the array and two ranks.
    """
    samples = ckpt.agreed(comm, lambda: _samples(comm.rank, arrays))
    whole = {first: _digest("".join(f"{name} {d.hex()}" for name, d in found)) for first, found in samples}
    seen = comm.all_reduce({first: {(comm.rank, digest)} for first, digest in whole.items()}, _first_two)
    differ = {first for first, digests in seen.items() if len(digests) > 1}
    if not differ:
        return
    mine = {first: {name: (comm.rank, d) for name, d in found} for first, found in samples if first in differ}
    named = comm.all_reduce([mine], lambda parts: [one for part in parts for one in part])
    raise ckpt.CheckpointError(_difference(named))


def digests_of(manifest: RunManifest, stage: int) -> dict[tuple[str, int], bytes]:
    """Return digests of a rank's step and optimizer, for `extra_state.check_alike`."""
    found = {("the step", 0): _digest(str(manifest.step))}
    if (optimizer := manifest.optimizer) is not None:
        values = {name: getattr(optimizer, name) for name in ("type", "members", "groups", "scalars")}
        text = json.dumps(values, sort_keys=True, default=repr)
        found["the optimizer's record of hyperparameters and step counts", stage] = _digest(text)
    return found


def _difference(found: Sequence[_Digests]) -> str:
    before: dict[tuple[int, str], tuple[int, bytes]] = {}
    for ranks in found:
        for first, arrays in ranks.items():
            for name, (rank, digest) in arrays.items():
                other, expected = before.setdefault((first, name), (rank, digest))
                if digest != expected:
                    return (
                        f"{name} has other numbers on rank {rank} than on rank {other}, though both hold the "
                        "same part of it: keep the copies in step (DistributedDataParallel does), or make it "
                        "a DTensor that says which part each rank has"
                    )
    return "ranks hold different arrays as copies of each other"


def _samples(rank: int, arrays: Sequence[Held]) -> list[tuple[int, list[tuple[str, bytes]]]]:
    """Return, for each first rank of holders, this rank's arrays and the digests of their samples."""
    firsts: dict[int, int | None] = {}  # by identity, as arrays that are cut alike share their `savers`
    found: dict[int, list[tuple[str, bytes]]] = {}
    for spec, tensor, savers in arrays:
        if not savers or spec.key.state == BUFFER or rank not in savers or not tensor.numel():
            continue
        if id(savers) not in firsts:
            holders = [other for other, place in savers.items() if place == savers[rank]]
            firsts[id(savers)] = min(holders) if len(holders) > 1 else None
        first = firsts[id(savers)]
        if first is not None:
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].cpu().contiguous()
            digest = blake2b(sample.view(torch.uint8).numpy().tobytes(), digest_size=8).digest()
            found.setdefault(first, []).append(("/".join(spec.key), digest))
    return list(found.items())


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _first_two(parts: list[dict[int, set[tuple[int, bytes]]]]) -> dict[int, set[tuple[int, bytes]]]:
    """Merge digests by first rank; one rank stands for all with the same digest."""
    found: dict[int, dict[bytes, int]] = {}
    for part in parts:
        for first, digests in part.items():
            for rank, digest in digests:
                known = found.setdefault(first, {})
                known[digest] = min(rank, known.get(digest, rank))
    return {first: {(rank, d) for d, rank in known.items()} for first, known in found.items()}
