"""Parameters outside the plan, and losses, are compared until there was something to compare."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import slow
from one_stage import run_batch
from ranks import Ranks
from torch import Tensor, nn

import parallel
from parallel.loss import Loss

WIDTH, HEAD = 8, 2


class Block(nn.Module):
    """Residual layer with a norm over each head, which its plan forgets."""

    head_dim = HEAD

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(HEAD)
        self.whole, self.unused = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(self.whole(x)).unflatten(-1, (-1, HEAD))
        return x + self.down(self.norm(heads).flatten(-2))


class Net(nn.Module):
    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}  # noqa: RUF012 - as models declare it

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.pipeline_layers = ["layers.0", "layers.1"]
        self.loss_fn = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def build(net: nn.Module, *, pp: int = 1, dp: int = 1, zero: int = 1) -> parallel.ParallelModel:
    topology = parallel.Topology(parallel.Degrees(pp=pp, dp=dp, tp=2), zero_stage=zero)
    return parallel.build(net, topology, parallel.Settings(zero_stage=zero, seed=0, schedule="gpipe"))


def steps(
    built: parallel.ParallelModel, count: int, before: Callable[[int], None] = lambda _: None
) -> tuple[list[int], str]:
    """Return the number of collectives of each step's check, and the error that ended training."""
    trained = torch.optim.SGD(built.module.parameters(), lr=0.1)
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[-1] += 1
        return all_reduce(*args, **kwargs)

    generator = torch.Generator().manual_seed(4)
    for step in range(count):
        before(step)
        x, y = torch.randn(4, 3, WIDTH, generator=generator), torch.randn(4, 3, WIDTH, generator=generator)
        loss = built.pipeline.run([(x, y)], train=True) if built.pipeline else run_batch(built, x, y, 1)
        built.zero.reshard()
        calls.append(0)
        dist.all_reduce = counted
        try:
            built.replicas.check(loss)
        except ValueError as error:
            return calls, str(error)
        finally:
            dist.all_reduce = all_reduce
        trained.step()
        trained.zero_grad()
    return calls, ""


def forgotten_case(kind: str, options: dict[str, int]) -> tuple[list[int], str]:
    torch.manual_seed(1)
    net = Net()
    if kind != "zero output":
        for layer in net.layers:
            nn.init.normal_(layer.down.weight)
    if kind == "right":
        net.tp_plan = Net.tp_plan | {"layers.*.norm": "replicated_with_grad_allreduce"}
    frozen = [p for layer in net.layers for p in layer.norm.parameters()] if kind == "unfrozen" else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    built = build(net, **options)

    def unfreeze(step: int) -> None:
        for name, parameter in built.module.named_parameters():
            if ".norm." in name:
                parameter.requires_grad_(step >= 2)

    return steps(built, 4, unfreeze if frozen else lambda _: None)


PLACES: dict[str, dict[str, int]] = {
    "zero 0": {"zero": 0},
    "zero 3": {"zero": 3},
    "dp 2": {"dp": 2, "zero": 0},
    "shards": {"dp": 2, "zero": 3},
    "pp 2": {"pp": 2},
}


@pytest.mark.parametrize(
    ("kind", "step", "place"),
    [
        ("at once", 1, "zero 0"),
        slow("at once", 1, "shards"),
        *(slow("zero output", 2, place) for place in PLACES if place != "zero 3"),
        ("zero output", 2, "zero 3"),
        slow("unfrozen", 3, "zero 3"),
        ("unfrozen", 3, "dp 2"),
    ],
)
def test_a_parameter_is_compared_once_it_has_a_gradient(
    ranks: Ranks, kind: str, step: int, place: str
) -> None:
    options = PLACES[place]
    world = 2 * options.get("pp", 1) * options.get("dp", 1)
    for calls, error in ranks.run(world, forgotten_case, kind, options):
        assert calls == [1] * step, "one collective each"
        assert error.startswith(
            "tp(2) ranks have different gradients of layers.0.norm.weight, layers.0.norm.bias, "
            "layers.1.norm.weight, layers.1.norm.bias, which the tp_plan leaves out"
        )


def used_up_case() -> tuple[list[int], str]:
    """Leave nothing uncompared."""
    torch.manual_seed(1)
    net = Net()
    net.tp_plan = Net.tp_plan | {"layers.*.norm": "replicated_with_grad_allreduce"}
    for layer in net.layers:
        del layer.unused
    return steps(build(net), 4)


@pytest.mark.slow
def test_what_agrees_costs_nothing_later(ranks: Ranks) -> None:
    for calls, error in ranks.run(2, used_up_case):
        assert (calls, error) == ([1, 1, 0, 0], ""), "the whole norms have no gradient at first"
    for place in ("zero 3", "shards", "pp 2"):
        world = 2 * PLACES[place].get("pp", 1) * PLACES[place].get("dp", 1)
        for calls, error in ranks.run(world, forgotten_case, "right", PLACES[place]):
            assert (calls, error) == ([1] * 4, ""), "the unused layer is never compared"


class Open(nn.Module):
    """Model whose last layer is split, and not gathered."""

    tp_plan = {"out": "colwise"}  # noqa: RUF012 - as models declare it

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.loss_fn = lambda output, _: output.square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


def open_case() -> tuple[list[int], str]:
    torch.manual_seed(1)
    return steps(build(Open()), 2)


def test_losses_of_different_features(ranks: Ranks) -> None:
    for calls, error in ranks.run(2, open_case):
        assert calls == [1]
        assert error.startswith("tp(2) ranks have different losses, 0.")


def infinite_case() -> list[str]:
    """Return the errors of steps whose gradients or losses aren't finite, and of one that shows the fault."""
    torch.manual_seed(1)
    net = Net()
    for layer in net.layers:
        nn.init.normal_(layer.down.weight)
    built = build(net)
    x = torch.randn(4, 3, WIDTH)
    errors = []
    for factor in (float("inf"), 1.0):
        loss = run_batch(built, x, x * factor, 1)
        built.zero.reshard()
        try:
            built.replicas.check(Loss(loss.total * factor, loss.tokens))
        except ValueError as error:
            errors.append(str(error)[:36])
        else:
            errors.append("")
        built.module.zero_grad()
    return errors


def test_what_is_not_finite_is_not_compared(ranks: Ranks) -> None:
    for errors in ranks.run(2, infinite_case):
        assert errors == ["", "tp(2) ranks have different gradients"]
