"""What a forward pass leaves for the backward one, in bytes on one rank, read off what autograd keeps.

The method is that of Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
models", section 4: go through a layer's operations and add up what the backward of each needs, each tensor
once. The terms are those of `examples/megatron_gpt/model.py` on PyTorch's kernels; attention is a flash or a
memory-efficient kernel, which keeps no S x S matrix. There is no dropout, so there are no masks.

Letters as in the model: S sequence, D hidden size, H heads, E head size, F feed-forward size, V vocabulary;
T tokens of a micro batch, t tensor-parallel ranks, c bytes of the type that is computed in.
"""

from __future__ import annotations

from typing import NamedTuple

from uni3d.estimate.gpt import Link
from uni3d.estimate.job import Job


class Activations(NamedTuple):
    """Of one link of the chain and one micro batch."""

    kept: int
    """From its forward to its backward pass."""
    again: int = 0
    """Computed again for the backward pass, and there beside what was kept while that lasts."""
    work: int = 0
    """Gradients of activations, at the largest, while its backward pass runs."""
    given: int = 0
    """Of what was kept, the link's input: memory that the link before has made."""


def of_link(job: Job, link: Link, *, recomputed: bool) -> Activations:
    """What `link` keeps; `recomputed` says that it is one of the layers that are computed again."""
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
    """A norm's input and statistics. Its output is the next linear layer's input, and counted there.

    On CPUs RMSNorm is made of single operations, in fp32: its input as fp32 and the normalised one. On GPUs
    it is one kernel that keeps its input.
    """
    c, tokens = job.compute_bytes, _tokens(job)
    if job.shape.norm == "rmsnorm":
        values = 2 * 4 if job.device == "cpu" else c
        return tokens * (values * job.shape.hidden + 4)
    return tokens * (c * job.shape.hidden + 2 * (c if job.device == "cpu" else 4))


def attention(job: Job) -> int:
    """c T (D + (2 D + 2 KV) / t), and the softmax's logarithms; with rotary positions c T D / t more.

    The projections' input; queries, keys and values; the output, of which, where queries were rotated and so
    are laid out by head, `o` gets a copy laid out by token.
    """
    shape, tp, c = job.shape, job.ranks.tp, job.compute_bytes
    rotary = shape.positions == "rotary"
    values = shape.hidden + (shape.hidden * (3 if rotary else 2) + 2 * shape.kv_width) // tp
    lse = 4 * job.tokens * shape.heads // tp
    tables = 4 * job.seq_len * (shape.hidden // shape.heads // 2) * c if rotary and c < 4 else 0
    return c * job.tokens * values + lse + tables


def feed_forward(job: Job) -> int:
    """c T (D + 4 F / t) with SwiGLU: input, gate, silu of it, up, product. With GELU 2 F: before, after."""
    features = (4 if job.shape.activation == "swiglu" else 2) * job.shape.ffn // job.ranks.tp
    return job.compute_bytes * job.tokens * (job.shape.hidden + features)


def products(job: Job) -> int:
    """What selective recomputation keeps of a layer beside its input: what matrix products and attention
    gave.

    Under tensor parallelism the row-wise layers' results are kept twice, before and after they are summed.
    """
    shape, tp, c = job.shape, job.ranks.tp, job.compute_bytes
    columns = 2 * shape.hidden + 2 * shape.kv_width
    columns += (2 if shape.activation == "swiglu" else 1) * shape.ffn
    summed = 2 * c * _tokens(job) * shape.hidden if tp > 1 else 0
    rows = 2 * c * job.tokens * shape.hidden
    return c * job.tokens * columns // tp + 4 * job.tokens * shape.heads // tp + rows + summed


def of_loss(job: Job) -> tuple[int, int]:
    """What logits and loss keep of a micro batch, and what their backward pass needs beside: both fp32.

    Logits and their log-softmax, T V / t each; then the gradients of both. Often the largest tensors of all.
    """
    logits = 4 * job.tokens * -(-job.shape.vocab // job.ranks.tp)
    return 2 * logits, 2 * logits


def _work(job: Job) -> int:
    """Gradients inside a layer at the feed-forward part, where they are widest."""
    inner = (2 if job.shape.activation == "swiglu" else 1) * job.shape.ffn // job.ranks.tp
    return job.compute_bytes * job.tokens * (2 * job.shape.hidden + inner)


def _given(job: Job) -> int:
    """Of a norm's `kept`, its input as the link before gave it. RMSNorm on CPUs keeps one in fp32 instead."""
    cast = job.shape.norm == "rmsnorm" and job.device == "cpu" and job.compute_bytes < 4
    return 0 if cast else _wide(job)


def _wide(job: Job, *, split: bool = True) -> int:
    """A tensor (B, S, D); `split` where sequence parallelism would split it."""
    return job.compute_bytes * job.shape.hidden * (_tokens(job) if split else job.tokens)


def _tokens(job: Job) -> int:
    """Of a micro batch, on a rank, outside of what tensor parallelism splits."""
    return -(-job.tokens // job.ranks.tp) if job.sequence_parallel else job.tokens
