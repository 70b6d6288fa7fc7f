"""ZeRO: what each rank holds at each moment, to the element, and that gradients are sums over ranks."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from model import GPT, GPTConfig
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel.gradients import square_sum

DP = 3


class Net(nn.Module):
    """Sizes that 3 doesn't divide, one of them smaller than 3; two layers that are units, and a root."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5)])
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x).square().sum()


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def data() -> Tensor:
    """Two micro batches for each rank, `(2, DP, samples, features)`."""
    return torch.randn(2, DP, 4, 5, generator=torch.Generator().manual_seed(3))


def shard_size(shape: torch.Size, rank: int) -> int:
    """Elements of a rank's shard: `ceil(n / DP)` rows for the first ranks, what is left for the others."""
    rows = -(-shape[0] // DP)
    mine = max(0, min(rows, shape[0] - rank * rows))
    return mine * shape[1:].numel()


def local(tensor: Tensor) -> int:
    """Elements in this rank's memory, padding not counted."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def sizes(built: parallel.ParallelModel) -> dict[str, tuple[int, int]]:
    """What the module's parameters and their gradients hold here, as they are at the moment."""
    return {
        name: (local(p), 0 if p.grad is None else local(p.grad))
        for name, p in built.module.named_parameters()
    }


def memory_case(stage: int) -> dict[str, Any]:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=DP, tp=1), zero_stage=stage)
    built = parallel.build(net(), topology, parallel.Settings(zero_stage=stage, seed=0))
    optimizer = torch.optim.Adam(built.module.parameters())
    seen: dict[str, Any] = {"start": sizes(built)}
    for i, micro in enumerate(data()):
        loss = built.module(micro[topology.dp_rank])
        seen[f"forward {i}"] = sizes(built)
        built.zero.before_backward(last=i == 1)
        loss.backward()
        seen[f"backward {i}"] = sizes(built)
        if i == 0 and stage == 2:
            built.zero.reshard()  # the whole parameters are in front of the sharded ones
            seen["resharded"] = sizes(built)
    gradients = {n: p.grad.full_tensor() for n, p in built.module.named_parameters()}
    optimizer.step()
    parameters = dict(built.module.named_parameters())
    seen["moments"] = {n: local(optimizer.state[p]["exp_avg"]) for n, p in parameters.items()}
    return {"seen": seen, "gradients": gradients}


def both(parameters: dict[str, int], gradients: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (parameters[name], gradients[name]) for name in parameters}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_rank_holds_what_its_stage_says(ranks: Ranks, stage: int) -> None:
    model = net()
    model(data().flatten(0, 2)).backward()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    for rank, result in enumerate(ranks.run(DP, memory_case, stage)):
        whole = {name: shape.numel() for name, shape in shapes.items()}
        shard = {name: shard_size(shape, rank) for name, shape in shapes.items()}
        kept = whole if stage == 0 else shard
        during = shard if stage == 3 else whole
        nothing = dict.fromkeys(shapes, 0)
        seen = result["seen"]
        assert seen["start"] == both(kept, nothing)
        assert seen["forward 0"] == both(during, nothing)
        if stage <= 1:
            assert seen["backward 0"] == both(whole, whole), "gradients are whole while they accumulate"
        elif stage == 2:
            assert seen["backward 0"] == both(whole, nothing), "reduced at once, behind whole parameters"
            assert seen["resharded"] == both(shard, shard)
        else:
            assert seen["backward 0"] == both(shard, shard)
        assert seen["backward 1"] == both(kept, kept), "at the boundary"
        assert seen["moments"] == kept
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(result["gradients"][name], parameter.grad, msg=f"sum of {name}")


def norm_case(stage: int) -> tuple[float, float]:
    with torch.device("meta"):
        model = GPT(GPTConfig(**oracle.MODEL))
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=2, tp=2), zero_stage=stage)
    built = parallel.build(model, topology, parallel.Settings(zero_stage=stage, seed=oracle.SEED))
    inputs, targets = (x[:12].chunk(2)[topology.dp_rank] for x in oracle.samples())
    assert built.pipeline is not None
    built.pipeline.run(inputs, targets, 2, train=True)
    square = square_sum(built.module.parameters(), topology)
    dist.all_reduce(square)
    gathered = [p.grad.full_tensor() for p in built.module.parameters()]
    return square.sqrt().item(), torch.nn.utils.get_total_norm(gathered).item()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_norm_counts_each_element_once(ranks: Ranks, stage: int) -> None:
    model = oracle.initial_model(oracle.MODEL)
    inputs, targets = (x[:12] for x in oracle.samples())
    logits = model(inputs).flatten(0, 1)
    nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    for found, gathered in ranks.run(4, norm_case, stage):
        assert found == pytest.approx(gathered, rel=1e-6)
        assert found == pytest.approx(expected, rel=1e-5)


def unknown_case() -> str:
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=1, tp=1), zero_stage=1)
    with pytest.raises(ValueError, match="ZeRO stage") as caught:
        parallel.build(net(), topology, parallel.Settings(zero_stage=4, seed=0))
    return str(caught.value)


def test_an_unknown_stage(ranks: Ranks) -> None:
    assert ranks.run(1, unknown_case) == ["ZeRO stage 4 doesn't exist; expected 0, 1, 2 or 3"]
