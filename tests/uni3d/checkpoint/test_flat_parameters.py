"""FSDP1's flat parameters in a Checkpointer: slices that end within rows, and what can't be saved."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import SGD, AdamW, Optimizer

import uni3d

CPU = torch.device("cpu")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))


def wrapped(model: nn.Module, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model, device_id=CPU, use_orig_params=True, **options)


def step(model: nn.Module, optimizer: Optimizer, number: int, part: int = 0, parts: int = 1) -> float:
    inputs = torch.randn(8, 9, generator=torch.Generator().manual_seed(number))
    size = 8 // parts
    optimizer.zero_grad()
    loss = F.mse_loss(model(inputs[part * size : (part + 1) * size]), torch.ones(size, 1))
    loss.backward()
    optimizer.step()
    return loss.item()


def adamw(model: nn.Module) -> AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, lr=0.02, eps=0.01, foreach=False)


def hybrid_case(run: str) -> list[tuple[dict[str, Tensor], float]]:
    """Save from HYBRID_SHARD, and load into plain PyTorch and into NO_SHARD; return weights and a loss."""
    mesh, rank = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")), dist.get_rank()
    model = wrapped(net(), device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    optimizer = adamw(model)
    for number in range(2):
        step(model, optimizer, number, rank, 4)
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer)
    handle = keeper.save(2)
    step(model, optimizer, 9, rank, 4)  # while it is written
    handle.wait()
    found = []
    with warnings.catch_warnings(action="ignore"):
        whole = wrapped(net(1), sharding_strategy=ShardingStrategy.NO_SHARD)
    for reader in (net(1), whole):
        optimizer = adamw(reader)
        uni3d.load(run, model=reader, optimizer=optimizer)
        weights = [p.detach().clone() for p in reader.parameters()]
        found.append((dict(zip(net().state_dict(), weights, strict=True)), step(reader, optimizer, 2)))
    uni3d.load(run, model=model)  # weights alone, into slices again
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        weights = [p.detach().clone() for p in model.parameters()]
    return [*found, (dict(zip(net().state_dict(), weights, strict=True)), found[0][1])]


def test_hybrid_shards_and_whole_copies(ranks: Ranks, tmp_path: Path) -> None:
    model = net()
    optimizer = adamw(model)
    for number in range(2):
        step(model, optimizer, number)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = step(model, optimizer, 2)
    for results in ranks.run(4, hybrid_case, str(tmp_path / "run")):
        for found, after in results:
            assert found.keys() == weights.keys()
            for name, tensor in weights.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
            assert after == pytest.approx(loss, rel=1e-5)


def lenient_case(run: str) -> None:
    """Load without what was left out: it stays, and the rest comes."""
    model = net()
    model[2].requires_grad_(False)
    model = wrapped(model)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    step(model, optimizer, 0, dist.get_rank(), 2)
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer, async_save=False)
    keeper.save(1, exclude_frozen_parameters=True)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    restored = keeper.load(strict=False)
    assert len(restored.report.defaulted) == 2
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value if parameter.requires_grad else value + 1)


def evaluated_case(run: str, strategy: str, grad: bool) -> None:
    """Load after an evaluation, from which FSDP1 keeps whole parameters."""
    inputs = torch.ones(2, 9)
    uni3d.save(run, model=net(), step=1, async_save=False)
    model = wrapped(net(1), sharding_strategy=ShardingStrategy[strategy])
    with torch.set_grad_enabled(grad):
        model(inputs)
    uni3d.load(run, model=model)
    assert torch.equal(model(inputs), net()(inputs))


@pytest.mark.parametrize(("strategy", "grad"), [("SHARD_GRAD_OP", False), slow("FULL_SHARD", True)])
def test_a_load_after_an_evaluation(ranks: Ranks, tmp_path: Path, strategy: str, grad: bool) -> None:
    ranks.run(2, evaluated_case, str(tmp_path / "run"), strategy, grad)


def test_what_was_left_out_stays(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, lenient_case, str(tmp_path / "run"))


class ByRank(SGD):
    """Keeps a state of another shape."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for parameter, state in self.state.items():
            state["norms"] = parameter.new_zeros(2, 2)


def flat_optimizer(run: str) -> None:
    uni3d.save(run, model=FullyShardedDataParallel(net(), device_id=CPU), step=1)


def gathered_now(run: str) -> None:
    model = wrapped(net(), sharding_strategy=ShardingStrategy.SHARD_GRAD_OP)
    model(torch.ones(2, 9))
    uni3d.save(run, model=model, step=1)


def strange_order(run: str) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    uni3d.save(run, model=wrapped(model), step=1)


def other_shape(run: str) -> None:
    model = wrapped(net())
    optimizer = ByRank(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer, 0)
    uni3d.save(run, model=model, optimizer=optimizer, step=1)


def other_counts(run: str) -> None:
    model = wrapped(net())
    optimizer = adamw(model)
    step(model, optimizer, 0)
    for state in optimizer.state.values():
        state["step"] += dist.get_rank()
    uni3d.save(run, model=model, optimizer=optimizer, step=1)


REFUSED = {
    flat_optimizer: "the model is wrapped in FullyShardedDataParallel with use_orig_params=False",
    gathered_now: "the model has gathered its parameters for a backward pass; save and load before",
    strange_order: "weight isn't contiguous",
    other_shape: "has the shape [2, 2], but FullyShardedDataParallel gives a rank",
    other_counts: "the optimizer has other states or step counts for",
}


def refused_case(run: str) -> dict[str, str]:
    found = {}
    for case in REFUSED:
        try:
            case(run)
        except (ValueError, uni3d.CheckpointError) as error:
            found[case.__name__] = str(error)
    return found


def test_what_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = ranks.run(2, refused_case, str(run))
    assert first == second
    for case, text in REFUSED.items():
        assert case.__name__ in first, f"{case.__name__} wasn't refused"
        assert text in first[case.__name__]
    assert not list(run.glob("*"))
