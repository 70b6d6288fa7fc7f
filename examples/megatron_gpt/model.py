"""A modern GPT in one file: plain PyTorch, no uni3d import.

The model is a chain: `embed -> layers.0 -> ... -> layers.N-1 -> norm -> head`, each link taking the
previous link's output and nothing else. That is all a pipeline needs, and `pipeline_layers` says it.
`tp_plan` says how tensor parallelism splits each projection. Neither mentions a rank.

Shapes in comments: B batch, S sequence, D hidden size, H query heads, K key/value heads, E head size,
F feed-forward size, V vocabulary. Under tensor parallelism H, K and F are this rank's part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that shapes a `GPT`. The defaults make a small Llama-like model."""

    vocab_size: int = 256
    """V; 256 for byte-level text."""
    hidden_size: int = 128
    """D, the width of the residual stream."""
    num_layers: int = 4
    num_heads: int = 4
    """H. The head size is `hidden_size / num_heads`."""
    num_kv_heads: int | None = None
    """K, for grouped-query attention; None means one per query head."""
    ffn_size: int | None = None
    """F; None means 4 D for GELU, and 8/3 D rounded up to a multiple of 32 for SwiGLU."""
    max_seq_len: int = 1024
    """The longest sequence; it sizes the table of learned positions."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    tied_head: bool = False
    """True if the output head shares the embedding's weight."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of every weight matrix at the start; those that write into the residual
    stream get `init_std / sqrt(2 * num_layers)` (GPT-2, Radford et al. 2019, section 2.3)."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size({self.hidden_size}) must be divisible by num_heads({self.num_heads})"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads({self.num_heads}) must be divisible by num_kv_heads({self.kv_heads})"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, got {self.head_size}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def ffn(self) -> int:
        if self.ffn_size is not None:
            return self.ffn_size
        if self.activation == "gelu":
            return 4 * self.hidden_size
        return math.ceil(self.hidden_size * 8 / 3 / 32) * 32


def make_norm(config: GPTConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


@lru_cache(maxsize=8)
def rotary_table(seq_len: int, head_size: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each `(S, E/2)` (RoFormer, Su et al. 2021, equation 34)."""
    with torch.inference_mode(False):  # it is kept, and may be wanted for training later
        frequency = base ** (-torch.arange(0, head_size, 2, device=device) / head_size)
        angle = torch.outer(torch.arange(seq_len, device=device), frequency)
        return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs `(x[i], x[i + E/2])` of `x (B, heads, S, E)` by their position's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Embedding(nn.Module):
    """Token ids `(B, S)` to vectors `(B, S, D)`, with learned positions added where the config has them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = (
            nn.Embedding(config.max_seq_len, config.hidden_size) if config.positions == "learned" else None
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens)
        if self.positions is None:
            return x
        positions: Tensor = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return x + positions


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, `(B, S, D) -> (B, S, D)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.rope_base = config.rope_base if config.positions == "rotary" else None
        heads, kv_heads, size = config.num_heads, config.kv_heads, config.head_size
        self.q = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.v = nn.Linear(config.hidden_size, kv_heads * size, bias=False)
        self.o = nn.Linear(heads * size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape

        def heads(y: Tensor) -> Tensor:  # (B, S, heads * E) -> (B, heads, S, E), whatever number is local
            return y.view(batch, seq, -1, self.head_size).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.rope_base is not None:
            cos, sin = rotary_table(seq, self.head_size, self.rope_base, x.device)
            q, k = rotate(q, cos.to(q.dtype), sin.to(q.dtype)), rotate(k, cos.to(k.dtype), sin.to(k.dtype))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        out: Tensor = self.o(y.transpose(1, 2).reshape(batch, seq, -1))
        return out


class FeedForward(nn.Module):
    """`down(act(up(x)))`, or with SwiGLU (Shazeer 2020) `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.gate = nn.Linear(config.hidden_size, config.ffn, bias=False) if gated else None
        self.up = nn.Linear(config.hidden_size, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(hidden)
        return out


class Block(nn.Module):
    """One pre-norm transformer layer, `(B, S, D) -> (B, S, D)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config)
        self.ffn_norm = make_norm(config)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class GPT(nn.Module):
    """Token ids `(B, S)` to logits `(B, S, V)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.tokens.weight

    @property
    def pipeline_layers(self) -> list[str]:
        """Names of the pipeline's layers, in the order in which they run."""
        return ["embed", *(f"layers.{i}" for i in range(self.config.num_layers)), "norm", "head"]

    @property
    def tp_plan(self) -> dict[str, str]:
        """Module pattern -> tensor-parallel style, in the manner of Hugging Face's `tp_plan`."""
        optional = {}
        if self.config.activation == "swiglu":
            optional["layers.*.ffn.gate"] = "colwise"
        if self.config.positions == "learned":
            optional["embed.positions"] = "embedding_rowwise"
        return optional | {
            "embed.tokens": "embedding_rowwise",
            "layers.*.attn_norm": "sequence_parallel",
            "layers.*.attn": "gather_input",
            "layers.*.attn.q": "colwise",
            "layers.*.attn.k": "colwise",
            "layers.*.attn.v": "colwise",
            "layers.*.attn.o": "rowwise",
            "layers.*.ffn_norm": "sequence_parallel",
            "layers.*.ffn": "gather_input",
            "layers.*.ffn.up": "colwise",
            "layers.*.ffn.down": "rowwise",
            "norm": "sequence_parallel",
            "head": "colwise_logits",
        }

    @property
    def tp_units(self) -> dict[str, int]:
        """Number of indivisible parts of a split dimension, where it isn't the dimension's size."""
        heads, kv_heads = self.config.num_heads, self.config.kv_heads
        return {
            "layers.*.attn.q": heads,
            "layers.*.attn.k": kv_heads,
            "layers.*.attn.v": kv_heads,
            "layers.*.attn.o": heads,
        }

    @property
    def hugging_face(self) -> dict[str, Any] | None:
        """The model's Hugging Face description: `config.json` and parameter names of a Llama.

        Names map regular expressions to replacements, or to None for parameters that are left out. The
        result is None for settings that Llama doesn't have.
        """
        c = self.config
        if (c.norm, c.positions, c.activation) != ("rmsnorm", "rotary", "swiglu"):
            return None
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size,
            "intermediate_size": c.ffn,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_size,
            "max_position_embeddings": c.max_seq_len,
            "hidden_act": "silu",
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_base,  # where transformers 4 looks for it, and below where 5 does
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": c.init_std,
            "tie_word_embeddings": c.tied_head,
            "bos_token_id": None,  # tokens are bytes: none begins or ends a text
            "eos_token_id": None,
        }
        names = {
            r"embed\.tokens\.weight": "model.embed_tokens.weight",
            r"layers\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
            r"layers\.(\d+)\.attn\.([qkvo])\.weight": r"model.layers.\1.self_attn.\2_proj.weight",
            r"layers\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
            r"layers\.(\d+)\.ffn\.(gate|up|down)\.weight": r"model.layers.\1.mlp.\2_proj.weight",
            r"norm\.weight": "model.norm.weight",
            r"head\.weight": None if c.tied_head else "lm_head.weight",
        }
        return {"config": config, "names": names}

    def loss_fn(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return next_token_loss(logits, targets)

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the whole parameter `name` in place with its initial value, drawn from `generator`.

        Without views and second tensors, so that a rank need not draw more than it keeps.
        """
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith(".bias"):
            tensor.zero_()
        else:
            into_residual = name.endswith(("attn.o.weight", "ffn.down.weight"))
            scale = 1.0 / math.sqrt(2 * self.config.num_layers) if into_residual else 1.0
            tensor.normal_(0.0, self.config.init_std * scale, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy summed over the tokens, and the number of tokens.

    `logits (B, S, V)`, `targets (B, S)` with -100 where there is nothing to predict. Returning the two
    apart lets the engine take the mean over the global batch's tokens, not a mean of means.
    """
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, (targets != -100).sum()
