"""What ZeRO makes a rank hold and send, in bytes, by formula. Loads no torch; a test measures real runs.

With P parameters on a rank's pipeline stage and tensor-parallel part, dp data-parallel ranks of which s shard
(`shard_group`, by default all) and n = dp / s replicate, c bytes per element to compute with and r bytes to
accumulate and reduce gradients with, a rank holds at the fullest moment of a step:

| ZeRO stage | parameters       | gradients                                        | optimizer state |
| 0          | 4P + cP          | rP while micro batches accumulate; then 4P       | 8P              |
| 1          | 4P/s + cP        | rP while micro batches accumulate; then 4P/s     | 8P/s            |
| 2          | 4P/s + cP        | 4P/s                                             | 8P/s            |
| 3          | 4P/s             | 4P/s                                             | 8P/s            |

`cP` are whole copies to compute with. There are none where the shard is the whole and in fp32. At stage 3
they are transient: those of one layer, in general of one unit of `parallel.layers.units`, and of the next.

The ZeRO paper (Rajbhandari et al. 2020, section 5, with c = r = 2 and Adam) has 2P + 2P + KP, each term
divided by dp from stage 3, 2 and 1 on; its K = 12 are the 4 bytes of fp32 parameters and the 8 of moments.
Ours differs in that gradients are kept in fp32 once they are reduced; that at stage 3 there is no 16-bit copy
of the shard beside the fp32 one, which gives the same 16P/dp in all; and that stage 1 with one micro batch in
a step reduces gradients as they come, like stage 2. In fp32 the paper's copy is the same again: 4P by 4P/s.

A rank sends in a step of A micro batches, in rings, (k-1)/k of the bytes to gather or to scatter over k
ranks, and twice that to sum them (the paper's section 7 says 1 and 2 for that):

| ZeRO stage | all-gather over s | reduce-scatter over s | all-reduce over n                |
| 0          | -                 | -                     | rP, over dp                      |
| 1          | cP                | rP                    | rP/s                             |
| 2          | cP                | A rP                  | rP/s                             |
| 3          | 2A cP             | A rP                  | rP/s                             |

The paper's 2P for stages up to 2 and 3P for stage 3 are those of A = 1. What is padded where s doesn't divide
a parameter's first dimension comes on top, in memory and on the wire.
"""

from __future__ import annotations

from typing import NamedTuple

from parallel.degrees import shard_count

MASTER_BYTES = 4
"""Of a parameter as the optimizer updates it, and of its reduced gradient: fp32."""


class Sent(NamedTuple):
    """Bytes that a rank sends in a step, by collective."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int

    @property
    def total(self) -> int:
        return sum(self)


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
    """Bytes of what a rank holds whole: copies of parameters to compute with, and gradients that accumulate.

    `parameters` and `trained` are elements before ZeRO cuts them in `shards`: all, and those with gradients.
    """
    in_place = shards == 1 and compute_bytes == MASTER_BYTES and not offload
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
) -> Sent:
    """Return the bytes that ZeRO makes a rank send in a step.

    Args:
        parameters: elements of this rank's pipeline stage and tensor-parallel part, before ZeRO cuts them.
        stage: ZeRO stage, 0 to 3.
        dp: number of data-parallel ranks.
        shard_group: number of them over which ZeRO shards; all by default.
        compute_bytes: bytes of an element in forward and backward passes.
        reduce_bytes: bytes of an element of a gradient that is accumulated or reduced.
        accumulation: micro batches in a step.
    """
    s = shard_count(dp, stage, shard_group)
    n = dp // s  # groups that hold the same
    gathers = 2 * accumulation if stage == 3 else 1
    scatters = accumulation if stage >= 2 else 1
    gathered, reduced = compute_bytes * parameters, reduce_bytes * parameters
    return Sent(
        gathers * gathered * (s - 1) // s,
        scatters * reduced * (s - 1) // s,
        2 * reduced * (n - 1) // (n * s),
    )
