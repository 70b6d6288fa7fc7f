"""The GPT that the programs train, with weights that are quick to fill, and a file for their figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import uni3d
from benchmarks.training import task

from model import GPT, GPTConfig  # isort: skip  # `task` makes it importable


class QuickGPT(GPT):
    """A GPT for measurements in which values don't matter: drawing billions of them takes minutes."""

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(0.02)


def make_engine(options: dict[str, Any], config: dict[str, Any], device: str, precision: str) -> Any:
    """Make an engine with AdamW, for micro batches of one sample."""
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is fp32, as the example's script sets it
    with torch.device("meta"):
        model = QuickGPT(GPTConfig(**options))
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": task.CLIP,
        "bf16": {"enabled": precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": task.ADAMW},
        "parallel": {"device": device},
        "steps_per_print": None,
    }
    return uni3d.initialize(model=model, config=base | config)[0]


def train_step(engine: Any, vocabulary: int, seq_len: int) -> None:
    tokens = torch.randint(vocabulary, (1, seq_len + 1))
    engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:])]))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write figures so far: whoever ends this process reads whole ones."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(figures))
    os.replace(partial, path)
