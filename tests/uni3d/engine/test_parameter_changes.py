"""Changes of parameters after `initialize` count, or are an error."""

import gc
import weakref
from typing import Any

import pytest
import torch
from marks import STAGES, slow
from ranks import Ranks
from torch import Tensor, nn

import uni3d

WIDTH = 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x * self.scale).square().mean()


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Net()


def engine_of(zero: int, **config: Any) -> uni3d.Engine:
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "parallel": {"device": "cpu"},
    }
    engine: uni3d.Engine = uni3d.initialize(
        model=(model := net()), model_parameters=list(model.parameters()), config=values | config
    )[0]
    return engine


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def take_step(engine: uni3d.Engine, step: int) -> None:
    engine.backward(engine(inputs(step, engine.global_rank)))
    engine.step()


def frozen_case(zero: int, between: bool) -> dict[str, Tensor]:
    """Freeze a layer and the scalar after a forward pass, with or without a backward pass to come."""
    engine = engine_of(zero)
    take_step(engine, 0)
    loss = engine(inputs(1, engine.global_rank))
    for parameter in (*engine.module.layers[0].parameters(), engine.module.scale):
        parameter.requires_grad_(False)
    engine.backward(loss if between else engine(inputs(1, engine.global_rank)))
    engine.step()
    return engine.module_state_dict()


@pytest.mark.parametrize("between", [True, slow(False)])
@pytest.mark.parametrize("zero", STAGES)
def test_freezing_while_parameters_are_whole_counts(ranks: Ranks, zero: int, between: bool) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(2):
            (model(inputs(step, rank)) / 2).backward()
        optimizer.step()
        for parameter in (*model.layers[0].parameters(), model.scale):
            parameter.requires_grad_(False)
    for found in ranks.run(2, frozen_case, zero, between):
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def scalar_case(zero: int) -> float:
    engine = engine_of(zero)
    engine.backward(engine(inputs(0, engine.global_rank)))
    gradient: Tensor = engine.module.scale.grad  # type: ignore[assignment,union-attr]
    return gradient.item()


@pytest.mark.parametrize("zero", [slow(0), slow(1), 3])
def test_the_gradient_of_a_scalar_is_the_mean_before_the_step(ranks: Ranks, zero: int) -> None:
    model = net()
    for rank in range(2):
        (model(inputs(0, rank)) / 2).backward()
    assert model.scale.grad is not None
    assert ranks.run(2, scalar_case, zero) == [pytest.approx(model.scale.grad.item())] * 2


def write(engine: uni3d.Engine) -> None:
    engine(inputs(1, engine.global_rank))
    with torch.no_grad():
        engine.module.layers[0].weight.mul_(0.5)  # type: ignore[index,union-attr]


def replace(engine: uni3d.Engine) -> None:
    engine.module.layers[0].weight = nn.Parameter(torch.ones(WIDTH, WIDTH))  # type: ignore[index,union-attr]


def swap(engine: uni3d.Engine) -> None:
    engine(inputs(1, engine.global_rank))
    weight = engine.module.layers[0].weight  # type: ignore[index,union-attr]
    weight.data = weight.data.clone()  # type: ignore[operator]


def hook(engine: uni3d.Engine) -> None:
    engine.module.layers[0].weight.register_hook(lambda g: g * 0)  # type: ignore[index,union-attr]


def late_hook(engine: uni3d.Engine) -> None:
    engine.module.layers[1].bias.register_post_accumulate_grad_hook(print)  # type: ignore[index,union-attr]


def own_layer(engine: uni3d.Engine) -> None:
    engine.module.layers[engine.global_rank].requires_grad_(False)  # type: ignore[index,union-attr]


CHANGES = {
    "write": (write, (1, 2), "layers.0.weight was written to"),
    "replace": (replace, (0, 1, 3), "layers.0.weight was replaced after initialize()"),
    "swap": (swap, (0, 1), "layers.0.weight was written to"),
    "hook": (hook, (3,), "layers.0.weight got a gradient hook after initialize()"),
    "late hook": (late_hook, (0, 2, 3), "layers.1.bias got a gradient hook after initialize()"),
    "own layer": (own_layer, (0, 1, 2), "step 2 was not taken: ranks 0 and 1 train different parameters"),
}


def change_case(change: str, zero: int) -> str:
    engine = engine_of(zero)
    take_step(engine, 0)

    def change_and_step() -> None:
        CHANGES[change][0](engine)
        take_step(engine, 1)

    with pytest.raises(RuntimeError, match=r"was|got") as caught:
        change_and_step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "zero"),
    [
        (name, zero) if zero == stages[-1] else slow(name, zero)
        for name, (_, stages, _) in CHANGES.items()
        for zero in stages
    ],
)
def test_a_change_that_would_be_lost_is_an_error(ranks: Ranks, change: str, zero: int) -> None:
    for error in ranks.run(2, change_case, change, zero):
        assert error.startswith(CHANGES[change][2])


def first_step_case(zero: int) -> str:
    engine = engine_of(zero)
    own_layer(engine)
    with pytest.raises(ValueError, match="different parameters") as caught:
        take_step(engine, 0)
    return str(caught.value)


@pytest.mark.parametrize("zero", STAGES)
def test_ranks_that_train_different_parameters_are_refused_at_once(ranks: Ranks, zero: int) -> None:
    for error in ranks.run(2, first_step_case, zero):
        assert error.startswith("data-parallel ranks train different parameters (requires_grad differs)")


class Accuracy(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), torch.tensor(0.37)


def accuracy_case() -> str:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD"},
        "parallel": {"device": "cpu"},
    }
    engine = uni3d.initialize(model=Accuracy(), config=config)[0]
    with pytest.raises(RuntimeError, match="not taken") as caught:
        engine.train_batch(iter([(inputs(0, 0),)]))
    return str(caught.value)


def test_an_accuracy_is_not_taken_for_a_number_of_terms(ranks: Ranks) -> None:
    for error in ranks.run(2, accuracy_case):
        assert "numbers of terms add up to 0.74" in error


def discarded_case(zero: int) -> bool:
    engine = engine_of(zero)
    take_step(engine, 0)
    driver = weakref.ref(engine.model.zero._stages[0]._driver)  # it has the process groups
    del engine
    gc.collect()
    return driver() is None


@pytest.mark.parametrize("zero", [slow(0), slow(1), slow(2), 3])
def test_an_engine_that_is_dropped_is_freed(ranks: Ranks, zero: int) -> None:
    """Its process groups go with it; each of them has threads."""
    assert ranks.run(2, discarded_case, zero) == [True, True]
