"""Draw pipeline schedules as they ran: four stages on four ranks, with layers that sleep and compute little.

    python benchmarks/schedule.py docs/images/schedules.png

The engine, torch's schedules, the passing of activations over gloo and the optimizer step are real. A layer
sleeps for a given time in its forward pass, for its input's gradient and for its weight's gradient, so that
ranks that share a few cores take as long as if each had its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import uni3d  # noqa: E402
from uni3d.bench.local_ranks import run_ranks  # noqa: E402
from uni3d.bench.measure import timed_passes  # noqa: E402
from uni3d.plot.schedule import draw_schedules  # noqa: E402

RANKS, LAYERS, MICRO_BATCHES, WIDTH = 4, 8, 8, 8
SCHEDULES = {
    "gpipe": ("GPipe", 1),
    "1f1b": ("1F1B", 1),
    "interleaved": ("interleaved 1F1B, 2 virtual stages", 2),
    "zero_bubble": ("zero bubble", 1),
}


class _SlowGradient(torch.autograd.Function):
    """Identity whose backward pass sleeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class Paced(nn.Module):
    """Linear layer whose forward pass and two gradients take `seconds` each."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.eye(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        if not torch.is_grad_enabled():
            return x @ self.weight
        weight = _SlowGradient.apply(self.weight, self.seconds)
        return _SlowGradient.apply(x, self.seconds) @ weight


class Chain(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Paced(seconds) for _ in range(LAYERS))

    @property
    def pipeline_layers(self) -> list[str]:
        return [f"layers.{i}" for i in range(LAYERS)]

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        return (outputs - targets).square().sum(), targets.numel()


def passes(schedule: str, virtual_stages: int, seconds: float) -> list[dict[str, Any]]:
    """Take two steps on this rank; return the passes of the second."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "parallel": {
            "pp": RANKS,
            "schedule": schedule,
            "virtual_stages": virtual_stages,
            "balance": "uniform",
            "device": "cpu",
        },
        "steps_per_print": None,
    }
    data = torch.utils.data.TensorDataset(
        torch.randn(MICRO_BATCHES, WIDTH), torch.randn(MICRO_BATCHES, WIDTH)
    )
    engine = uni3d.initialize(model=Chain(seconds), training_data=data, config=config)[0]
    engine.train_batch()
    return timed_passes(engine)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, metavar="FILE.png")
    parser.add_argument("--ms", type=float, default=15.0, help="of each layer's three parts")
    args = parser.parse_args()
    panels = {}
    for schedule, (title, virtual_stages) in SCHEDULES.items():
        panels[title] = run_ranks(passes, RANKS, schedule, virtual_stages, args.ms / 1e3)
        ends = [
            one["end"] for rank in panels[title] for one in rank if one["part"] in ("backward", "weights")
        ]
        begins = [one["begin"] for rank in panels[title] for one in rank if one["part"] == "forward"]
        work = 3 * args.ms * LAYERS // RANKS * MICRO_BATCHES
        took = 1e3 * (max(ends) - min(begins))
        print(f"{title}: {took:.0f} ms from the first pass to the last; {work:.0f} ms of work on each rank")
    draw_schedules(panels, args.picture, force=True)


if __name__ == "__main__":
    main()
