"""Fused projections, and norms with a row for each head, train and resume on any topology."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import adamw
from ranks import Ranks
from torch import Tensor, nn

import uni3d

WIDTH, HEAD, STEPS, BATCH = 16, 4, 4, 8


class HeadNorm(nn.Module):
    """Norm over each head, with weights of its own for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH).view(WIDTH // HEAD, HEAD))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (HEAD,)) * self.weight


class Layer(nn.Module):
    head_dim = HEAD

    def __init__(self) -> None:
        super().__init__()
        self.up, self.q, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), HeadNorm()
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        heads = self.norm(self.q(x).unflatten(-1, (-1, HEAD))).flatten(-2)
        return x + self.down(F.silu(gate) * up * heads)


class Net(nn.Module):
    tp_plan = {"layers.*.up": "colwise", "layers.*.q": "colwise", "layers.*.down": "rowwise"}  # noqa: RUF012
    tp_parts = {"layers.*.up": 2}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.mse_loss(x, y)


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(BATCH, 3, WIDTH, generator=generator), torch.randn(BATCH, 3, WIDTH, generator=generator))
        for _ in range(STEPS)
    ]


def engine_of(dp: int, tp: int, zero: int) -> uni3d.Engine:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1, "eps": 0.01}},
        "gradient_clipping": 0.0,
        "parallel": {"dp": dp, "tp": tp, "device": "cpu"},
        "zero_optimization": {"stage": zero},
    }
    engine: uni3d.Engine = uni3d.initialize(model=net(), config=config)[0]
    return engine


def steps_case(run: str, first: int, last: int, dp: int, tp: int, zero: int) -> dict[str, Tensor]:
    """Resume, take the steps from the first to the last, and save."""
    engine = engine_of(dp, tp, zero)
    engine.resume(run)
    share = BATCH // dp
    start = engine.model.topology.dp_rank * share
    for x, y in batches()[first:last]:
        engine.train_batch(iter([(x[start : start + share], y[start : start + share])]))
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    return engine.module_state_dict()


@pytest.mark.slow
def test_resumes_on_other_topologies(ranks: Ranks, tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model.parameters())
    expected = []
    for x, y in batches():
        model(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append({name: p.detach().clone() for name, p in model.named_parameters()})
    run = str(tmp_path / "run")
    for first, last, (dp, tp, zero) in ((0, 2, (2, 2, 3)), (2, 3, (1, 1, 0)), (3, 4, (1, 2, 1))):
        for found in ranks.run(dp * tp, steps_case, run, first, last, dp, tp, zero):
            for name, parameter in expected[last - 1].items():
                torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-5, msg=name)
