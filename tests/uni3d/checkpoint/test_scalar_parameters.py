"""Parameters of no dims, whose moments are single values, between trainers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

import uni3d


class Scaled(nn.Module):
    """A linear layer with scalars: one trains, one is in bf16, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.short = nn.Parameter(torch.tensor(0.3, dtype=torch.bfloat16))
        self.fixed = nn.Parameter(torch.tensor(1.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale + self.short.float() * self.fixed


def adamw(model: nn.Module) -> AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, lr=0.05, eps=0.01, foreach=False)


def step(model: nn.Module, optimizer: Optimizer, number: int) -> float:
    """Take a step on all samples, which are the same on all ranks."""
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    loss = F.mse_loss(model(inputs), inputs[:, :3])
    loss.backward()
    optimizer.step()
    return loss.item()


def wrap(kind: str, seed: float) -> tuple[Scaled, nn.Module]:
    model = Scaled()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(seed)
    if kind == "ddp":
        return model, DistributedDataParallel(model)
    if kind == "fsdp":
        fully_shard(model.layer)  # the scalars stay whole: it takes none
    return model, model


def scalar_case(run: str, kind: str, loads: bool) -> list[float]:
    _, model = wrap(kind, 1.0 if loads else 0.0)
    optimizer = adamw(model)
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer, async_save=False)
    if loads:
        keeper.load()
        return [step(model, optimizer, 2)]
    losses = [step(model, optimizer, number) for number in range(2)]
    keeper.save(2)
    return losses


@pytest.mark.parametrize(("writer", "reader"), [("plain", "ddp"), ("ddp", "fsdp")])
def test_a_scalar_goes_on(ranks: Ranks, tmp_path: Path, writer: str, reader: str) -> None:
    run, model = str(tmp_path), Scaled()
    optimizer = adamw(model)
    expected = [step(model, optimizer, number) for number in range(3)]
    before = ranks.run(1 if writer == "plain" else 2, scalar_case, run, writer, False)[0]
    assert before == pytest.approx(expected[:2], rel=1e-5)
    assert ranks.run(2, scalar_case, run, reader, True) == [pytest.approx(expected[2:], rel=1e-5)] * 2
