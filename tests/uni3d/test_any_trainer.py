"""`uni3d.Checkpointer`: what one trainer saves, any other loads; the engine is one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import matrix
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import uni3d

WIDTH, SAMPLES = 8, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Short(nn.Module):
    """A parameter in bf16, which `fully_shard` wants in a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.bfloat16))

    def forward(self) -> Tensor:
        return self.weight.float().sum()


class Net(nn.Module):
    """Layers with tied, frozen, uneven and empty parameters, one without dims, one in bf16, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.odd = nn.Linear(WIDTH, 5, bias=False)
        self.back = nn.Linear(WIDTH, 5, bias=False)
        self.back.weight = self.odd.weight
        self.frozen = nn.Linear(5, 1).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.0]))
        self.none = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.short = Short()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        for layer in self.layers:
            x = layer(x)
        hidden = torch.tanh(F.linear(self.odd(x), self.back.weight.t()))
        out = self.frozen(self.odd(hidden)) * self.scale + self.none.sum() + self.short()
        return F.mse_loss(out, y)


def net(seed: int = 3) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def data(step: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step))
    return inputs, inputs.square().mean(1, keepdim=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.05, momentum=0.9, foreach=False)


# --- the trainers: each returns the model, and the number of parts of the data ------------------------------


def plain(model: Net) -> tuple[nn.Module, int]:
    return model, 1


def ddp(model: Net) -> tuple[nn.Module, int]:
    return DistributedDataParallel(model), dist.get_world_size()


def sharded(model: Net) -> tuple[nn.Module, int]:
    for layer in (*model.layers, model.short):
        fully_shard(layer)
    return fully_shard(model), dist.get_world_size()


def hybrid(model: Net) -> tuple[nn.Module, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (*model.layers, model.short):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), 4


def split(model: Net, mesh: Any) -> None:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tensor_parallel(model: Net) -> tuple[nn.Module, int]:
    split(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    return model, 1


def sharded_and_split(model: Net) -> tuple[nn.Module, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    split(model, mesh["tp"])
    for layer in (*model.layers, model.short):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), 2


def compiled(model: Net) -> tuple[nn.Module, int]:
    return torch.compile(model, backend="eager"), 1


TRAINERS: dict[str, tuple[int, Callable[[Net], tuple[nn.Module, int]]]] = {
    "plain": (1, plain),
    "ddp": (2, ddp),
    "fsdp": (2, sharded),
    "fsdp x tp": (4, sharded_and_split),
    "hsdp": (4, hybrid),
    "tp": (2, tensor_parallel),
    "compiled": (1, compiled),
}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, number: int) -> Tensor:
    """Take a step on this rank's part of the samples; return the mean loss."""
    inputs, targets = data(number)
    part = dist.get_rank() * parts // dist.get_world_size()
    size = SAMPLES // parts
    rows = slice(part * size, (part + 1) * size)
    optimizer.zero_grad()
    loss = model(inputs[rows], targets[rows])
    loss.backward()
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return whole weights, buffers and moments by the names of the plain model."""
    named = {n.replace("module.", "").replace("_orig_mod.", ""): p for n, p in model.named_parameters()}
    found = {name: whole(parameter) for name, parameter in named.items()}
    found |= {n.replace("module.", "").replace("_orig_mod.", ""): b.clone() for n, b in model.named_buffers()}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = whole(value)
    return found


def save_case(trainer: str, run: str, make: str) -> dict[str, Tensor]:
    model, parts = TRAINERS[trainer][1](net())
    optimizer = {"adamw": adamw, "momentum": momentum}[make](model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for number in range(2):
        step(model, optimizer, parts, number)
        schedule.step()
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer, lr_scheduler=schedule)
    handle = keeper.save(2, client_state={"epoch": 1})
    saved = state_of(model, optimizer)
    step(model, optimizer, parts, 9)  # while it is written
    assert handle.wait().tag == "global_step2"
    return saved


def load_case(trainer: str, run: str, make: str) -> tuple[dict[str, Tensor], float, float]:
    """Load into a model of other weights; return its state, its rate, and the next step's loss."""
    model, parts = TRAINERS[trainer][1](net(seed=7))
    optimizer = {"adamw": adamw, "momentum": momentum}[make](model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    keeper = uni3d.Checkpointer(run, model=model, optimizer=optimizer, lr_scheduler=schedule)
    restored = keeper.restore()
    assert restored is not None
    assert restored.client_state == {"epoch": 1}
    assert keeper.step == 2
    assert not restored.report.defaulted
    state = state_of(model, optimizer)
    rate = optimizer.param_groups[0]["lr"]
    return state, rate, step(model, optimizer, parts, 2).item()


def alone(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[list[float], dict[str, Tensor]]:
    """Train in plain PyTorch; return the losses of three steps, and the state after two."""
    model = net()
    optimizer, losses, state = make(model), [], {}
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for number in range(3):
        if number == 2:
            state = state_of(model, optimizer)
        optimizer.zero_grad()
        loss = model(*data(number))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, state


SOME = {("fsdp", "ddp"), ("ddp", "fsdp x tp"), ("fsdp x tp", "plain"), ("hsdp", "tp"), ("plain", "hsdp")}
PAIRS = [(a, b) if (a, b) in SOME else matrix(a, b) for a in TRAINERS for b in TRAINERS]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_what_one_trainer_saves_another_loads(ranks: Ranks, tmp_path: Path, writer: str, reader: str) -> None:
    run, losses = str(tmp_path / "run"), alone(adamw)[0]
    saved = ranks.run(TRAINERS[writer][0], save_case, writer, run, "adamw")[0]
    for state, rate, loss in ranks.run(TRAINERS[reader][0], load_case, reader, run, "adamw"):
        assert state.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(state[name], tensor), name
        assert rate == pytest.approx(0.02 / 4)
        assert loss == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("writer", ["ddp", matrix("fsdp"), "fsdp x tp", matrix("hsdp"), matrix("tp")])
def test_the_saved_state_is_that_of_one_process(ranks: Ranks, tmp_path: Path, writer: str) -> None:
    saved = ranks.run(TRAINERS[writer][0], save_case, writer, str(tmp_path / "run"), "momentum")[0]
    for name, tensor in alone(momentum)[1].items():
        if name != "calls":  # DDP's ranks each count their own
            torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
