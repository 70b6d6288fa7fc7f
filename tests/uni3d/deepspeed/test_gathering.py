"""`deepspeed.zero`: parameters gathered between steps, at every ZeRO stage, are plain PyTorch's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from marks import STAGES, slow
from models import ADAM, WIDTH, Stack, assert_same, global_batches, micro_batches, seeded, train, train_plainly
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uni3d.deepspeed as deepspeed

Z = deepspeed.zero


class Wide(Stack):
    """Chain whose layers can be split over tensor-parallel ranks."""

    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(2)
        self.layers = nn.ModuleList(Pair() for _ in range(2))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def make(model: nn.Module, stage: int, tp: int = 1, **more: Any) -> Any:
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": ADAM,
        "parallel": {"device": "cpu", "tp": tp},
        "zero_optimization": {"stage": stage},
    }
    return deepspeed.initialize(model=model, config=config | more)[0]


def whole_now(engine: Any) -> dict[str, Tensor]:
    return {name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}


def change(model: nn.Module) -> None:
    """Write to parameters in each of the ways that scripts do."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(model.named_parameters()):
            if number % 3 == 0:
                parameter.mul_(0.5)
            elif number % 3 == 1:
                parameter.data.copy_(parameter.data + 0.1)
            else:
                parameter.data = parameter.data.clone() * 0.9


def written_case(kind: str, stage: int, tp: int, source: int | None) -> None:
    """Parameters held from before are whole and plain inside, and what is written trains on."""
    model = seeded(Stack if kind == "Stack" else Wide)
    _, _, oracle = train_plainly(model, global_batches(2), loss=lambda y, t: (y - t).square().mean())
    engine = make(model, stage, tp)
    train(engine, global_batches(2))
    held = dict(engine.module.named_parameters())
    kinds = {name: type(parameter) for name, parameter in held.items()}
    with Z.GatheredParameters(engine.module.parameters(), modifier_rank=source):
        for name, parameter in held.items():
            assert isinstance(parameter, nn.Parameter) and not isinstance(parameter, DTensor)
            assert parameter is engine.module.get_parameter(name)
            torch.testing.assert_close(parameter.data, oracle.get_parameter(name).data, rtol=1e-5, atol=1e-6)
        if source in (None, engine.global_rank):
            change(engine.module)
    change(oracle)
    assert {name: type(parameter) for name, parameter in engine.module.named_parameters()} == kinds
    assert_same(whole_now(engine), oracle)
    for x, y in global_batches(1, seed=5):
        expected = (oracle(x) - y).square().mean()
    assert train(engine, global_batches(1, seed=5))[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("source", [0, slow(1), None])
@pytest.mark.parametrize("stage", STAGES)
def test_writes_inside_count(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(2, written_case, "Stack", stage, 1, source)


@pytest.mark.parametrize("source", [slow(0), 1, None])
@pytest.mark.parametrize("stage", STAGES)
def test_writes_with_tensor_parallelism(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(2, written_case, "Wide", stage, 2, source)


@pytest.mark.parametrize("source", [slow(0), 3, None])
@pytest.mark.parametrize("stage", [slow(1), 3])
def test_writes_with_both(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(4, written_case, "Wide", stage, 2, source)
