"""The shape of a Llama-like GPT: from a number of parameters, and what tensors it is made of.

The same modules under the same names as `examples/megatron_gpt/model.py` has them: RMS norms, rotary
positions, SwiGLU, grouped-query attention, an output head of its own, no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import NamedTuple

TOLERANCE = 0.02
"""How far a derived shape's number of parameters may be from the one that was asked for."""

VOCAB = 32000
"""Llama 2's."""
KV_HEADS = 8
"""Llama 2 70B's, and all of Llama 3's."""
LAYERS_PER_HIDDEN = 80 / 8192
FFN_PER_HIDDEN = 3.5
"""Both are the proportions of Llama 2 70B (Touvron et al. 2023): 80 layers, hidden size 8192, 28672."""


class Weight(NamedTuple):
    """A parameter of one link of the chain."""

    name: str
    """Below the link's."""
    shape: tuple[int, ...]
    tp_dim: int | None
    """Which dim tensor parallelism cuts; None for what every rank of its axis holds whole."""


class Link(NamedTuple):
    """One link of the chain that pipeline stages are cut from."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def cost(self) -> int:
        """As `parallel.stages` counts: the elements of its matrices; looking up an embedding costs none."""
        matrices = (prod(w.shape) for w in self.weights if len(w.shape) >= 2)
        return 1 + (0 if self.name == "embed" else sum(matrices))


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    def __post_init__(self) -> None:
        """Raises ValueError where no model can have this shape."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{_option(name)} {value} must be at least 1")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads don't divide --hidden {self.hidden}; give --heads that do")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.kv_heads} kv heads don't divide {self.heads} heads; give --kv-heads that do"
            )

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, {self.kv_heads} kv heads, "
            f"ffn {self.ffn}, vocab {self.vocab}"
        )

    @property
    def links(self) -> list[Link]:
        """The chain, in the order in which it runs."""
        matrix, block = (self.vocab, self.hidden), self._block()
        return [
            Link("embed", (Weight("tokens.weight", matrix, 0),)),
            *(Link(f"layers.{i}", block) for i in range(self.layers)),
            Link("norm", (Weight("weight", (self.hidden,), None),)),
            Link("head", (Weight("weight", matrix, 0),)),
        ]

    @property
    def parameters(self) -> int:
        return (2 * self.vocab + 1) * self.hidden + self.layers * self.per_layer

    @property
    def per_layer(self) -> int:
        return sum(prod(weight.shape) for weight in self._block())

    def _block(self) -> tuple[Weight, ...]:
        wide, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return (
            Weight("attn_norm.weight", (wide,), None),
            Weight("attn.q.weight", (wide, wide), 0),
            Weight("attn.k.weight", (kv, wide), 0),
            Weight("attn.v.weight", (kv, wide), 0),
            Weight("attn.o.weight", (wide, wide), 1),
            Weight("ffn_norm.weight", (wide,), None),
            Weight("ffn.gate.weight", (self.ffn, wide), 0),
            Weight("ffn.up.weight", (self.ffn, wide), 0),
            Weight("ffn.down.weight", (wide, self.ffn), 1),
        )

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises ValueError if `tp` doesn't divide what it cuts; the vocabulary may be cut unevenly."""
        for name, what in {"heads": "heads", "kv_heads": "kv heads", "ffn": "ffn features"}.items():
            size = getattr(self, name)
            if size % tp:
                raise ValueError(
                    f"tp({tp}) doesn't divide the {size} {what}; give another --tp or {_option(name)}"
                )


def derive(
    parameters: int | None,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    vocab: int | None = None,
) -> GPTShape:
    """A shape of about `parameters`, within `TOLERANCE`. What is given is kept; the rest follows rules:

    1. the vocabulary is 32,000;
    2. the hidden size is that with which Llama 2 70B's proportions come nearest, out of the multiples of 1024
       (from 4096 on), of 512 (from 512 on) and of 64 that leave room for a layer;
    3. heads are 128 wide (from hidden size 4096 on) or 64; there are 8 kv heads if 8 divides the heads;
    4. the feed-forward size is 3.5 times the hidden size, and there are as many layers as fit, in fours;
    5. if the number is still off by more than the tolerance, the feed-forward size is the one that fits, in
       steps of a sixteenth of the hidden size.

    Raises:
        ValueError: there is no such shape, or too little is given.
    """
    if parameters is None and (layers is None or hidden is None):
        raise ValueError("give --params, or the shape: at least --layers and --hidden")
    given = {"params": parameters, "layers": layers, "hidden": hidden, "heads": heads, "ffn": ffn}
    for name, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")

    shape = partial(_by_rules, heads=heads, kv_heads=kv_heads, vocab=vocab)
    if parameters is None:
        assert hidden is not None
        return shape(hidden, layers, ffn)
    if hidden is None:
        widths = [w for w in _WIDTHS if w % (heads or 1) == 0] or [heads or 1]
        with_room = [w for w in widths if shape(w, 1, ffn).parameters <= parameters] or widths[:1]
        hidden = min(with_room, key=lambda w: _ratio(shape(w, layers, ffn).parameters, parameters))
    if layers is None:
        one = shape(hidden, 1, ffn)
        fitting, unit = 1 + (parameters - one.parameters) / one.per_layer, 4 if ffn is None else 1
        layers = max(1, unit * round(fitting / unit))
    found = shape(hidden, layers, ffn)
    if ffn is None and _ratio(found.parameters, parameters) > 1 + TOLERANCE:
        missing, step = (parameters - found.parameters) / (3 * hidden * layers), max(1, hidden // 16)
        found = shape(hidden, layers, max(1, round((found.ffn + missing) / step)) * step)
    if abs(found.parameters / parameters - 1) > TOLERANCE:
        raise ValueError(
            f"the nearest shape ({found}) has {found.parameters:,} parameters, more than {TOLERANCE:.0%} off "
            f"--params {parameters:,}; change --params, or what you gave of the shape, or --vocab"
        )
    return found


def _by_rules(
    hidden: int,
    layers: int | None,
    ffn: int | None,
    *,
    heads: int | None,
    kv_heads: int | None,
    vocab: int | None,
) -> GPTShape:
    """What isn't given follows from the hidden size."""
    heads = max(1, hidden // (128 if hidden >= 4096 else 64)) if heads is None else heads
    return GPTShape(
        layers=max(1, round(LAYERS_PER_HIDDEN * hidden)) if layers is None else layers,
        hidden=hidden,
        heads=heads,
        kv_heads=(KV_HEADS if heads % KV_HEADS == 0 else heads) if kv_heads is None else kv_heads,
        ffn=round(FFN_PER_HIDDEN * hidden) if ffn is None else ffn,
        vocab=VOCAB if vocab is None else vocab,
    )


_WIDTHS = [*range(64, 512, 64), *range(512, 4096, 512), *range(4096, 1 << 17, 1024)]


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
