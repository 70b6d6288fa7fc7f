"""Memory that a forward pass keeps for the backward pass, in bytes on one rank, as autograd saves it.

The method is that of Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
models", section 4: go through a layer's operations and add up the tensors that their backward passes need,
each tensor once. The model is `examples/megatron_gpt/model.py` on PyTorch's kernels. Attention is a flash or
memory-efficient kernel, which keeps no S x S matrix. There is no dropout, so there are no masks.

Letters: S sequence, D hidden size, KV width of keys, F feed-forward size, V vocabulary, T tokens of a micro
batch, t tensor-parallel ranks, c bytes of the compute type.
"""

from __future__ import annotations

from typing import NamedTuple

from uni3d.estimate.gpt import Link
from uni3d.estimate.job import Job


class Activations(NamedTuple):
    """Activation memory of one link of the chain, for one micro batch."""

    kept: int
    """Bytes kept from the forward to the backward pass."""
    again: int = 0
    """Recomputed bytes, which exist during the backward pass on top of `kept`."""
    work: int = 0
    """Peak of activation gradients during the backward pass."""
    given: int = 0
    """Part of `kept` that is the link's input, allocated by the previous link."""


def of_link(job: Job, link: Link, *, recomputed: bool) -> Activations:
    """Return the activations of `link`; `recomputed` marks a layer with activation checkpointing."""
    if link.name == "embed":
        ids = 8 * job.tokens
        return Activations(kept=ids if job.shape.positions == "rotary" else ids + 8 * job.seq_len)
    if link.name == "norm":
        return Activations(kept=norm(job), work=_wide(job), given=_given(job))
    if link.name == "head":
        return Activations(kept=_wide(job, split=False), work=_wide(job, split=False))
    whole = norm(job) * 2 + attention(job) + feed_forward(job)
    work = _work(job)
    if not recomputed:
        return Activations(kept=whole, work=work, given=_given(job))
    kept = _wide(job)
    if job.recompute == "selective":
        kept += products(job)
    return Activations(kept=kept, again=whole, work=work, given=_wide(job))


def norm(job: Job) -> int:
    """Return the bytes of a norm's input and statistics. Its output counts as the next linear layer's input.

    On CPUs RMSNorm runs as separate operations in fp32, and keeps its input in fp32 and the normalized one.
    On GPUs it is one kernel that keeps its input.
    """
    c, tokens = job.compute_bytes, job.tokens_between
    if job.shape.norm == "rmsnorm":
        values = 2 * 4 if job.device == "cpu" else c
        return tokens * (values * job.shape.hidden + 4)
    return tokens * (c * job.shape.hidden + 2 * (c if job.device == "cpu" else 4))


def attention(job: Job) -> int:
    """Return c T (D + (2 D + 2 KV) / t), plus the log-sum-exp; rotary positions add c T D / t.

    The terms are the projections' input, then queries, keys, values and the output. Rotated queries are laid
    out by head, and so is the output: `o` then keeps a copy laid out by token.
    """
    shape, tp, c = job.shape, job.ranks.tp, job.compute_bytes
    rotary = shape.positions == "rotary"
    values = shape.hidden + (shape.hidden * (3 if rotary else 2) + 2 * shape.kv_width) // tp
    lse = 4 * job.tokens * shape.heads // tp
    tables = 4 * job.seq_len * (shape.hidden // shape.heads // 2) * c if rotary and c < 4 else 0
    return c * job.tokens * values + lse + tables


def feed_forward(job: Job) -> int:
    """Return c T (D + 4 F / t) for SwiGLU (input; gate, its silu, up, product), or 2 F instead for GELU."""
    features = (4 if job.shape.activation == "swiglu" else 2) * job.shape.ffn // job.ranks.tp
    return job.compute_bytes * job.tokens * (job.shape.hidden + features)


def products(job: Job) -> int:
    """Return the bytes of a layer's matrix products and attention, which selective recomputation keeps.

    With tensor parallelism the row-wise layers' results are kept twice, before and after they are summed.
    """
    shape, tp, c = job.shape, job.ranks.tp, job.compute_bytes
    columns = 2 * shape.hidden + 2 * shape.kv_width
    columns += (2 if shape.activation == "swiglu" else 1) * shape.ffn
    summed = 2 * c * job.tokens_between * shape.hidden if tp > 1 else 0
    rows = 2 * c * job.tokens * shape.hidden
    return c * job.tokens * columns // tp + 4 * job.tokens * shape.heads // tp + rows + summed


def of_loss(job: Job) -> tuple[int, int]:
    """Return the bytes that logits and loss keep, and those that their backward pass adds, for a micro batch.

    Kept are the fp32 logits and their log-softmax, T V / t elements each. Added are the gradients of both.
    These are often the largest tensors of all.
    """
    logits = 4 * job.tokens * -(-job.shape.vocab // job.ranks.tp)
    return 2 * logits, 2 * logits


def _work(job: Job) -> int:
    """Return the bytes of gradients inside a layer's feed-forward part, where they are widest."""
    inner = (2 if job.shape.activation == "swiglu" else 1) * job.shape.ffn // job.ranks.tp
    return job.compute_bytes * job.tokens * (2 * job.shape.hidden + inner)


def _given(job: Job) -> int:
    """Return the bytes of a norm's input in its `kept`. RMSNorm on CPUs keeps an fp32 copy instead."""
    cast = job.shape.norm == "rmsnorm" and job.device == "cpu" and job.compute_bytes < 4
    return 0 if cast else _wide(job)


def _wide(job: Job, *, split: bool = True) -> int:
    """Return the bytes of a (B, S, D) tensor; `split` marks one that sequence parallelism splits."""
    return job.compute_bytes * job.shape.hidden * (job.tokens_between if split else job.tokens)
