"""Memory and traffic of ZeRO on one rank, by formula. A test compares the formulas with real runs.

P is the number of parameters of a rank's pipeline stage and tensor-parallel part. Of dp data-parallel ranks,
s shard (`shard_group`, all by default) and n = dp / s replicate. Passes compute with c bytes per element, and
gradients are accumulated and reduced with r. Bytes on a rank, each column at its own peak in a step:

| ZeRO stage | parameters       | gradients                                        | optimizer state |
| 0          | 4P + cP          | rP while micro batches accumulate; then 4P       | 8P              |
| 1          | 4P/s + cP        | rP while micro batches accumulate; then 4P/s     | 8P/s            |
| 2          | 4P/s + cP        | 4P/s                                             | 8P/s            |
| 3          | 4P/s             | 4P/s                                             | 8P/s            |

`cP` are whole copies to compute with. An unsharded fp32 parameter is computed with in place and needs none.
At stage 3 the copies are transient: one unit of `parallel.layers.units`, mostly a layer, and the next one.
Where the loss is computed, the last unit and the root, K elements, stay from the forward pass to the backward
pass.

The ZeRO paper (Rajbhandari et al. 2020, section 5, with c = r = 2 and Adam) has 2P + 2P + KP, divided by dp
from stage 3, 2 and 1 on. Its K = 12 is 4 bytes of fp32 parameters and 8 of moments. Differences here:

- Reduced gradients are kept in fp32.
- At stage 3 there is no 16-bit copy of the shard besides the fp32 one. The sum is the paper's 16P/dp.
- Stage 1 with one micro batch in a step reduces gradients as they come, like stage 2.
- In fp32 the paper's copy is the parameter again: 4P next to 4P/s.

Collectives are rings: a rank sends (k-1)/k of the bytes to gather or scatter over k ranks, and twice that to
sum them (the paper's section 7 counts 1 and 2). In a step of A micro batches a rank sends:

| ZeRO stage | all-gather over s | reduce-scatter over s | all-reduce over n                |
| 0          | -                 | -                     | rP, over dp                      |
| 1          | cP                | rP                    | rP/s                             |
| 2          | cP                | A rP                  | rP/s                             |
| 3          | A c(2P - K)       | A rP                  | rP/s                             |

The paper's 2P up to stage 2 and 3P at stage 3 are for A = 1. Where s doesn't divide a parameter's first
dimension, padding adds to both memory and traffic.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from parallel.degrees import shard_count

MASTER_BYTES = 4
"""Bytes of an element in fp32, the type of the optimizer's parameters and of reduced gradients."""


class Sent(NamedTuple):
    """Bytes that a rank sends in a step, for each collective."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int

    @property
    def total(self) -> int:
        return sum(self)


def largest_part(shape: tuple[int, ...], tp_dim: int | None, *, tp: int, shards: int) -> int:
    """Return the elements of a tensor's largest part, cut by `tp` along `tp_dim` and by `shards` along dim 0.

    Parts have `ceil(n / k)` rows. A rank with fewer keeps room for as many, since `fully_shard` pads.
    """
    if not shape:
        return 1
    part = list(shape)
    if tp_dim is not None:
        part[tp_dim] = -(-part[tp_dim] // tp)
    part[0] = -(-part[0] // shards)
    return prod(part)


def computes_in_place(*, shards: int, compute_bytes: int, offload: bool) -> bool:
    """Return whether passes compute with the parameter itself, without a whole copy (see `parallel.zero`)."""
    return shards == 1 and compute_bytes == MASTER_BYTES and not offload


def beside_shards(
    parameters: int,
    trained: int,
    *,
    stage: int,
    shards: int,
    compute_bytes: int,
    reduce_bytes: int,
    accumulation: int,
    offload: bool = False,
) -> tuple[int, int]:
    """Return the bytes of whole copies to compute with, and of whole gradients that accumulate.

    `parameters` and `trained` count elements before ZeRO cuts them: all, and those with gradients.
    """
    in_place = computes_in_place(shards=shards, compute_bytes=compute_bytes, offload=offload)
    copies = 0 if stage == 3 or in_place else compute_bytes * parameters
    return copies, reduce_bytes * trained if stage <= 1 and accumulation > 1 else 0


def sent(
    parameters: int,
    *,
    stage: int,
    dp: int,
    shard_group: int | None = None,
    compute_bytes: int = 4,
    reduce_bytes: int = 4,
    accumulation: int = 1,
    kept: int = 0,
) -> Sent:
    """Return the bytes that ZeRO makes a rank send in a step.

    Args:
        parameters: elements of the rank's pipeline stage and tensor-parallel part, before ZeRO cuts them.
        stage: ZeRO stage, 0 to 3.
        dp: number of data-parallel ranks.
        shard_group: number of data-parallel ranks over which ZeRO shards; all by default.
        compute_bytes: bytes of an element in forward and backward passes.
        reduce_bytes: bytes of a gradient's element, as it is accumulated and reduced.
        accumulation: micro batches in a step.
        kept: elements that stage 3 gathers once for a micro batch, not twice.
    """
    s = shard_count(dp, stage, shard_group)
    n = dp // s  # replicas
    gathers, scatters = times(stage, accumulation)
    elements = gathers * parameters - (accumulation * kept if stage == 3 else 0)
    gathered, reduced = compute_bytes * elements, reduce_bytes * parameters
    return Sent(gathered * (s - 1) // s, scatters * reduced * (s - 1) // s, 2 * reduced * (n - 1) // (n * s))


def times(stage: int, accumulation: int) -> tuple[int, int]:
    """Return how often a step of `accumulation` micro batches gathers parameters and scatters gradients."""
    return 2 * accumulation if stage == 3 else 1, accumulation if stage >= 2 else 1
