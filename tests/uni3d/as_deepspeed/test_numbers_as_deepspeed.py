"""Numbers that scripts of DeepSpeed read off schedules, the optimizer and `backward`."""

from typing import Any

import pytest
import torch
from marks import slow
from models import ADAM, Stack, global_batches, micro_batches, seeded
from ranks import Ranks
from torch import nn
from uni3d.deepspeed.runtime import lr_schedules

import uni3d.deepspeed as deepspeed


def test_the_momentum_of_a_cycle() -> None:
    """Begins at the highest momentum, as DeepSpeed's `get_mom()`, though the first step has the lowest."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    schedule: Any = lr_schedules.OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=4, cycle_min_mom=0.7)
    told, used = [], []
    for _ in range(9):
        told.append(schedule.get_mom()[0])
        used.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        schedule.step()
    expected = [0.9, 0.85, 0.8, 0.75, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert told == [(pytest.approx(value), 0.99) for value in expected]
    assert used == [(0.7, 0.99), *told[1:]]
    without: Any = lr_schedules.OneCycle(optimizer, 0.1, 0.5, cycle_momentum=False)
    assert without.get_mom() is None


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "OneCycle", "LRRangeTest", "WarmupCosineLR"])
def test_a_rate_that_is_a_tensor_stays_that_tensor(name: str, shape: tuple[int, ...]) -> None:
    params: dict[str, Any] = {
        "WarmupLR": {"warmup_max_lr": 0.5},
        "WarmupDecayLR": {"total_num_steps": 9, "warmup_max_lr": 0.5},
        "OneCycle": {"cycle_min_lr": 0.2, "cycle_max_lr": 0.5},
        "LRRangeTest": {"lr_range_test_min_lr": 0.2},
        "WarmupCosineLR": {"total_num_steps": 9},
    }[name]
    rates = []
    for rate in (torch.full(shape, 0.1, dtype=torch.float64), 0.1):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=rate)
        schedule: Any = getattr(lr_schedules, name)(optimizer, **params)
        for _ in range(3):
            optimizer.step()
            schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert not isinstance(rate, torch.Tensor) or rates[0] is rate
    assert rates[0].item() == pytest.approx(rates[1])


def test_a_number_of_steps_that_is_none() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(ValueError, match="warmup_num_steps"):
        lr_schedules.WarmupLR(optimizer, warmup_num_steps=None)  # type: ignore[arg-type]


def make(stage: int, model: nn.Module | None = None, **more: Any) -> Any:
    config = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "optimizer": ADAM,
        "parallel": {"device": "cpu"},
        "zero_optimization": {"stage": stage},
    }
    return deepspeed.initialize(model=model or seeded(Stack), config=config | more)[0]


@pytest.mark.parametrize(
    ("more", "dtype"), [({"bf16": {"enabled": True}}, torch.bfloat16), ({}, torch.float32)]
)
def test_backward_returns_the_losses_type(alone: None, more: dict[str, Any], dtype: torch.dtype) -> None:
    engine = make(0, **more)
    x, _ = next(micro_batches(global_batches(1), engine))
    loss = engine(x).mean().to(dtype)
    returned = engine.backward(loss)
    assert returned.dtype == dtype
    torch.testing.assert_close(returned, loss.detach() / 4)


def scaler_case() -> list[tuple[float, int]]:
    engine = make(1, fp16={"enabled": True, "loss_scale_window": 2, "initial_scale_power": 8})
    optimizer: Any = engine.optimizer
    scaler = optimizer.loss_scaler
    assert (optimizer.dynamic_loss_scale, scaler.scale_window, scaler.scale_factor) == (True, 2, 2.0)
    seen = [(scaler.cur_scale, scaler.cur_iter)]
    for batch in global_batches(4):
        for x, y in micro_batches([batch], engine):
            engine.backward((engine(x) - y).square().mean())
            engine.step()
        assert scaler.loss_scale == optimizer.cur_scale == engine.get_loss_scale()
        seen.append((scaler.cur_scale, scaler.cur_iter))
    return seen


def test_the_loss_scaler_of_the_optimizer(ranks: Ranks) -> None:
    expected = [(256.0, 0), (256.0, 1), (256.0, 2), (512.0, 3), (512.0, 4)]
    assert ranks.run(2, scaler_case) == [expected] * 2


def test_the_loss_scaler_without_fp16(alone: None) -> None:
    engine = make(0)
    optimizer = engine.optimizer
    assert engine.sparse_tensor_module_names == set()
    scaler = optimizer.loss_scaler
    assert (optimizer.dynamic_loss_scale, scaler.cur_scale, scaler.scale_window) == (False, 1.0, None)


def sharded_values_case(stage: int) -> None:
    """Between `backward` and `step` parameters may be sharded; values made like them are taken too."""
    engine = make(stage)
    for inputs, targets in micro_batches(global_batches(1), engine):
        loss = (engine(inputs) - targets).square().mean()
        engine.backward(loss)
        if engine.is_gradient_accumulation_boundary():
            for number, parameter in enumerate(engine.module.parameters()):
                value = torch.full_like(parameter, 0.5 + number)
                deepspeed.utils.safe_set_full_grad(parameter, value)
                found = deepspeed.utils.safe_get_full_grad(parameter)
                assert found is not None
                torch.testing.assert_close(found, torch.full(parameter.shape, 0.5 + number))
        engine.step()
    for parameter in engine.module.parameters():
        deepspeed.utils.safe_set_full_fp32_param(parameter, torch.full_like(parameter, 0.25))
        whole = deepspeed.utils.safe_get_full_fp32_param(parameter)
        assert whole is not None
        assert torch.equal(whole, torch.full(parameter.shape, 0.25))


@pytest.mark.parametrize("stage", [slow(0), 1, slow(2), 3])
def test_setters_take_sharded_values(ranks: Ranks, stage: int) -> None:
    ranks.run(2, sharded_values_case, stage)


def frozen_case(stage: int) -> None:
    """Checks that a frozen parameter has no master of its own, as in DeepSpeed."""
    model = seeded(Stack)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    engine = make(stage, model=model)
    whole = deepspeed.utils.safe_get_full_fp32_param
    local = deepspeed.utils.safe_get_local_fp32_param
    for parameter in engine.module.parameters():
        assert (whole(parameter) is None) == (not parameter.requires_grad)
        assert (local(parameter) is None) == (not parameter.requires_grad)


@pytest.mark.parametrize("stage", [1, slow(3)])
def test_a_frozen_parameter(ranks: Ranks, stage: int) -> None:
    ranks.run(2, frozen_case, stage)


def inside_no_sync_case() -> None:
    engine = make(1)
    with engine.no_sync():
        x, y = next(micro_batches(global_batches(1), engine))
        engine.backward((engine(x) - y).square().mean())
        with pytest.raises(RuntimeError, match=r"safe_get_full_grad can't be called inside no_sync\(\)"):
            deepspeed.utils.safe_get_full_grad(next(engine.module.parameters()))


def test_gradients_inside_no_sync(ranks: Ranks) -> None:
    ranks.run(2, inside_no_sync_case)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_an_infinite_loss_whose_gradients_are_finite(alone: None, kind: str) -> None:
    """Is no overflow of fp16, as in DeepSpeed: gradients alone are. Without a loss scale it is an error."""
    engine = make(0, **{kind: {"enabled": True}})
    weight = engine.module.out.weight
    before = weight.detach().clone()
    for x, y in micro_batches(global_batches(1), engine):
        engine.backward((engine(x) - y).square().mean() + float("inf"))
        if kind == "bf16" and engine.is_gradient_accumulation_boundary():
            with pytest.raises(FloatingPointError, match="the loss is inf"):
                engine.step()
            return
        engine.step()
    assert engine.was_step_applied()
    assert engine.skipped_steps == 0
    assert not torch.equal(engine.module.out.weight, before)
