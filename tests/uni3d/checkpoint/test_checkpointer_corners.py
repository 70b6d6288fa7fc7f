"""`uni3d.Checkpointer` when the model changes under it, and in states that few trainers are in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau

import uni3d


def net(seed: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def check_equal(found: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_cast_between_two_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model.bfloat16()  # the parameters stay the objects that they are
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(uni3d.CheckpointError, match=r"is float32.* in .*, but the model.s is bfloat16"):
        checkpointer.load()
    check_equal(model, before)
    checkpointer.save(2).wait()
    uni3d.load(tmp_path, model=reader.bfloat16())
    check_equal(reader, before)


@pytest.mark.usefixtures("alone")
def test_a_parameter_that_grows_between_two_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model[1].weight.data, model[1].bias.data = torch.randn(7, 4), torch.randn(7)
    checkpointer.save(2).wait()
    reader[1] = nn.Linear(4, 7)
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())


@pytest.mark.usefixtures("alone")
def test_weights_tied_and_untied_between_saves(tmp_path: Path) -> None:
    model, reader = net(), net(4)
    model[1].weight = model[0].weight
    checkpointer = uni3d.Checkpointer(tmp_path, model=model)
    checkpointer.save(1)
    model[1].weight = nn.Parameter(torch.randn(4, 4))
    checkpointer.save(2).wait()
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())
    model[1].weight = model[0].weight
    checkpointer.save(3).wait()
    reader = net(5)
    reader[1].weight = reader[0].weight
    uni3d.load(tmp_path, model=reader)
    check_equal(reader, model.state_dict())


def steps(model: nn.Module, optimizer: Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "thawed after steps"])
def test_states_of_a_parameter_that_has_none_yet(tmp_path: Path, frozen: bool) -> None:
    model, reader = net(), net(4)
    optimizer, other = AdamW(model.parameters(), lr=0.1), AdamW(reader.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    uni3d.save(tmp_path, model=model, optimizer=optimizer, step=2).wait()
    reader[0].weight.requires_grad_(False)
    if not frozen:
        steps(reader, other, 1)
        reader[0].weight.requires_grad_(True)
    gradients = [p.grad for p in reader.parameters()]
    uni3d.load(tmp_path, model=reader, optimizer=other)
    assert all(p.grad is gradient for p, gradient in zip(reader.parameters(), gradients, strict=True))
    check_equal(reader, model.state_dict())
    for mine, its in zip(model.parameters(), reader.parameters(), strict=True):
        assert optimizer.state[mine].keys() == other.state[its].keys()
        for key, value in optimizer.state[mine].items():
            torch.testing.assert_close(other.state[its][key], value, rtol=0, atol=0)


@pytest.mark.usefixtures("alone")
def test_a_refused_load_creates_no_states(tmp_path: Path) -> None:
    model, reader = net(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer, other = AdamW(model.parameters(), lr=0.1), AdamW(reader.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    uni3d.save(tmp_path, model=model, optimizer=optimizer, step=2).wait()
    reader[0].weight.requires_grad_(False)
    steps(reader, other, 1)
    with pytest.raises(uni3d.CheckpointError, match=r"but the model.s is float32.3, 4"):
        uni3d.load(tmp_path, model=reader, optimizer=other)
    assert set(other.state) == {*reader.parameters()} - {reader[0].weight}


def cut_buffer(run: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def made(seed: int) -> nn.Module:
        model = net(seed)
        model.register_buffer("table", distribute_tensor(torch.randn(5, 2), mesh, [Shard(0)]))
        return model

    model, same, plain = made(3), made(4), net(4)
    plain.register_buffer("table", torch.zeros(5, 2))
    uni3d.save(run, model=model, step=1).wait()
    whole = model.table.full_tensor()
    uni3d.load(run, model=same)
    torch.testing.assert_close(same.table.full_tensor(), whole, rtol=0, atol=0)
    uni3d.load(run, model=plain)
    torch.testing.assert_close(plain.table, whole, rtol=0, atol=0)


def whole_parameters_shown(run: str) -> None:
    model, reader = fully_shard(net()), net(4)
    checkpointer = uni3d.Checkpointer(run, model=model)
    with torch.no_grad():
        model(torch.ones(2, 4))  # the root stays whole
    checkpointer.save(1).wait()
    uni3d.load(run, model=reader)
    check_equal(reader, net().state_dict())


@pytest.mark.parametrize("case", [cut_buffer, whole_parameters_shown], ids=lambda case: case.__name__)
def test_on_two_ranks(ranks: Ranks, tmp_path: Path, case: Callable[[str], None]) -> None:
    ranks.run(2, case, str(tmp_path))


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "milestones": lambda optimizer: MultiStepLR(optimizer, [2, 4], gamma=0.1),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 5),
}


def rates(scheduler: Any, optimizer: Optimizer, steps: range) -> list[float]:
    found = []
    for step in steps:
        optimizer.step()
        scheduler.step(*([1.0 + step] if isinstance(scheduler, ReduceLROnPlateau) else []))
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_whose_states_json_lacks(tmp_path: Path, kind: str, tensor: bool) -> None:
    """Counters, infinities, and rates that are tensors."""

    def made() -> tuple[nn.Module, Optimizer, Any]:
        model = net()
        optimizer = SGD(model.parameters(), lr=torch.tensor(0.8) if tensor else 0.8)
        return model, optimizer, SCHEDULES[kind](optimizer)

    model, optimizer, scheduler = made()
    rates(scheduler, optimizer, range(2))
    uni3d.save(tmp_path, model=model, optimizer=optimizer, lr_scheduler=scheduler, step=2).wait()
    expected = rates(scheduler, optimizer, range(2, 5))
    model, optimizer, scheduler = made()
    uni3d.load(tmp_path, model=model, optimizer=optimizer, lr_scheduler=scheduler)
    assert rates(scheduler, optimizer, range(2, 5)) == pytest.approx(expected, rel=1e-6)
    assert len({*expected}) > 1
