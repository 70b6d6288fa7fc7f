"""The work of one arm: the example's GPT, its samples, its optimizer. Every library gets the same.

Needs torch and the example's model alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "megatron_gpt"))

from model import GPT, GPTConfig, next_token_loss

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 384, "num_layers": 6, "num_heads": 6}
TINY: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_layers": 4, "num_heads": 2}
ADAMW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAVE_EVERY = 10
Batch = list[tuple[Tensor, Tensor]]
"""Inputs and targets of a rank's micro batches in one step."""


def shape(config: str | None, *, tiny: bool = False) -> tuple[dict[str, Any], int]:
    """Return options of the model, and the length of its sequences.

    `config` is a file of the example's configs; without one, the model is a small GPT or a tiny one.
    """
    if config is not None:
        read = json.loads((ROOT / "examples" / "megatron_gpt" / "configs" / config).read_text())
        return read["model"], read["seq_len"]
    return (TINY, 16) if tiny else (SMALL, 128)


@dataclass(frozen=True, kw_only=True)
class Task:
    """An arm's settings, as its processes get them."""

    library: str
    ranks: int
    zero: int
    pp: int
    tp: int
    balance: str
    schedule: str
    saves: bool | None
    options: dict[str, Any]
    """Options of the model."""
    seq_len: int
    batch: int
    """Samples in a global batch."""
    micro_batches: int
    """Micro batches of a step on each rank: more than one only in a pipeline."""
    warm_up: int
    steps: int
    """Steps that are measured, after `warm_up` others."""
    precision: str
    compile: bool
    device: str
    threads: int
    weights: str
    """File of safetensors: the model's initial weights."""
    folder: str
    """Folder where the ranks write their figures, and their checkpoints."""
    began: float
    """Time at which the processes were started."""

    @classmethod
    def from_json(cls, text: str) -> Task:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def dp(self) -> int:
        return self.ranks // (self.pp * self.tp)

    @property
    def micro_batch(self) -> int:
        """Samples in a micro batch."""
        return self.batch // (self.dp * self.micro_batches)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(**self.options)

    def meta_model(self) -> GPT:
        """Make the model on the meta device."""
        with torch.device("meta"):
            return GPT(self.config)

    @cached_property
    def _tokens(self) -> Tensor:
        """Tokens of the whole run, `(steps, samples, length + 1)`: one global order, the same on all ranks.

        Low tokens are more frequent, so that there is something to learn: the loss falls from step to step.
        """
        generator = torch.Generator().manual_seed(0)
        size = (self.warm_up + self.steps, self.batch, self.seq_len + 1)
        return (torch.rand(size, generator=generator) ** 3 * self.options["vocab_size"]).long()

    def samples(self, step: int, rank: int) -> Batch:
        """Return the micro batches of a rank: its slice of the step's global batch."""
        replica = rank % (self.dp * self.tp) // self.tp  # ranks are arange(world).view(pp, dp, tp)
        mine = self._tokens[step].chunk(self.dp)[replica].to(self.device)
        parts = mine.chunk(self.micro_batches)
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the tokens, in fp32."""
    total, count = next_token_loss(logits.float(), targets)
    return total / count


def out_of_memory(error: BaseException | None) -> str | None:
    """Return the first line of a GPU's lack of memory, if that is the error or a cause of it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def write_weights(path: Path, options: dict[str, Any]) -> None:
    """Draw the model's initial weights, and write them to a file of safetensors."""
    from safetensors.torch import save_file

    model = GPT(GPTConfig(**options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            model.init_parameter(name, parameter, generator)
    save_file({name: p.detach() for name, p in model.named_parameters()}, path)
