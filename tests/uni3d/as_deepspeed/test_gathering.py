"""`deepspeed.zero`: parameters gathered between steps, at every ZeRO stage, are plain PyTorch's."""

from typing import Any

import pytest
import torch
from marks import STAGES, matrix, slow
from models import (
    ADAM,
    WIDTH,
    Stack,
    assert_same,
    global_batches,
    micro_batches,
    seeded,
    train,
    train_plainly,
)
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
    """Return an engine; `more` are keys of the config, or arguments of `initialize`."""
    arguments = {key: more.pop(key) for key in ("optimizer", "lr_scheduler") if key in more}
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": ADAM,
        "parallel": {"device": "cpu", "tp": tp},
        "zero_optimization": {"stage": stage},
    }
    return deepspeed.initialize(model=model, config=config | more, **arguments)[0]


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
            assert isinstance(parameter, nn.Parameter)
            assert not isinstance(parameter, DTensor)
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


@pytest.mark.parametrize("source", [0, slow(1), slow(None)])
@pytest.mark.parametrize("stage", STAGES)
def test_writes_inside_count(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(2, written_case, "Stack", stage, 1, source)


@pytest.mark.parametrize("source", [matrix(0), 1, slow(None)])
@pytest.mark.parametrize("stage", STAGES)
def test_writes_with_tensor_parallelism(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(2, written_case, "Wide", stage, 2, source)


@pytest.mark.parametrize("source", [matrix(0), slow(3), slow(None)])
@pytest.mark.parametrize("stage", [matrix(1), 3])
def test_writes_with_both(ranks: Ranks, stage: int, source: int | None) -> None:
    ranks.run(4, written_case, "Wide", stage, 2, source)


def bf16_case(stage: int, offload: bool) -> None:
    """A value written in bf16 is the master's; other masters keep their precision."""
    offloaded = {"offload_optimizer": {"device": "cpu" if offload else "none"}}
    zero = {"stage": stage, **offloaded}
    engine = make(seeded(Stack), stage, bf16={"enabled": True}, zero_optimization=zero)
    train(engine, global_batches(2))
    before = whole_now(engine)
    weight = engine.module.out.weight
    with Z.GatheredParameters(weight, modifier_rank=1):
        assert weight.dtype == (torch.float32 if stage == 3 or offload else torch.bfloat16)
        if engine.global_rank == 1:
            weight.data.fill_(0.123)
    after = whole_now(engine)
    written = torch.full_like(before["out.weight"], 0.123)
    if stage < 3 and not offload:
        written = written.bfloat16().float()
    assert torch.equal(after.pop("out.weight"), written)
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in after.values())
    train(engine, global_batches(1))


@pytest.mark.parametrize(("stage", "offload"), [(1, False), slow(3, False), slow(2, True), slow(3, True)])
def test_mixed_precision(ranks: Ranks, stage: int, offload: bool) -> None:
    ranks.run(2, bf16_case, stage, offload)


def refusals_case() -> list[str]:
    engine = make(seeded(Stack), 3)
    data = micro_batches(global_batches(9), engine)
    rank, weight, errors = engine.global_rank, engine.module.out.weight, []
    before = whole_now(engine)

    def refused(run: Any, kind: type[Exception] = RuntimeError) -> None:
        with pytest.raises(kind) as caught:
            run()
        errors.append(str(caught.value))

    def one_rank_writes() -> None:
        with Z.GatheredParameters(engine.module.parameters()):
            if rank == 1:
                weight.data[0, 0] += 1.0

    def body_fails() -> None:
        with Z.GatheredParameters(weight, modifier_rank=0):
            weight.data.zero_()
            if rank == 1:
                raise KeyError("the script's own")
            raise KeyError("on the other rank")

    def another_shape() -> None:
        with Z.GatheredParameters(weight):
            weight.data = torch.zeros(7)

    def runs_stale() -> None:
        with Z.GatheredParameters(weight), torch.no_grad():
            weight.data.zero_()
            engine.module(torch.ones(2, WIDTH))

    def goes_backward() -> None:
        with Z.GatheredParameters(weight):
            engine.module(torch.ones(2, WIDTH)).sum().backward()

    def within_a_step() -> None:
        engine.backward((engine(next(data)[0])).square().mean())
        engine.step()
        with Z.GatheredParameters(weight):
            pass

    def no_such_rank() -> None:
        with Z.GatheredParameters(weight, modifier_rank=2):
            pass

    refused(one_rank_writes)
    refused(body_fails, KeyError)
    refused(another_shape)
    refused(runs_stale)
    refused(no_such_rank, ValueError)
    assert isinstance(weight, DTensor)
    assert all(torch.equal(value, before[name]) for name, value in whole_now(engine).items())
    with Z.GatheredParameters(engine.module.parameters()), torch.no_grad():  # as in generation
        with Z.GatheredParameters(weight):  # nested and overlapping
            inside = engine.module(torch.ones(2, WIDTH))
        assert not isinstance(weight, DTensor)
    oracle = seeded(Stack)
    torch.testing.assert_close(inside, oracle(torch.ones(2, WIDTH)))
    refused(goes_backward)
    engine.zero_grad()
    refused(within_a_step)
    return errors


def test_refusals(ranks: Ranks) -> None:
    errors = ranks.run(2, refusals_case)
    assert errors[0][0] == errors[1][0], "on all ranks"
    for found, expected in zip(
        errors[0],
        (
            "out.weight differs over the ranks at the end of GatheredParameters; write the same on all ranks",
            "on the other rank",
            "out.weight was given the shape (7,) inside GatheredParameters; it has (1, 6)",
            "a forward pass inside GatheredParameters would compute with the values from before it",
            "modifier_rank is 2; the ranks are 0 to 1",
            "a backward pass inside GatheredParameters would lose its gradients",
            "GatheredParameters() can't be called between a step's micro batches",
        ),
        strict=True,
    ):
        assert expected in found


def loaded_case(stage: int) -> None:
    """A state_dict that rank 0 alone has is loaded inside, layer by layer or whole."""
    engine, other = make(seeded(Stack), stage), Stack()
    state = {name: value.clone() for name, value in other.state_dict().items()}
    with Z.GatheredParameters(engine.module.parameters(), modifier_rank=0):
        if engine.global_rank == 0:
            engine.module.load_state_dict(state)
            assert torch.equal(engine.module.state_dict()["out.bias"], state["out.bias"])
    assert_same_on_first(engine, state)
    with Z.GatheredParameters(engine.module.out.parameters(), modifier_rank=0):
        if engine.global_rank == 0:
            zeros = {"out.weight": torch.zeros(1, WIDTH), "out.bias": torch.zeros(1)}
            engine.module.out._load_from_state_dict(zeros, "out.", {}, True, [], [], [])
    assert not whole_now(engine)["out.weight"].any()
    train(engine, global_batches(1))


def assert_same_on_first(engine: Any, state: dict[str, Tensor]) -> None:
    found = whole_now(engine)
    if engine.global_rank == 0:
        assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_load_inside(ranks: Ranks, stage: int) -> None:
    ranks.run(2, loaded_case, stage)


def unknown_engine_case() -> str:
    from models import make_engine

    engine = make_engine(seeded(Stack), zero=3)
    with pytest.raises(RuntimeError) as caught, Z.GatheredParameters(engine.module.parameters()):
        pass
    return str(caught.value)


def test_an_engine_of_another_initialize(ranks: Ranks) -> None:
    assert "make the engine by uni3d.deepspeed.initialize" in ranks.run(2, unknown_engine_case)[0]


def before_case() -> None:
    """Before `initialize`, one rank's values go to all, as when a checkpoint is read on rank 0 alone."""
    rank = torch.distributed.get_rank()
    with Z.Init(config_dict_or_path={"zero_optimization": {"stage": 3}}), Z.Init(dtype=torch.bfloat16):
        low = nn.Linear(2, 2)
    with Z.Init(remote_device="cpu", pin_memory=True):
        model = Stack()
    assert low.weight.dtype == torch.bfloat16
    assert model.out.weight.dtype == torch.get_default_dtype()
    with Z.GatheredParameters(list(model.parameters()), modifier_rank=1):
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(rank))
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())
    with Z.GatheredParameters(model.parameters(), modifier_rank=0, enabled=False):
        pass
    engine = make(model, 3)
    status = Z.ZeroParamStatus
    held = engine.module.out.weight
    assert (held.ds_status, held.ds_shape, held.ds_numel) == (status.NOT_AVAILABLE, (1, WIDTH), WIDTH)
    with Z.GatheredParameters(held):
        assert held.ds_status is status.AVAILABLE
        assert bool((held == 1).all())


def test_before_initialize(ranks: Ranks) -> None:
    ranks.run(2, before_case)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"remote_device": "nvme"}, "nothing is kept on NVMe"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights isn't supported"),
        ({"mpu": object()}, "mpu isn't supported"),
    ],
)
def test_init_refuses(given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Z.Init(**given)
    with pytest.raises(TypeError, match="no argument 'divice'"):
        Z.Init(divice="cpu")
