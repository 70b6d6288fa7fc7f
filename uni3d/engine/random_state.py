"""Random numbers that a resumed run draws again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from parallel import Topology


@contextmanager
def random_state(
    topology: Topology, *, seed: int, step: int, micro_step: int, nth: int = 0
) -> Iterator[None]:
    """Dropout drawn from (seed, step, place), so that a resume on the same topology draws the same.

    `nth` counts the forward passes of one micro batch, each of which draws other numbers. Tensor-parallel
    ranks draw alike, as most of what they drop out of is the same activations; where each has other features
    or, under sequence parallelism, other tokens, these get equal masks.
    """
    place = (seed, step, micro_step, topology.pp_rank, topology.dp_rank, *([nth] if nth else []))
    digest = hashlib.sha256(repr(place).encode()).digest()
    seed_here = int.from_bytes(digest[:7], "little")
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed_here)  # torch.manual_seed does all devices, and is slow
        if devices:
            torch.cuda.manual_seed(seed_here)
        yield
