"""fp16's loss scale: its changes, and an overflow on one rank, which skips the step on all."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stack, global_batches, make_engine, save_and_wait, seeded, train, whole
from ranks import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from uni3d.config import FP16Config
from uni3d.optim.loss_scale import LossScale

FP16 = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}


def scale_after(steps: str, **settings: Any) -> float:
    """Run `steps`: an "x" for each overflow and a "." for each good step."""
    scaler = LossScale(FP16Config(enabled=True, **settings))
    for step in steps:
        scaler.update(overflow=step == "x")
    return scaler.scale


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        ("", {}, 2.0**16),
        ("x", {}, 2.0**16),  # the first of two that hysteresis allows
        ("xx", {}, 2.0**15),
        ("xxx", {}, 2.0**14),  # used up until the scale grows
        ("x", {"hysteresis": 1}, 2.0**15),
        ("x.x", {"consecutive_hysteresis": False}, 2.0**15),
        ("x.x", {"consecutive_hysteresis": True}, 2.0**16),
        ("....", {"loss_scale_window": 4}, 2.0**17),
        ("...x....", {"loss_scale_window": 4, "hysteresis": 1}, 2.0**16),
        ("...x...", {"loss_scale_window": 4, "hysteresis": 1}, 2.0**15),
        ("xx....x", {"loss_scale_window": 4}, 2.0**16),  # growing restores hysteresis
        ("xx", {"initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 0.5}, 0.5),
        ("xxx....", {"loss_scale": 128.0, "loss_scale_window": 2}, 128.0),  # static
    ],
)
def test_how_the_scale_moves(steps: str, settings: dict[str, Any], expected: float) -> None:
    assert scale_after(steps, **settings) == expected


def test_an_overflow_at_the_smallest_scale_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match=r"at a loss scale of 1, and fp16\.min_loss_scale is 1"):
        scale_after("xxx", initial_scale_power=1, hysteresis=1)


class Overflow(torch.autograd.Function):
    """Identity with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, float("inf"))


class Split(Stack):
    """`Stack` that tensor parallelism can split."""

    def __init__(self) -> None:
        super().__init__(layers=1)

    @property
    def tp_plan(self) -> dict[str, str]:
        return {"layers.0.0": "colwise", "out": "rowwise"}


def overflow_case(zero: int, pp: int, tp: int, failing_rank: int) -> Any:
    parallel = {"pp": pp, "tp": tp, "device": "cpu"}
    model = seeded(Split) if tp > 1 else seeded(Stack)
    engine = make_engine(model, zero=zero, config={"parallel": parallel, "fp16": FP16})
    batches = global_batches(4)
    losses = train(engine, batches[:1])
    before = whole(engine.module)
    if engine.global_rank == failing_rank:
        layer = next(m for m in engine.module.modules() if isinstance(m, torch.nn.Linear))
        hook = layer.register_forward_hook(lambda _m, _a, output: Overflow.apply(output))
    losses += train(engine, batches[1:2])
    if engine.global_rank == failing_rank:
        hook.remove()
    skipped = (engine.was_step_applied(), engine.skipped_steps, engine.get_loss_scale(), engine.global_steps)
    unchanged = all(torch.equal(t, before[n]) for n, t in whole(engine.module).items())
    losses += train(engine, batches[2:])
    changed = any(not torch.equal(t, before[n]) for n, t in whole(engine.module).items())
    after = (engine.was_step_applied(), engine.skipped_steps, engine.get_loss_scale(), engine.global_steps)
    return losses, skipped, unchanged, changed, after


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize(
    ("zero", "pp", "tp"),
    [(0, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (3, 1, 2)],
    ids=["dp2-zero0", "dp2-zero1", "dp2-zero2", "dp2-zero3", "pp2", "tp2"],
)
def test_an_overflow_on_one_rank(ranks: Ranks, zero: int, pp: int, tp: int, failing_rank: int) -> None:
    results = ranks.run(2, overflow_case, zero, pp, tp, failing_rank)
    assert results[0] == results[1], "all ranks know the same"
    losses, skipped, unchanged, changed, after = results[0]
    assert skipped == (False, 1, 512.0, 2)
    assert unchanged
    assert changed, "training went on"
    assert after == (True, 1, 512.0, 4)
    assert losses[3] < losses[0]


def test_the_scale_is_part_of_a_checkpoint(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), config={"fp16": FP16})
    train(engine, global_batches(1))
    engine.scaler.update(overflow=True)
    engine.save_checkpoint(tmp_path)
    resumed = make_engine(seeded(Stack), config={"fp16": FP16})
    resumed.load_checkpoint(tmp_path)
    assert resumed.get_loss_scale() == 512.0
    assert resumed.scaler.state_dict() == engine.scaler.state_dict()
    with pytest.warns(UserWarning, match=r"loss scale \(512\) isn't used: this run isn't in fp16"):
        make_engine(seeded(Stack), config={"bf16": {"enabled": True}}).load_checkpoint(tmp_path)
    plain = make_engine(seeded(Stack))
    train(plain, global_batches(1))
    save_and_wait(plain, tmp_path / "plain")
    with pytest.warns(UserWarning, match=r"has no loss scale.*it starts at 1024"):
        make_engine(seeded(Stack), config={"fp16": FP16}).load_checkpoint(tmp_path / "plain")


def test_a_resume_in_another_precision_keeps_the_fp32_weights(alone: None, tmp_path: Path) -> None:
    """Resume in another precision: master weights are fp32 in all of them, so nothing is rounded."""
    engine = make_engine(seeded(Stack), config={"bf16": {"enabled": True}})
    train(engine, global_batches(2))
    engine.save_checkpoint(tmp_path)
    resumed = make_engine(seeded(Stack))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_checkpoint(tmp_path)
    for name, tensor in whole(engine.module).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole(resumed.module)[name])
    assert not isinstance(next(iter(whole(engine.module).values())), DTensor)
