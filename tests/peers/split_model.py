"""A model split by hand like Megatron's: columns, rows, vocabulary, two fused matrices."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

HIDDEN = 6
INNER = 10
VOCABULARY = 13
PADDED = 14
"""Rows of the embedding, a multiple of the tensor-parallel degree. Those from VOCABULARY on are padding."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Tensor-parallel group of a rank."""

    group: Any
    rank: int
    size: int


class Copied(torch.autograd.Function):
    """Identity in the forward pass; sums gradients over the ranks in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.split.group)
        return gradient, None


class Summed(torch.autograd.Function):
    """Sums over the ranks in the forward pass; identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        x = x.clone().contiguous()
        dist.all_reduce(x, group=split.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Joined(torch.autograd.Function):
    """Concatenates last dims over the ranks in the forward pass; takes the own part in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Split) -> Tensor:
        ctx.split = split
        parts = [torch.empty_like(x) for _ in range(split.size)]
        dist.all_gather(parts, x.contiguous(), group=split.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.split.size, dim=-1)[ctx.split.rank].contiguous(), None


def part(split: Split, seed: int, *shape: int, dim: int | None, pieces: int = 1) -> nn.Parameter:
    """Return this rank's shard, along `dim`, of a random matrix, or of each of its fused pieces."""
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / HIDDEN**0.5
    if dim is not None:
        mine = [piece.chunk(split.size, dim=dim)[split.rank] for piece in whole.chunk(pieces, dim=dim)]
        whole = torch.cat(mine, dim=dim).contiguous()
    parameter = nn.Parameter(whole)
    if dim is not None and split.size > 1:
        parameter.model_parallel = parameter.tensor_model_parallel = True  # for DeepSpeed's norms
    parameter.cut = (dim, pieces)
    return parameter


def merged(parts: list[Tensor], cut: tuple[int | None, int]) -> Tensor:
    """Return the whole matrix that `part` split."""
    dim, pieces = cut
    if dim is None:
        assert all(torch.equal(parts[0], other) for other in parts)
        return parts[0]
    each = zip(*(p.chunk(pieces, dim=dim) for p in parts), strict=True)
    return torch.cat([torch.cat(piece, dim=dim) for piece in each], dim=dim).contiguous()


class Embedding(nn.Module):
    """Embedding whose rows are split over the ranks."""

    def __init__(self, split: Split, seed: int) -> None:
        super().__init__()
        self.split = split
        self.weight = part(split, seed, PADDED, HIDDEN, dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = len(self.weight)
        local = tokens - self.split.rank * rows
        mine = (local >= 0) & (local < rows)
        return Summed.apply(self.weight[local * mine] * mine.unsqueeze(-1), self.split)


def logits(embedding: Embedding, hidden: Tensor) -> Tensor:
    """Head tied to the embedding."""
    hidden = Copied.apply(hidden, embedding.split)
    return Joined.apply(hidden @ embedding.weight.t(), embedding.split)


class Block(nn.Module):
    """Gate and values fused in a column-parallel matrix, then a row-parallel one; a frozen shift."""

    def __init__(self, split: Split, seed: int) -> None:
        super().__init__()
        self.split = split
        self.norm = nn.LayerNorm(HIDDEN)
        self.gate_up = part(split, seed, 2 * INNER, HIDDEN, dim=0, pieces=2)
        self.gate_up_bias = part(split, seed + 1, 2 * INNER, dim=0, pieces=2)
        self.down = part(split, seed + 2, HIDDEN, INNER, dim=1)
        self.down_bias = part(split, seed + 3, HIDDEN, dim=None)
        self.shift = part(split, seed + 4, HIDDEN, dim=None)
        self.shift.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        inputs = Copied.apply(self.norm(x) * self.scale.to(x.dtype) + self.shift, self.split)
        gate, up = nn.functional.linear(inputs, self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        down = Summed.apply(nn.functional.linear(torch.sigmoid(gate) * up, self.down), self.split)
        return x + down + self.down_bias


class Model(nn.Module):
    """The whole model, without a pipeline."""

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.embed = Embedding(split, 1)
        self.blocks = nn.ModuleList([Block(split, 10), Block(split, 20)])
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return loss(logits(self.embed, self.norm(x)), labels)


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.float(), labels)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two groups: matrices with weight decay, the rest without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
