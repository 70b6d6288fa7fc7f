"""Optimizers and schedules as classes with DeepSpeed's arguments, alone and in an engine."""

import argparse
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from marks import slow
from models import Stack, assert_same, global_batches, make_engine, seeded, train, train_plainly
from ranks import Ranks
from test_gathering import make, whole_now
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from uni3d.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from uni3d.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from uni3d.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from uni3d.deepspeed.runtime import lr_schedules

from uni3d.config import load_config
from uni3d.config.strict import ConfigError
from uni3d.optim.lion import Lion
from uni3d.optim.optimizers import make_optimizer
from uni3d.optim.schedule_classes import make_scheduler

PAIRS: dict[str, Any] = {
    "FusedAdam": (
        lambda p: FusedAdam(p, lr=0.02, weight_decay=0.1, eps=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1, eps=0.01),
    ),
    "Adam": (
        lambda p: FusedAdam(p, lr=0.02, adam_w_mode=False, weight_decay=0.1, eps=0.01, betas=(0.5, 0.9)),
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, eps=0.01, betas=(0.5, 0.9)),
    ),
    "DeepSpeedCPUAdam": (
        lambda p: DeepSpeedCPUAdam(p, 0.02, True, (0.9, 0.999), 0.01, 0.1, True, False),
        lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, eps=0.01, amsgrad=True),
    ),
    "DeepSpeedCPUAdagrad": (
        lambda p: DeepSpeedCPUAdagrad(p, lr=0.02, eps=0.01, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.02, eps=0.01, weight_decay=0.1),
    ),
    "FusedLion": (
        lambda p: FusedLion(p, lr=0.002, weight_decay=0.1),
        lambda p: Lion(p, lr=0.002, betas=(0.9, 0.999), weight_decay=0.1),
    ),
    "DeepSpeedCPULion": (
        lambda p: DeepSpeedCPULion(p, lr=0.002, betas=(0.9, 0.99)),
        lambda p: Lion(p, lr=0.002, betas=(0.9, 0.99)),
    ),
}


def optimizer_case(name: str, stage: int) -> None:
    given, expected = PAIRS[name]
    model, batches = seeded(Stack), global_batches(3)
    losses, _, oracle = train_plainly(model, batches, expected, loss=lambda y, t: (y - t).square().mean())
    engine = make(model, stage, optimizer=given(model.parameters()))
    assert train(engine, batches) == pytest.approx(losses, rel=1e-5)
    assert_same(whole_now(engine), oracle)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("stage", [slow(0), 3])
def test_optimizers(ranks: Ranks, name: str, stage: int) -> None:
    ranks.run(2, optimizer_case, name, stage)


def test_optimizers_refuse() -> None:
    parameters = list(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="always corrects the bias"):
        FusedAdam(parameters, bias_correction=False)
    with pytest.raises(ValueError, match="always fp32"):
        DeepSpeedCPUAdam(parameters, fp32_optimizer_states=False)
    with pytest.raises(ValueError, match="no amsgrad"):
        DeepSpeedCPUAdagrad(parameters, amsgrad=True)
    # As accelerate makes one of torch's.
    plain = torch.optim.AdamW(parameters, lr=0.5)
    made = DeepSpeedCPUAdam(plain.param_groups, lr=0.5, weight_decay=0.01, adamw_mode=True)
    assert made.param_groups[0]["params"] == parameters
    assert made.param_groups[0]["decoupled_weight_decay"]


def rates(scheduler: Any, steps: int) -> list[float]:
    """Return the rate of each optimizer step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def sgd(lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)


def test_warmup() -> None:
    """The formulas of DeepSpeed: step n has the rate of iteration n - 2, and the first the lowest."""
    found = rates(lr_schedules.WarmupLR(sgd(), 0.01, 0.11, 4, "linear"), 8)
    assert found == pytest.approx([0.01, 0.01, 0.035, 0.06, 0.085, 0.11, 0.11, 0.11])
    found = rates(lr_schedules.WarmupLR(sgd(0.5), warmup_num_steps=4), 6)
    assert found == pytest.approx([0.0, *(0.5 * math.log(n) / math.log(4) for n in (1, 2, 3, 4)), 0.5])
    found = rates(lr_schedules.WarmupDecayLR(sgd(), 6, 0.0, 0.1, 2, "linear"), 9)
    assert found == pytest.approx([0.0, 0.0, 0.05, 0.1, 0.075, 0.05, 0.025, 0.0, 0.0])
    found = rates(lr_schedules.WarmupCosineLR(sgd(), 6, 0.5, 2, 0.2, "linear"), 8)
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * n / 4)) / 2 for n in (1, 2, 3, 4, 4)]
    assert found == pytest.approx([0.0, 0.05, 0.075, *(0.1 * ratio for ratio in cosine)])


def test_cycles() -> None:
    found = rates(lr_schedules.OneCycle(sgd(), 0.1, 0.3, 1.0, 2, 2, decay_step_size=1), 7)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.1, 0.05, 0.1 / 3])
    scheduler = lr_schedules.OneCycle(FusedAdam(nn.Linear(2, 2).parameters()), 0.1, 0.3, 0.0, 2, 2)
    betas = [scheduler.optimizer.param_groups[0]["betas"]]
    for _ in range(3):
        scheduler.optimizer.step()
        scheduler.step()
        betas.append(scheduler.optimizer.param_groups[0]["betas"])
    assert [b for b, _ in betas[1:]] == pytest.approx([0.85, 0.8, 0.85])
    assert betas[-1][1] == 0.99
    found = rates(lr_schedules.LRRangeTest(sgd(), 0.01, 2, 1.0), 5)
    assert found == pytest.approx([0.01, 0.015, 0.02, 0.025, 0.03])
    found = rates(lr_schedules.LRRangeTest(sgd(), 0.01, 2, 1.0, True), 5)
    assert found == pytest.approx([0.01, 0.01, 0.02, 0.02, 0.03])


def test_schedules_keep_count() -> None:
    scheduler = lr_schedules.WarmupLR(sgd(), 0.0, 0.1, 4, "linear")
    assert scheduler.last_batch_iteration == -1
    assert rates(scheduler, 3)[-1] == pytest.approx(0.025)
    assert scheduler.last_batch_iteration == 2
    assert scheduler.get_last_lr() == [pytest.approx(0.05)]
    other = lr_schedules.WarmupLR(sgd(), 0.0, 0.1, 4, "linear")
    other.load_state_dict(deepcopy(scheduler.state_dict()))
    other.optimizer.step()
    other.step(1)
    assert other.last_batch_iteration == 1
    with pytest.raises(ConfigError, match="warmup_num_steps"):
        lr_schedules.WarmupLR(sgd(), warmup_num_steps=0)
    with pytest.raises(ConfigError, match="last_batch_iteration"):
        lr_schedules.WarmupLR(sgd(), last_batch_iteration=5)
    assert set(lr_schedules.VALID_LR_SCHEDULES) == {
        *("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest")
    }


def test_schedules_tell_their_parameters() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (0.1, 0.2)]
    warmup = lr_schedules.WarmupLR(torch.optim.Adam(groups), warmup_num_steps=7, warmup_type="linear")
    assert (warmup.warmup_num_steps, warmup.warmup_type) == (7, "linear")
    assert (warmup.min_lrs, warmup.max_lrs) == ([0.0, 0.0], [0.1, 0.2])
    assert warmup.state_dict().keys() == LambdaLR(sgd(), [lambda _: 1.0]).state_dict().keys()
    with pytest.raises(AttributeError, match="WarmupLR has no attribute 'total_num_steps'"):
        warmup.total_num_steps  # noqa: B018
    cycle = lr_schedules.OneCycle(torch.optim.Adam(groups), [0.01, 0.02], [0.1, 0.2], decay_lr_rate=0.5)
    assert (cycle.min_lrs, cycle.max_lrs, cycle.decay_lr_rate) == ([0.01, 0.02], [0.1, 0.2], 0.5)
    cosine = lr_schedules.WarmupCosineLR(torch.optim.Adam(groups), 100, warmup_num_steps=10)
    assert (cosine.total_num_steps, cosine.get_lr_ratio()) == (100, 0.0)
    cosine.optimizer.step()
    cosine.step(1)
    assert cosine.get_lr_ratio() == pytest.approx(math.log(2) / math.log(10))


def schedule_case(stage: int, run: str) -> None:
    """A schedule of the script's own steps with the engine, and resumes."""

    def build() -> Any:
        model = seeded(Stack)
        optimizer = FusedAdam(model.parameters(), lr=0.02)
        schedule = lr_schedules.WarmupLR(optimizer, 0.0, 0.02, 4, "linear")
        return make(model, stage, optimizer=optimizer, lr_scheduler=schedule)

    engine, seen = build(), []
    for _ in range(3):
        seen.append(engine.get_lr()[0])
        train(engine, global_batches(1))
    assert seen == pytest.approx([0.0, 0.0, 0.005])
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    other = build()
    other.load_checkpoint(run)
    assert other.get_lr() == engine.get_lr()
    assert train(other, global_batches(1, seed=4)) == train(engine, global_batches(1, seed=4))
    assert other.get_lr()[0] == pytest.approx(0.015)


def test_a_schedule_in_an_engine(ranks: Ranks, tmp_path: Any) -> None:
    ranks.run(2, schedule_case, 1, str(tmp_path / "run"))


def test_tuning_arguments() -> None:
    parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
    parsed = parser.parse_args(["--lr_schedule", "WarmupLR", "--warmup_num_steps", "7"])
    section, error = lr_schedules.get_config_from_args(parsed)
    assert error == ""
    assert section == {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 7, "warmup_type": "log"},
    }
    assert lr_schedules.get_config_from_args(parser.parse_args([]))[0] is None
    cycle, _ = lr_schedules.get_config_from_args(parser.parse_args(["--lr_schedule", "OneCycle"]))
    assert cycle is not None
    assert "cycle_second_step_size" not in cycle["params"], "-1 is its default"


CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.02}


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {}),
        ("WarmupDecayLR", {"total_num_steps": 9}),
        ("WarmupCosineLR", {"total_num_steps": 9}),
        ("OneCycle", CYCLE),
        ("LRRangeTest", {}),
    ],
)
def test_a_config_makes_the_same_classes(alone: None, kind: str, params: dict[str, Any]) -> None:
    """Scripts ask which schedule and which optimizer they got."""
    config = {"scheduler": {"type": kind, "params": params}, "optimizer": {"type": "Adam"}}
    engine: Any = make_engine(seeded(Stack), zero=1, config=config)
    assert isinstance(engine.lr_scheduler, getattr(lr_schedules, kind))
    assert isinstance(engine.optimizer, FusedAdam)
    assert isinstance(engine.optimizer, torch.optim.AdamW), "as Adam has decoupled weight decay by default"
    assert type(engine.optimizer).__name__ == "AdamW"
    before = engine.lr_scheduler.last_batch_iteration
    train(engine, global_batches(1))
    assert engine.lr_scheduler.last_batch_iteration == before + 1


def test_the_class_of_adam() -> None:
    def made(**params: Any) -> torch.optim.Optimizer:
        config = load_config({"optimizer": {"type": "Adam", "params": params}})
        assert config.optimizer is not None
        return make_optimizer(config.optimizer, [{"params": list(nn.Linear(2, 2).parameters())}])

    coupled = made(adam_w_mode=False)
    assert isinstance(coupled, FusedAdam)
    assert not isinstance(coupled, torch.optim.AdamW)
    assert type(made(torch_adam=True)) is torch.optim.AdamW
    assert type(made(torch_adam=True, adam_w_mode=False)) is torch.optim.Adam


def test_a_cycle_of_the_momentum_that_was_asked_for() -> None:
    section = {"type": "OneCycle", "params": {**CYCLE, "cycle_momentum": True}}
    config = load_config({"scheduler": section}).scheduler
    assert config is not None
    with pytest.raises(ValueError, match="has no betas to cycle"):
        make_scheduler(config, sgd())
