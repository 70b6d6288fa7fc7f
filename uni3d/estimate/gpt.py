"""The shape of a GPT: derived from a number of parameters, and the tensors that follow from it.

Modules, names and options are those of `examples/megatron_gpt/model.py`. The defaults are Llama's: RMS norms,
rotary positions, SwiGLU, an untied output head, no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

TOLERANCE = 0.02
"""Largest relative error of a derived shape's number of parameters."""

VOCAB = 32000
"""Vocabulary of Llama 2."""
KV_HEADS = 8
"""KV heads of Llama 2 70B and of all Llama 3 models."""
LAYERS_PER_HIDDEN = 80 / 8192
FFN_PER_HIDDEN = 3.5
"""Proportions of Llama 2 70B (Touvron et al. 2023): 80 layers, hidden size 8192, feed-forward size 28672."""

EMBEDDING = "tokens.weight"
"""Name of the embedding's weight in the link `embed`. A tied head shares it."""

Size = int | None
"""A size of the shape, or None to derive it."""
_SIZES = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "max_seq_len")


class Weight(NamedTuple):
    """A parameter of one link of the chain."""

    name: str
    """Name within the link."""
    shape: tuple[int, ...]
    tp_dim: int | None
    """Dim that tensor parallelism cuts; None if every rank holds the whole weight."""
    same_as: str | None = None
    """Full name of the parameter that this one shares, if tied."""


class Link(NamedTuple):
    """One link of the chain that pipeline stages are cut from."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def cost(self) -> int:
        """Cost as in `parallel.stages`: elements of the matrices. An embedding's lookup costs nothing."""
        matrices = (prod(w.shape) for w in self.weights if len(w.shape) >= 2)
        return 1 + (0 if self.name == "embed" else sum(matrices))


@dataclass(frozen=True, kw_only=True)
class GPTShape:
    """Sizes and kinds that define a GPT's tensors."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Literal["swiglu", "gelu"] = "swiglu"
    tied_head: bool = False
    """True if the output head shares the embedding's weight."""
    max_seq_len: int = 1024
    """Rows of the table of learned positions."""

    def __post_init__(self) -> None:
        """Raises ValueError if no model can have this shape."""
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{_option(name)} {getattr(self, name)} must be at least 1")
        if self.hidden % self.heads:
            raise ValueError(f"{self.heads} heads don't divide --hidden {self.hidden}; change --heads")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv heads don't divide {self.heads} heads; change --kv-heads")

    def __str__(self) -> str:
        sizes = f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads, {self.kv_heads} kv heads"
        kinds = [self.norm, self.positions, self.activation, *["tied head"] * self.tied_head]
        unusual = [kind for kind in kinds if kind not in ("rmsnorm", "rotary", "swiglu")]
        return ", ".join([sizes, f"ffn {self.ffn}, vocab {self.vocab}", *unusual])

    @property
    def links(self) -> tuple[Link, ...]:
        """The chain of layers, in the order of execution."""
        return _links(self)

    @property
    def parameters(self) -> int:
        """Number of parameters. A tied weight counts once."""
        shallow = _links(replace(self, layers=1))  # there may be thousands of layers, all with one size
        own = [weight for link in shallow for weight in link.weights if not weight.same_as]
        return sum(prod(weight.shape) for weight in own) + (self.layers - 1) * self.per_layer

    @property
    def per_layer(self) -> int:
        return sum(prod(weight.shape) for weight in self._block())

    @property
    def kv_width(self) -> int:
        """Number of features of the keys, and of the values."""
        return self.hidden // self.heads * self.kv_heads

    def _norm(self, prefix: str) -> tuple[Weight, ...]:
        names = ["weight", "bias"] if self.norm == "layernorm" else ["weight"]
        return tuple(Weight(prefix + name, (self.hidden,), None) for name in names)

    def _block(self) -> tuple[Weight, ...]:
        wide, kv = self.hidden, self.kv_width
        gate = [Weight("ffn.gate.weight", (self.ffn, wide), 0)] if self.activation == "swiglu" else []
        return (
            *self._norm("attn_norm."),
            Weight("attn.q.weight", (wide, wide), 0),
            Weight("attn.k.weight", (kv, wide), 0),
            Weight("attn.v.weight", (kv, wide), 0),
            Weight("attn.o.weight", (wide, wide), 1),
            *self._norm("ffn_norm."),
            *gate,
            Weight("ffn.up.weight", (self.ffn, wide), 0),
            Weight("ffn.down.weight", (wide, self.ffn), 1),
        )

    def check_tensor_parallel(self, tp: int) -> None:
        """Raises ValueError if `tp` doesn't divide heads and features. It may cut the vocabulary unevenly."""
        for name, noun in {"heads": "heads", "kv_heads": "kv heads", "ffn": "ffn features"}.items():
            size = getattr(self, name)
            if size % tp:
                raise ValueError(
                    f"tp({tp}) doesn't divide the {size} {noun}; give another --tp or {_option(name)}"
                )


@lru_cache
def _links(shape: GPTShape) -> tuple[Link, ...]:
    matrix, block = (shape.vocab, shape.hidden), shape._block()
    learned = Weight("positions.weight", (shape.max_seq_len, shape.hidden), 0)
    tied = f"embed.{EMBEDDING}" if shape.tied_head else None
    return (
        Link("embed", (Weight(EMBEDDING, matrix, 0), *([learned] if shape.positions == "learned" else []))),
        *(Link(f"layers.{i}", block) for i in range(shape.layers)),
        Link("norm", shape._norm("")),
        Link("head", (Weight("weight", matrix, 0, tied),)),
    )


def from_model_config(model: Mapping[str, Any]) -> GPTShape:
    """Return the shape that fields of the example's `GPTConfig` describe, with its defaults for the others.

    Raises:
        ValueError: a field is unknown, or its value invalid.
    """
    given = {**_EXAMPLE_DEFAULTS, **model}
    if unknown := sorted(given.keys() - _EXAMPLE_DEFAULTS.keys()):
        raise ValueError(f"model.{unknown[0]} isn't a field of the example's GPTConfig; remove it")
    fields = ("hidden_size", "num_heads", "num_layers", "vocab_size", "max_seq_len")
    optional = [name for name in ("num_kv_heads", "ffn_size") if given[name] is not None]
    for name in (*fields, *optional):
        if not isinstance(given[name], int) or isinstance(given[name], bool):
            raise ValueError(f"model.{name} is {given[name]!r}; expected a whole number")
    kinds = {name: given[name] for name in ("norm", "positions", "activation", "tied_head")}
    for name, value in kinds.items():
        known = get_args(_HINTS[name]) or (False, True)
        if value not in known:
            raise ValueError(f"model.{name} is {value!r}; expected one of {', '.join(map(repr, known))}")
    hidden, heads, ffn = given["hidden_size"], given["num_heads"], given["ffn_size"]
    if ffn is None:
        ffn = 4 * hidden if given["activation"] == "gelu" else ceil(hidden * 8 / 3 / 32) * 32
    return GPTShape(
        layers=given["num_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads if given["num_kv_heads"] is None else given["num_kv_heads"],
        ffn=ffn,
        vocab=given["vocab_size"],
        max_seq_len=given["max_seq_len"],
        **kinds,
    )


_HINTS = get_type_hints(GPTShape)
_EXAMPLE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": None,
    "ffn_size": None,
    "max_seq_len": 1024,
    "norm": "rmsnorm",
    "positions": "rotary",
    "activation": "swiglu",
    "tied_head": False,
    "rope_base": 10000.0,
    "norm_eps": 1e-5,
    "init_std": 0.02,
}


def derive(
    parameters: Size,
    *,
    layers: Size = None,
    hidden: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    ffn: Size = None,
    vocab: Size = None,
) -> GPTShape:
    """Return a shape with about `parameters` parameters, within `TOLERANCE`.

    Given sizes are kept. The others follow these rules:

    1. The vocabulary is 32,000.
    2. The hidden size is the one that comes closest to `parameters` with Llama 2 70B's proportions. It is a
       multiple of 1024 (from 4096 on), of 512 (from 512 on) or of 64, and leaves room for a layer.
    3. Heads are 128 wide (from hidden size 4096 on) or 64. There are 8 kv heads if 8 divides the heads.
    4. The feed-forward size is 3.5 times the hidden size. As many layers as fit, in multiples of four.
    5. If the number is still off by more than the tolerance, the feed-forward size is adjusted in steps of a
       sixteenth of the hidden size.

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
            f"--params {parameters:,}; change --params, --vocab or the sizes that you gave"
        )
    return found


def _by_rules(hidden: int, layers: Size, ffn: Size, *, heads: Size, kv_heads: Size, vocab: Size) -> GPTShape:
    """Return the shape with missing sizes derived from the hidden size."""
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
