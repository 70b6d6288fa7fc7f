"""`uni3d.Checkpointer`: what one trainer saves, any other loads; the engine is one of them."""

import warnings
from collections.abc import Callable
from itertools import product, starmap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import matrix, slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

import uni3d

WIDTH, SAMPLES = 8, 12
WRAPPED = "_fsdp_wrapped_module."


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

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3).to(dtype))

    def forward(self) -> Tensor:
        return self.weight.float().sum()


class Tail(nn.Module):
    """Tied, frozen, uneven and empty parameters, one of one element, one in bf16, and a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.odd = nn.Linear(WIDTH, 5, bias=False)
        self.back = nn.Linear(WIDTH, 5, bias=False)
        self.back.weight = self.odd.weight
        self.frozen = nn.Linear(5, 1).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.0]))
        self.none = nn.Parameter(torch.zeros(0, 3), requires_grad=False)
        self.short = Short(dtype)
        self.register_buffer("limit", torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(self.odd(x), self.back.weight.t()))
        out = self.frozen(self.odd(hidden)) * self.scale
        return out + self.limit * self.none.sum() + self.short()


class Net(nn.Module):
    """A chain, so that the engine can make pipeline stages of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.tail = Tail(dtype)

    pipeline_layers = ("layers.0", "layers.1", "tail")

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.tail(x)


def net(seed: int, dtype: torch.dtype) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(dtype)


def data(step: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(step))
    return inputs, inputs.square().mean(1, keepdim=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.05, momentum=0.9, foreach=False)


OPTIMIZERS = {"adamw": adamw, "momentum": momentum}


# --- the trainers: each returns the model, and the number of parts of the data --------------------------


def plain(model: Net) -> tuple[nn.Module, int]:
    return model, 1


def ddp(model: Net) -> tuple[nn.Module, int]:
    return DistributedDataParallel(model), dist.get_world_size()


def sharded(model: Net) -> tuple[nn.Module, int]:
    for layer in (*model.layers, model.tail.short):
        fully_shard(layer)
    return fully_shard(model), dist.get_world_size()


def flat(model: Net) -> tuple[nn.Module, int]:
    """Wrap in FSDP1, whose slices begin and end within rows."""
    cpu = torch.device("cpu")
    for i, layer in enumerate(model.layers):
        model.layers[i] = FullyShardedDataParallel(layer, device_id=cpu, use_orig_params=True)
    model.tail.short = FullyShardedDataParallel(model.tail.short, device_id=cpu, use_orig_params=True)
    return FullyShardedDataParallel(model, device_id=cpu, use_orig_params=True), dist.get_world_size()


def hybrid(model: Net) -> tuple[nn.Module, int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in (*model.layers, model.tail.short):
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
    for layer in (*model.layers, model.tail.short):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), 2


def compiled(model: Net) -> tuple[nn.Module, int]:
    return torch.compile(model, backend="eager"), 1


TRAINERS: dict[str, tuple[int, Callable[[Net], tuple[nn.Module, int]]]] = {
    "plain": (1, plain),
    "ddp": (2, ddp),
    "fsdp": (2, sharded),
    "fsdp1": (2, flat),
    "fsdp x tp": (4, sharded_and_split),
    "hsdp": (4, hybrid),
    "tp": (2, tensor_parallel),
    "compiled": (1, compiled),
}
RANKS = {name: ranks for name, (ranks, _) in TRAINERS.items()} | {"engine": 4}


class Loop:
    """A loop of PyTorch, with a Checkpointer."""

    def __init__(self, trainer: str, run: str, seed: int, dtype: torch.dtype, optimizer: str) -> None:
        self.module = net(seed, dtype)
        self.model, self.parts = TRAINERS[trainer][1](self.module)
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        self.schedule = StepLR(self.optimizer, 1, 0.5)
        self.keeper = uni3d.Checkpointer(
            run, model=self.model, optimizer=self.optimizer, lr_scheduler=self.schedule
        )

    def step(self, number: int) -> float:
        """Take a step on this rank's part of the samples; return the mean loss."""
        inputs, targets = data(number)
        part, size = dist.get_rank() * self.parts // dist.get_world_size(), SAMPLES // self.parts
        rows = slice(part * size, (part + 1) * size)
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(inputs[rows]), targets[rows])
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def save(self) -> Callable[[], Any]:
        return self.keeper.save(2, client_state={"epoch": 1}).wait

    def load(self) -> tuple[Any, Any]:
        restored = self.keeper.restore()
        assert restored is not None
        assert self.keeper.step == 2
        return restored


class EngineLoop:
    """The engine, with two pipeline stages of two data-parallel ranks."""

    def __init__(self, run: str, seed: int, dtype: torch.dtype) -> None:
        model = net(seed, dtype)
        config = {
            "train_batch_size": SAMPLES,
            "train_micro_batch_size_per_gpu": 3,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1, "eps": 0.01}},
            "zero_optimization": {"stage": 1},
            "parallel": {"pp": 2, "device": "cpu"},
        }
        self.engine = uni3d.initialize(
            model=model,
            model_parameters=trained(model),
            config=config,
            lr_scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5),
        )[0]
        self.module, self.optimizer, self.run = self.engine.module, self.engine.optimizer, run

    def step(self, number: int) -> float:
        inputs, targets = data(number)
        first = self.engine.model.topology.dp_rank * SAMPLES // 2
        micro = [(inputs[i : i + 3], targets[i : i + 3]) for i in range(first, first + SAMPLES // 2, 3)]
        loss = self.engine.train_batch(iter(micro)).item()
        self.engine.model.zero.reshard()
        return loss

    def save(self) -> Callable[[], Any]:
        self.engine.save_checkpoint(self.run, client_state={"epoch": 1})
        return self.engine.wait_for_checkpoint

    def load(self) -> tuple[Any, Any]:
        with warnings.catch_warnings(action="ignore"):  # the others don't count samples
            _, client_state = self.engine.load_checkpoint(self.run)
        self.engine.model.zero.reshard()
        assert self.engine.global_steps == 2
        return self.engine.last_load, client_state


def begin(trainer: str, run: str, seed: int, dtype: torch.dtype, optimizer: str) -> Loop | EngineLoop:
    if trainer == "engine":
        return EngineLoop(run, seed, dtype)
    return Loop(trainer, run, seed, dtype, optimizer)


def state_of(loop: Any) -> dict[str, Tensor]:
    """Return this rank's stages: whole weights, buffers and moments by the names of the plain model."""
    if isinstance(getattr(loop, "model", None), FullyShardedDataParallel):
        return flat_state_of(loop)
    found = {name: buffer.clone() for name, buffer in loop.module.named_buffers()}
    for name, parameter in loop.module.named_parameters():
        moments = loop.optimizer.state.get(parameter, {}).items()
        for key, value in (("", parameter), *moments):
            part = value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)
            found[f"{name}/{key}"] = part.detach().clone()
    return found


def flat_state_of(loop: Any) -> dict[str, Tensor]:
    """Return the same of a model in FSDP1: ranks' slices of a tensor, one after the other.

    FSDP1's own `optim_state_dict` gives AdamW's second moments as the first ones on CPUs.
    """
    found = {name.replace(WRAPPED, ""): buffer.clone() for name, buffer in loop.module.named_buffers()}
    mine = {
        name.replace(WRAPPED, ""): {"": p.detach().clone()} | loop.optimizer.state.get(p, {})
        for name, p in loop.module.named_parameters()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for name, whole in net(3, torch.float32).named_parameters():
        holders = [states[name] for states in everyone if states[name][""].numel()] or [mine[name]]
        for key, value in holders[0].items():
            slices = [torch.as_tensor(states[key]) for states in holders]
            together = torch.cat(slices).view(whole.shape) if value.ndim else slices[0]
            found[f"{name}/{key}"] = together.clone()
    return found


def save_case(trainer: str, run: str, dtype: torch.dtype, optimizer: str) -> dict[str, Tensor]:
    loop = begin(trainer, run, 3, dtype, optimizer)
    for number in range(2):
        loop.step(number)
    wait = loop.save()
    saved = state_of(loop)
    loop.step(9)  # while it is written
    wait()
    return saved


def load_case(
    trainer: str, run: str, dtype: torch.dtype, optimizer: str
) -> tuple[dict[str, Tensor], float, float]:
    """Load into a model of other weights; return its state, its rate, and the next step's loss."""
    loop = begin(trainer, run, 7, dtype, optimizer)
    report, client_state = loop.load()
    assert client_state == {"epoch": 1}
    assert not report.defaulted
    state, rate = state_of(loop), loop.optimizer.param_groups[0]["lr"]
    return state, rate, loop.step(2)


class Alone:
    """Plain PyTorch in the test's own process."""

    def __init__(self, dtype: torch.dtype, optimizer: str) -> None:
        self.module = net(3, dtype)
        self.optimizer, self.losses = OPTIMIZERS[optimizer](self.module), []
        schedule = StepLR(self.optimizer, 1, 0.5)
        self.state: dict[str, Tensor] = {}
        for number in range(3):
            if number == 2:
                self.state = state_of(self)
            inputs, targets = data(number)
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.module(inputs), targets)
            loss.backward()
            self.optimizer.step()
            schedule.step()
            self.losses.append(loss.item())


def merged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the states of pipeline stages."""
    return {name: tensor for state in states for name, tensor in state.items()}


QUICK = {("fsdp x tp", "engine"), ("engine", "fsdp1"), ("tp", "plain")}
SOME = {("fsdp", "ddp"), ("ddp", "fsdp x tp"), ("fsdp1", "hsdp"), ("hsdp", "tp")}
REST = {*product(RANKS, RANKS)} - QUICK - SOME
PAIRS = [*sorted(QUICK), *starmap(slow, sorted(SOME)), *starmap(matrix, sorted(REST))]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_what_one_trainer_saves_another_loads(ranks: Ranks, tmp_path: Path, writer: str, reader: str) -> None:
    # The engine trains fp32 masters of parameters in bf16.
    dtype = torch.float32 if "engine" in (writer, reader) else torch.bfloat16
    run, alone = str(tmp_path / "run"), Alone(dtype, "adamw")
    saved = merged(ranks.run(RANKS[writer], save_case, writer, run, dtype, "adamw"))
    results = ranks.run(RANKS[reader], load_case, reader, run, dtype, "adamw")
    state = merged([found for found, _, _ in results])
    assert state.keys() == saved.keys() == alone.state.keys()
    for name, tensor in saved.items():
        assert torch.equal(state[name], tensor), name
        torch.testing.assert_close(tensor, alone.state[name], rtol=1e-5, atol=1e-6, msg=name)
    for _, rate, loss in results:
        assert rate == pytest.approx(0.02 / 4)
        assert loss == pytest.approx(alone.losses[2], rel=1e-5)


@pytest.mark.parametrize(
    "writer", ["ddp", matrix("fsdp"), matrix("fsdp1"), "fsdp x tp", matrix("hsdp"), matrix("tp")]
)
def test_momentum(ranks: Ranks, tmp_path: Path, writer: str) -> None:
    run, alone = str(tmp_path / "run"), Alone(torch.bfloat16, "momentum")
    saved = ranks.run(RANKS[writer], save_case, writer, run, torch.bfloat16, "momentum")[0]
    for name, tensor in alone.state.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    for _, _, loss in ranks.run(2, load_case, "fsdp", run, torch.bfloat16, "momentum"):
        assert loss == pytest.approx(alone.losses[2], rel=1e-5)
