"""A GPT of a given shape in plain PyTorch, and random tokens for it.

Names, shapes and operations are those of `examples/megatron_gpt/model.py`, which `uni3d plan` estimates. What
has no influence on speed is left out of a shape: the base of the rotary angles, the epsilon of the norms.

B is the batch, S the sequence, D the hidden size, E the size of a head, V the vocabulary.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from uni3d.estimate.gpt import GPTShape


class BenchGPT(nn.Module):
    """Token ids `(B, S)` to logits `(B, S, V)`."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = _Embedding(shape)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        if shape.tied_head:
            self.head.weight = self.embed.tokens.weight

    @property
    def pipeline_layers(self) -> list[str]:
        return [link.name for link in self.shape.links]

    @property
    def tp_plan(self) -> dict[str, str]:
        """Styles of `parallel.tp_styles` by module."""
        colwise = [
            "attn.q",
            "attn.k",
            "attn.v",
            "ffn.up",
            *["ffn.gate"] * (self.shape.activation == "swiglu"),
        ]
        learned = {"embed.positions": "embedding_rowwise"} if self.shape.positions == "learned" else {}
        return {
            "embed.tokens": "embedding_rowwise",
            **learned,
            **{f"layers.*.{name}": "sequence_parallel" for name in ("attn_norm", "ffn_norm")},
            **{f"layers.*.{name}": "gather_input" for name in ("attn", "ffn")},
            **{f"layers.*.{name}": "colwise" for name in colwise},
            **{f"layers.*.{name}": "rowwise" for name in ("attn.o", "ffn.down")},
            "norm": "sequence_parallel",
            "head": "colwise_logits",
        }

    @property
    def tp_units(self) -> dict[str, int]:
        """Heads of each projection of attention, which aren't cut."""
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        return {f"layers.*.attn.{name}": kv_heads if name in "kv" else heads for name in "qkvo"}

    def loss_fn(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Return the cross-entropy of `logits (B, S, V)` for `targets (B, S)`, summed, and their number."""
        total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total, targets.numel()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill a parameter: as GPT-2, but for the scale of what is added to the residual stream."""
        if name.endswith("bias"):
            tensor.zero_()
        elif "norm" in name:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0.0, 0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _norm(shape: GPTShape) -> nn.Module:
    return (nn.RMSNorm if shape.norm == "rmsnorm" else nn.LayerNorm)(shape.hidden, eps=1e-5)


class _Embedding(nn.Module):
    """Vectors of tokens, plus those of positions where they are learned."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.hidden)
        learned = shape.positions == "learned"
        self.positions = nn.Embedding(shape.max_seq_len, shape.hidden) if learned else None

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return x


class _Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input `(B, S, D)`."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.attn_norm = _norm(shape)
        self.attn = _Attention(shape)
        self.ffn_norm = _norm(shape)
        self.ffn = _FeedForward(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class _Attention(nn.Module):
    """Causal attention. Under tensor parallelism a rank has a part of the heads."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.head_size = shape.hidden // shape.heads
        self.rotates = shape.positions == "rotary"
        self.q = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k = nn.Linear(shape.hidden, shape.kv_width, bias=False)
        self.v = nn.Linear(shape.hidden, shape.kv_width, bias=False)
        self.o = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        if self.rotates:
            cos, sin = (t.to(q.dtype) for t in _angles(x.shape[1], self.head_size, x.device))
            q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


@lru_cache(maxsize=8)
def _angles(seq_len: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles (Su et al. 2021), `(S, E / 2)` each."""
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=device) / head_size)
    angles = torch.outer(torch.arange(seq_len, device=device), frequencies)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x (B, heads, S, E)` with each pair `(x[i], x[i + E / 2])` turned by its angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class _FeedForward(nn.Module):
    """A gated feed-forward part (SwiGLU, Shazeer 2020), or one with GELU."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        gated = shape.activation == "swiglu"
        self.gate = nn.Linear(shape.hidden, shape.ffn, bias=False) if gated else None
        self.up = nn.Linear(shape.hidden, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(wide)
        return out


class RandomTokens(Dataset[tuple[Tensor, Tensor]]):
    """Samples of `seq_len` random tokens with the next ones as targets, each drawn from seed and index."""

    def __init__(self, samples: int, seq_len: int, vocab: int, seed: int) -> None:
        self._samples, self._seq_len, self._vocab, self._seed = samples, seq_len, vocab, seed

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        tokens = torch.randint(self._vocab, (self._seq_len + 1,), generator=generator)
        return tokens[:-1], tokens[1:]
