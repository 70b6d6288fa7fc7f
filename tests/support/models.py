"""Small models and data for tests of the engine, and plain PyTorch to compare it with."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uni3d

WIDTH = 6
ADAM = {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1, "eps": 0.01}}
"""Optimizer settings; the large epsilon makes a step depend on the gradients' scale."""

Batch = tuple[Tensor, Tensor]


class OwnLoss(nn.Module):
    """Plain module that returns its loss, with ties, frozen parameters and buffers."""

    returns_loss = True

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encode = nn.Linear(WIDTH, WIDTH)
        self.fixed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.decode = nn.Linear(WIDTH, WIDTH, bias=False)
        self.decode.weight = self.encode.weight
        self.out = nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.dropout(torch.tanh(self.fixed(self.encode(x))))
        return F.mse_loss(self.out(self.decode(hidden)), y)


class Net(nn.Module):
    """Plain layers, for loops that compute the loss themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


class Stack(nn.Module):
    """Chain that can be cut into pipeline stages; its loss is a sum and a number of terms."""

    def __init__(self, layers: int = 4, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers))
        self.out = nn.Linear(width, 1)

    @property
    def pipeline_layers(self) -> list[str]:
        return [*(f"layers.{i}" for i in range(len(self.layers))), "out"]

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        error = (outputs - targets).square()
        return error.sum(), torch.tensor(error.numel())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def seeded(model: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Return the model with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model(*args)


def global_batches(steps: int, size: int = 12, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(steps, size, WIDTH, generator=generator)
    return [(x, x.square().mean(1, keepdim=True)) for x in inputs]


def micro_batches(batches: list[Batch], engine: uni3d.Engine) -> Iterator[Batch]:
    """Yield this rank's micro batches: its slice of each global batch, in order."""
    size, share = engine.triad.micro_batch, engine.triad.micro_batch * engine.triad.accumulation
    first = engine.model.topology.dp_rank * share
    for x, y in batches:
        for start in range(first, first + share, size):
            yield x[start : start + size], y[start : start + size]


def make_engine(
    model: nn.Module,
    *,
    zero: int = 0,
    pp: int = 1,
    micro: int = 3,
    clip: float = 0.0,
    group: int = -1,
    offload: bool = False,
    **given: Any,
) -> uni3d.Engine:
    """Return an engine on the CPU with a global batch of 12; `given` goes to `initialize`."""
    offloading = {"device": "cpu" if offload else "none"}
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": clip,
        "optimizer": ADAM,
        "parallel": {"pp": pp, "device": "cpu"},
        "zero_optimization": {"stage": zero, "mics_shard_size": group, "offload_optimizer": offloading},
    } | given.pop("config", {})
    return uni3d.initialize(model=model, config=config, **given)[0]


def train(engine: uni3d.Engine, batches: list[Batch]) -> list[float]:
    """Take a step on each global batch; return the losses."""
    return take_steps(engine, len(batches), micro_batches(batches, engine))[0]


def take_steps(
    engine: uni3d.Engine, steps: int, data: Iterator[Any] | None = None
) -> tuple[list[float], list[float]]:
    """Take steps on `data`, or on the engine's own; return the losses and the norms before clipping."""
    losses, norms = [], []
    for _ in range(steps):
        losses.append(engine.train_batch(data).item())
        norms.append(engine.get_global_grad_norm() or 0.0)
    return losses, norms


def save_and_wait(engine: uni3d.Engine, run: Any, **how: Any) -> None:
    engine.save_checkpoint(run, **how)
    engine.wait_for_checkpoint()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters and buffers, gathered from all ranks by torch."""
    tensors = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the plain optimizer of `ADAM`."""
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1, eps=0.01, foreach=False)


def train_plainly(
    model: nn.Module,
    batches: list[Batch],
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    clip: float = 0.0,
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
) -> tuple[list[float], list[float], nn.Module]:
    """Train a copy of `model` in one process, a global batch at once; return losses, norms and the copy."""
    model = deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    inner, losses, norms = optimizer(trained), [], []
    for x, y in batches:
        value = model(x, y) if hasattr(model, "returns_loss") else loss(model(x), y)
        value.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, clip or float("inf"))))
        inner.step()
        inner.zero_grad()
        losses.append(value.item())
    return losses, norms, model


def assert_same(found: dict[str, Tensor], expected: nn.Module, ignore: tuple[str, ...] = ()) -> None:
    """Assert that both have the same tensors up to rounding."""
    wanted = whole(expected)
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - set(ignore):
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)
