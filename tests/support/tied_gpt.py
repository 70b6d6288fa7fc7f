"""Engine of the example's GPT on any topology, with a tied head by default."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from model import GPT, GPTConfig

import uni3d

TIED = oracle.MODEL | {"tied_head": True}


def gpt_engine(
    pp: int, dp: int, tp: int, zero: int, *, sizes: dict[str, Any] = TIED, **config: Any
) -> uni3d.Engine:
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    settings = oracle.SETTINGS | {
        "parallel": {"pp": pp, "dp": dp, "tp": tp, "device": "cpu"},
        "zero_optimization": {"stage": zero},
        "gradient_accumulation_steps": 2,
    }
    data = torch.utils.data.TensorDataset(*oracle.samples())
    engine: uni3d.Engine = uni3d.initialize(model=model, training_data=data, config=settings | config)[0]
    return engine
