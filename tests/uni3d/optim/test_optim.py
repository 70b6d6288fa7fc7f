"""Optimizers and schedules against DeepSpeed's formulas, written down here a second time.

DeepSpeed's schedules count iterations from 0, and set the rate when they are made, at iteration -1: before
the schedule has begun. The first optimizer step is taken with that rate, the second at iteration 0.
"""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Stack, global_batches, make_engine, seeded, train

from uni3d.config import load_config
from uni3d.optim.optimizers import make_optimizer
from uni3d.optim.schedule_classes import make_scheduler

LRS = (0.01, 0.003)
"""Initial rates of the two parameter groups."""


def rates(kind: str, params: dict[str, Any], steps: int) -> list[list[float]]:
    """Return each group's rate at the optimizer steps 1 to `steps`."""
    config = load_config({"scheduler": {"type": kind, "params": params}}).scheduler
    weights = [torch.zeros(1, requires_grad=True) for _ in LRS]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(weights, LRS, strict=True)]
    optimizer = torch.optim.SGD(groups)
    scheduler = make_scheduler(config, optimizer)
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def warmup(iteration: int, steps: int, kind: str) -> float:
    """Return the progress of the warmup, from 0 at iteration 0 to 1 at iteration `steps`."""
    return math.log(iteration + 1) / math.log(steps) if kind == "log" else iteration / steps


def warmup_lr(iteration: int, low: float, high: float, steps: int, kind: str) -> float:
    if iteration < 0:
        return low
    return low + (high - low) * (warmup(iteration, steps, kind) if iteration < steps else 1.0)


def warmup_decay_lr(iteration: int, low: float, high: float, steps: int, total: int, kind: str) -> float:
    if iteration < steps:
        return warmup_lr(iteration, low, high, steps, kind)
    return low + (high - low) * max(0.0, (total - iteration) / max(1, total - steps))


def warmup_cosine_ratio(iteration: int, low: float, end: float, steps: int, total: int, kind: str) -> float:
    if iteration < 0:
        return 0.0
    if iteration < steps:
        return low + (1 - low) * warmup(iteration, steps, kind)
    done = min(1.0, (iteration - steps + 1) / max(1, total - steps))
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


STEPS = 14
COUNTS = st.integers(1, 9)
KINDS = st.sampled_from(["log", "linear"])
LOW = st.sampled_from([0.0, 0.0005])


@settings(max_examples=30, deadline=None)
@given(COUNTS, KINDS, LOW, st.sampled_from([None, 0.02]))
def test_warmup_lr(steps: int, kind: str, low: float, high: float | None) -> None:
    params = {"warmup_num_steps": steps, "warmup_type": kind, "warmup_min_lr": low}
    found = rates("WarmupLR", params | ({} if high is None else {"warmup_max_lr": high}), STEPS)
    for step, lrs in enumerate(found, start=1):
        expected = [warmup_lr(step - 2, low, high or lr, max(2, steps), kind) for lr in LRS]
        assert lrs == pytest.approx(expected, rel=1e-12), f"step {step}"


@settings(max_examples=30, deadline=None)
@given(COUNTS, COUNTS, KINDS, LOW)
def test_warmup_decay_lr(steps: int, total: int, kind: str, low: float) -> None:
    params = {
        "warmup_num_steps": steps,
        "total_num_steps": total,
        "warmup_type": kind,
        "warmup_min_lr": low,
        "warmup_max_lr": 0.02,
    }
    for step, lrs in enumerate(rates("WarmupDecayLR", params, STEPS), start=1):
        expected = warmup_decay_lr(step - 2, low, 0.02, max(2, steps), total, kind)
        assert lrs == pytest.approx([expected] * 2, rel=1e-12, abs=1e-15), f"step {step}"


@settings(max_examples=30, deadline=None)
@given(COUNTS, COUNTS, KINDS, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1]))
def test_warmup_cosine_lr(steps: int, total: int, kind: str, low: float, end: float) -> None:
    params = {
        "warmup_num_steps": steps,
        "total_num_steps": total,
        "warmup_type": kind,
        "warmup_min_ratio": low,
        "cos_min_ratio": end,
    }
    for step, lrs in enumerate(rates("WarmupCosineLR", params, STEPS), start=1):
        ratio = warmup_cosine_ratio(step - 2, low, end, max(2, steps), total, kind)
        assert lrs == pytest.approx([ratio * lr for lr in LRS], rel=1e-12, abs=1e-15), f"step {step}"


def one_cycle(iteration: int, p: dict[str, Any]) -> tuple[float, float]:
    """Return rate and momentum after the scheduler's step `iteration`, counted from 0.

    A cycle goes up over the first step size and down over the second, between the two bounds, momentum the
    other way round; with stairs, only at the end of each. After it, both decay by the interval since.
    """
    up, down = p["cycle_first_step_size"], p["cycle_second_step_size"]
    low, high, slow, fast = (p[f"cycle_{k}"] for k in ("min_lr", "max_lr", "min_mom", "max_mom"))
    batch = iteration + 1
    if iteration < up + down:
        done = batch % (up + down)
        share = Fraction(done, up) if done <= up else Fraction(up + down - done, down)
        stairs = p["cycle_first_stair_count"] if done <= up else p["cycle_second_stair_count"]
        if stairs:
            share = Fraction(math.floor(share * stairs), stairs)
        return low + (high - low) * float(share), fast - (fast - slow) * float(share)
    if not p["decay_step_size"]:
        return low, fast
    interval = (batch - up - down) / p["decay_step_size"]
    return low / (1 + p["decay_lr_rate"] * interval), fast * (1 + p["decay_mom_rate"] * interval)


@settings(max_examples=40, deadline=None)
@given(COUNTS, COUNTS, st.integers(0, 3), st.integers(0, 3), st.integers(0, 4), st.sampled_from([0.0, 0.001]))
def test_one_cycle(up: int, down: int, stairs: int, more: int, decay: int, rise: float) -> None:
    params = {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.02,
        "decay_lr_rate": 0.5,
        "cycle_first_step_size": up,
        "cycle_second_step_size": down,
        "cycle_first_stair_count": stairs,
        "cycle_second_stair_count": more,
        "decay_step_size": decay,
        "cycle_min_mom": 0.7,
        "cycle_max_mom": 0.95,
        "decay_mom_rate": rise,
    }
    config = load_config({"scheduler": {"type": "OneCycle", "params": params}}).scheduler
    weights = [torch.zeros(1, requires_grad=True) for _ in LRS]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": lr} for w, lr in zip(weights, LRS, strict=True)])
    scheduler = make_scheduler(config, optimizer)
    first = {(group["lr"], group["betas"]) for group in optimizer.param_groups}
    assert first == {(0.001, (0.7, 0.99))}, "both at their lowest, before the schedule has begun"
    for iteration in range(22):
        optimizer.step()
        scheduler.step()
        rate, momentum = one_cycle(iteration, params)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate, rel=1e-12), f"iteration {iteration}"
            assert group["betas"] == (pytest.approx(momentum, rel=1e-12), 0.99), f"iteration {iteration}"


ONE_CYCLE = {"cycle_min_lr": 0.0, "cycle_max_lr": 0.4, "cycle_first_step_size": 4}


def test_one_cycle_by_hand_with_its_defaults() -> None:
    found = rates("OneCycle", ONE_CYCLE, 12)  # SGD has no betas, so no momentum is cycled
    expected = [0.0, 0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]
    assert found == [pytest.approx([rate] * 2, abs=1e-15) for rate in expected]
    with pytest.raises(ValueError, match=r"cycle_momentum is true, but SGD has no betas to cycle"):
        rates("OneCycle", ONE_CYCLE | {"cycle_momentum": True}, 1)


def test_momentum_that_decay_makes_grow_stays_below_one() -> None:
    params = ONE_CYCLE | {"decay_step_size": 1, "decay_mom_rate": 1.0, "cycle_max_mom": 0.9}
    config = load_config({"scheduler": {"type": "OneCycle", "params": params}}).scheduler
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    scheduler = make_scheduler(config, optimizer)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["betas"] == (0.999, 0.99)


@settings(max_examples=30, deadline=None)
@given(COUNTS, st.booleans(), st.sampled_from([0.0, 0.5, 3.0]))
def test_lr_range_test(size: int, staircase: bool, growth: float) -> None:
    params = {
        "lr_range_test_min_lr": 0.002,
        "lr_range_test_step_size": size,
        "lr_range_test_step_rate": growth,
        "lr_range_test_staircase": staircase,
    }
    for step, lrs in enumerate(rates("LRRangeTest", params, STEPS)):
        interval = math.floor(step / size) if staircase else step / size
        assert lrs == pytest.approx([0.002 * (1 + growth * interval)] * 2, rel=1e-12), f"step {step}"


LISTS: list[tuple[str, dict[str, Any], dict[str, list[float]]]] = [
    ("WarmupLR", {"warmup_num_steps": 3}, {"warmup_min_lr": [0.001, 0.002], "warmup_max_lr": [0.01, 0.03]}),
    ("WarmupLR", {"warmup_num_steps": 3}, {"warmup_min_lr": [0.001, 0.0]}),
    ("WarmupDecayLR", {"total_num_steps": 9, "warmup_num_steps": 3}, {"warmup_max_lr": [0.01, 0.03]}),
    (
        "OneCycle",
        {"cycle_first_step_size": 3, "cycle_momentum": False},
        {"cycle_min_lr": [0.001, 0.002], "cycle_max_lr": [0.01, 0.03]},
    ),
    ("LRRangeTest", {"lr_range_test_step_size": 2}, {"lr_range_test_min_lr": [0.01, 0.03]}),
]


@pytest.mark.parametrize(("kind", "params", "lists"), LISTS)
def test_a_list_has_a_number_for_each_group(
    kind: str, params: dict[str, Any], lists: dict[str, list[float]]
) -> None:
    """Each group's rates are those of the schedule with its numbers alone."""
    found = rates(kind, params | lists, STEPS)
    for group in range(len(LRS)):
        alone = rates(kind, params | {name: values[group] for name, values in lists.items()}, STEPS)
        assert [lrs[group] for lrs in found] == [lrs[group] for lrs in alone]
    name = next(iter(lists))
    with pytest.raises(
        ValueError, match=rf"^scheduler\.params\.{name} has 3 numbers, but there are 2 parameter"
    ):
        rates(kind, params | lists | {name: [0.01, 0.02, 0.03]}, 1)
    with pytest.raises(ValueError, match=rf"scheduler\.params\.{name}\.1 is -1: "):
        rates(kind, params | lists | {name: [0.01, -1]}, 1)


def test_momenta_of_each_group() -> None:
    params = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.02, "cycle_first_step_size": 2}
    moms = {"cycle_min_mom": [0.5, 0.6], "cycle_max_mom": [0.7, 0.9]}
    config = load_config({"scheduler": {"type": "OneCycle", "params": params | moms}}).scheduler
    assert config is not None
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(2)]
    optimizer = torch.optim.Adam(groups)
    scheduler = make_scheduler(config, optimizer)
    optimizer.step()
    scheduler.step()
    found = [group["betas"] for group in optimizer.param_groups]
    assert found == [(pytest.approx(0.6), 0.99), (pytest.approx(0.75), 0.99)], "half way up"


def test_cycled_momentum_goes_on_after_a_load(alone: None, tmp_path: Path) -> None:
    schedule = {"type": "OneCycle", "params": ONE_CYCLE | {"cycle_min_lr": 0.01}}
    engine = make_engine(seeded(Stack), config={"scheduler": schedule})
    batches = global_batches(6)
    train(engine, batches[:3])
    engine.save_checkpoint(tmp_path)
    expected = train(engine, batches[3:])
    other = make_engine(seeded(Stack), config={"scheduler": schedule})
    other.load_checkpoint(tmp_path)  # warnings are errors: that the momentum has moved isn't worth one
    assert other.optimizer.param_groups[0]["betas"] == (pytest.approx(0.825), 0.99)
    assert train(other, batches[3:]) == expected


def test_a_constant_end_of_the_linear_warmup() -> None:
    """Check a few numbers by hand, as the formulas above could share an error with the code."""
    found = rates("WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, 7)
    shares = [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert found == [pytest.approx([share * lr for lr in LRS]) for share in shares]


def optimizer_steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> torch.Tensor:
    for step in range(4):
        weight.grad = torch.cos(torch.arange(6.0) + step)
        optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize(
    ("config", "kind", "params"),
    [
        ({"type": "AdamW"}, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.0}),
        (
            {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-3, "weight_decay": 0.2}},
            torch.optim.AdamW,
            {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2},
        ),
        (
            {
                "type": "Adam",
                "params": {"lr": 0.1, "weight_decay": 0.2},
            },  # DeepSpeed's default is AdamW's decay
            torch.optim.AdamW,
            {"lr": 0.1, "weight_decay": 0.2},
        ),
        (
            {"type": "Adam", "params": {"lr": 0.1, "weight_decay": 0.2, "adam_w_mode": False}},
            torch.optim.Adam,
            {"lr": 0.1, "weight_decay": 0.2},
        ),
        ({"type": "adamw"}, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.0}),
        (
            {"type": "AdamW", "params": {"torch_adam": True}},
            torch.optim.AdamW,
            {"lr": 1e-3, "weight_decay": 0.01},
        ),
        ({"type": "SGD"}, torch.optim.SGD, {"lr": 1e-3}),
        (
            {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True}},
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "nesterov": True},
        ),
    ],
)
def test_optimizers(config: dict[str, Any], kind: Any, params: dict[str, Any]) -> None:
    settings = load_config({"optimizer": config}).optimizer
    mine, theirs = torch.ones(6, requires_grad=True), torch.ones(6, requires_grad=True)
    optimizer = make_optimizer(settings, [{"params": [mine]}])
    assert isinstance(optimizer, kind)
    assert type(optimizer).__name__ == kind.__name__, "which is what a checkpoint is compared by"
    found = optimizer_steps(optimizer, mine)
    expected = optimizer_steps(kind([theirs], **params, foreach=False), theirs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_group_s_own_hyperparameters_come_first() -> None:
    settings = load_config({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}}})
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1], "weight_decay": 0.0}, {"params": weights[1:], "lr": 0.7}]
    made = make_optimizer(settings.optimizer, groups).param_groups
    assert [(group["lr"], group["weight_decay"]) for group in made] == [(0.1, 0.0), (0.7, 0.5)]
