"""The weights of `engine.module` between steps: whole at ZeRO 0-2; its `state_dict` at every stage."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import STAGES, matrix, slow
from models import Stack, seeded
from ranks import Ranks
from torch import Tensor, nn

import uni3d
from parallel import state_dicts

WIDTH = 6


class Net(nn.Module):
    """A net with an uneven first dim, a buffer, a scalar and two names of one weight."""

    tp_plan = {"up": "colwise", "down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 10)
        self.down = nn.Linear(10, 7)
        self.again = nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7, bias=False)
        self.tied.weight = self.again.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.tied(torch.tanh(self.again(self.down(torch.tanh(self.up(x))))))
        return (x * self.scale).square().mean()


def engine_of(zero: int, **config: Any) -> uni3d.Engine:
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "parallel": {"device": "cpu"},
    }
    engine: uni3d.Engine = uni3d.initialize(model=seeded(Net), config=values | config)[0]
    return engine


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def take_step(engine: uni3d.Engine, step: int) -> None:
    engine.backward(engine(inputs(step, engine.model.topology.dp_rank)))
    engine.step()


class Plain:
    """One process of plain PyTorch that takes the same steps."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.model = seeded(Net)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        for rank in range(self.ranks):
            calls = self.model.calls.clone()
            (self.model(inputs(step, rank)) / self.ranks).backward()
            self.model.calls.copy_(calls)
        self.model.calls += 1
        self.optimizer.step()


def assert_alike(found: dict[str, Any], model: nn.Module, **tolerance: float) -> None:
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert type(tensor) is Tensor, name
        torch.testing.assert_close(tensor.float(), expected[name], msg=name, **tolerance)


CLOSE = {"rtol": 1e-5, "atol": 1e-6}


# --- reading ---------------------------------------------------------------------------------------------


def alone_case(zero: int, on_rank: int) -> dict[str, Any] | None:
    engine = engine_of(zero)
    found = None
    for step in range(3):
        take_step(engine, step)
        if engine.global_rank == on_rank:  # the others go on to the next step
            found = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
            whole: Tensor = engine.module.down.weight  # type: ignore[assignment,union-attr]
            assert torch.allclose(whole, found["down.weight"])
            assert torch.equal(whole * 1, found["down.weight"])
    return found


@pytest.mark.parametrize(("zero", "on_rank"), [(0, 1), (1, 0), slow(1, 1), slow(2, 0), (2, 1)])
def test_one_rank_alone_reads_whole_weights(ranks: Ranks, zero: int, on_rank: int) -> None:
    plain = Plain(2)
    for step in range(3):
        plain.step(step)
    found = ranks.run(2, alone_case, zero, on_rank)
    assert found[1 - on_rank] is None
    assert_alike(found[on_rank], plain.model, **CLOSE)
    seeded(Net).load_state_dict(found[on_rank])


def together_case(zero: int, between: bool, config: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(zero, **config)
    take_step(engine, 0)
    if between:  # the parameters are sharded from the last backward pass to the step
        engine.backward(engine(inputs(1, engine.model.topology.dp_rank)))
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("zero", [slow(0), slow(1), 2, 3])
def test_all_ranks_read_whole_weights_together(ranks: Ranks, zero: int, between: bool) -> None:
    plain = Plain(2)
    plain.step(0)
    for found in ranks.run(2, together_case, zero, between, {}):
        del found["calls"]
        expected = {k: v for k, v in plain.model.state_dict().items() if k != "calls"}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert type(tensor) is Tensor
            torch.testing.assert_close(tensor, expected[name], **CLOSE)


@pytest.mark.parametrize("zero", [slow(0), 2, slow(3)])
def test_state_dict_gathers_over_tensor_parallel_ranks(ranks: Ranks, zero: int) -> None:
    plain = Plain(1)
    plain.step(0)
    for found in ranks.run(2, together_case, zero, False, {"parallel": {"device": "cpu", "tp": 2}}):
        assert_alike(found, plain.model, **CLOSE)


def impatient_case(zero: int) -> str | None:
    state_dicts.PATIENCE = timedelta(seconds=1)
    engine = engine_of(zero)
    take_step(engine, 0)
    if engine.global_rank == 0:
        return None
    with pytest.raises(RuntimeError, match="on all ranks") as caught:
        engine.module.state_dict()
    return str(caught.value)


def test_sharded_weights_are_not_waited_for_without_end(ranks: Ranks) -> None:
    error = ranks.run(2, impatient_case, 3)[1]
    assert "only 1 of 2 called it within 1 s" in error


def stages_case() -> str:
    config = {"train_micro_batch_size_per_gpu": 1, "parallel": {"device": "cpu", "pp": 2}}
    engine = uni3d.initialize(model=seeded(Stack), config=config | {"optimizer": {"type": "SGD"}})[0]
    with pytest.raises(RuntimeError, match="module_state_dict") as caught:
        engine.module.state_dict()
    return str(caught.value)


def test_a_pipeline_stage_is_not_the_whole_model(ranks: Ranks) -> None:
    assert all("only its own stages" in error for error in ranks.run(2, stages_case))


# --- writing ---------------------------------------------------------------------------------------------


def halve(parameters: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(0.5)


def halve_data(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.mul_(0.5)


def replace_data(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data * 0.5


def average(parameters: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            mean = torch.full_like(parameter, 0.1)
            parameter.copy_(mean.lerp_(parameter, 0.75))


def broadcast(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        values = torch.linspace(-1, 1, parameter.numel()).view(parameter.shape)
        parameter.data.copy_(values if not dist.is_initialized() or dist.get_rank() == 0 else values * 0)
        if dist.is_initialized():
            dist.broadcast(parameter.data, src=0)


WRITES: dict[str, Callable[[Iterable[Tensor]], None]] = {
    "in place": halve,
    "data in place": halve_data,
    "data": replace_data,
    "average": average,
    "broadcast": broadcast,
}


def write_case(zero: int, how: str, evaluate: bool) -> dict[str, Any]:
    engine = engine_of(zero)
    for step in range(3):
        take_step(engine, step)
        if evaluate:
            with torch.no_grad():
                engine(inputs(7, engine.global_rank))
        engine.module_state_dict()  # looks at the weights before the writes too
        WRITES[how](engine.module.parameters())
    take_step(engine, 3)
    return engine.module_state_dict()


@pytest.mark.parametrize("evaluate", [False, slow(True)])
@pytest.mark.parametrize(
    ("zero", "how"),
    [
        (zero, how)
        if (zero, how) in ((0, "data"), (1, "broadcast"), (2, "data in place"))
        else matrix(zero, how)
        for zero in (0, 1, 2)
        for how in WRITES
    ],
)
def test_writes_between_steps_count(ranks: Ranks, zero: int, how: str, evaluate: bool) -> None:
    plain = Plain(2)
    for step in range(3):
        plain.step(step)
        WRITES[how](plain.model.parameters())
    plain.step(3)
    for found in ranks.run(2, write_case, zero, how, evaluate):
        del found["calls"]
        for name, weight in plain.model.named_parameters(remove_duplicate=False):
            torch.testing.assert_close(found[name], weight.detach(), msg=name, **CLOSE)


def load_case(zero: int, weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    engine = engine_of(zero, **config)
    take_step(engine, 0)
    report = engine.module.load_state_dict(weights)
    assert not report.missing_keys
    return engine.module_state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"bf16": {"enabled": True}}, {"parallel": {"device": "cpu", "tp": 2}}]
)
@pytest.mark.parametrize("zero", STAGES)
def test_a_plain_state_dict_loads_exactly(ranks: Ranks, zero: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {k: torch.randn(v.shape, generator=generator) for k, v in seeded(Net).state_dict().items()}
    weights["tied.weight"] = weights["again.weight"]
    for found in ranks.run(2, load_case, zero, weights, options):
        for name, tensor in weights.items():
            assert torch.equal(found[name], tensor), name


def masters_case(zero: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write one weight in bf16; the masters of the others shall keep the bits that bf16 doesn't have."""
    engine = engine_of(zero, bf16={"enabled": True})
    take_step(engine, 0)
    before = engine.module_state_dict()
    with torch.no_grad():
        engine.module.up.weight.fill_(0.25)  # type: ignore[operator,union-attr]
    return before, engine.module_state_dict()


@pytest.mark.parametrize("zero", [slow(0), slow(1), 2])
def test_masters_keep_their_precision(ranks: Ranks, zero: int) -> None:
    for before, after in ranks.run(2, masters_case, zero):
        assert (after.pop("up.weight") == 0.25).all()
        del before["up.weight"]
        assert any((tensor != tensor.bfloat16()).any() for tensor in before.values())
        assert all(torch.equal(before[name], after[name]) for name in after)


# --- the optimizer's parameters --------------------------------------------------------------------------


def added_case(zero: int) -> dict[str, Any]:
    model = seeded(Net)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "parallel": {"device": "cpu"},
    }
    optimizer = torch.optim.SGD([*model.up.parameters(), model.scale], lr=0.1, momentum=0.9)
    engine = uni3d.initialize(model=model, optimizer=optimizer, config=config)[0]
    take_step(engine, 0)
    optimizer.add_param_group({"params": [engine.module.down.weight]})  # type: ignore[union-attr]
    take_step(engine, 1)
    found = engine.module_state_dict()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    with pytest.raises(ValueError, match="1 parameters that aren't the engine's"):
        take_step(engine, 2)
    return found


@pytest.mark.parametrize("zero", [0, slow(1), 2, slow(3)])
def test_parameters_added_to_the_optimizer_train(ranks: Ranks, zero: int) -> None:
    plain = Plain(2)
    model = plain.model
    plain.optimizer = torch.optim.SGD([*model.up.parameters(), model.scale], lr=0.1, momentum=0.9)
    plain.step(0)
    model.down.weight.grad = None
    plain.optimizer.add_param_group({"params": [model.down.weight]})
    plain.step(1)
    for found in ranks.run(2, added_case, zero):
        for name, weight in model.named_parameters():
            torch.testing.assert_close(found[name], weight.detach(), msg=name, **CLOSE)
