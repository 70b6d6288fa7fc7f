"""fp16's loss scale: its changes, and an overflow on one rank, which skips the step on all."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import slow
from models import (
    Stack,
    global_batches,
    make_engine,
    micro_batches,
    save_and_wait,
    seeded,
    train,
    whole,
)
from ranks import Ranks
from torch import Tensor

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
        ("....", {"loss_scale_window": 4}, 2.0**16),
        (".....", {"loss_scale_window": 4}, 2.0**17),
        ("........", {"loss_scale_window": 4}, 2.0**17),
        (".........", {"loss_scale_window": 4}, 2.0**18),
        ("...x.....", {"loss_scale_window": 4, "hysteresis": 1}, 2.0**16),
        ("...x....", {"loss_scale_window": 4, "hysteresis": 1}, 2.0**15),
        ("xx.....x", {"loss_scale_window": 4}, 2.0**16),  # growing restores hysteresis
        ("xx", {"initial_scale_power": 1, "hysteresis": 1, "min_loss_scale": 0.5}, 0.5),
        ("xxx....", {"loss_scale": 128.0, "loss_scale_window": 2}, 128.0),  # static
    ],
)
def test_how_the_scale_moves(steps: str, settings: dict[str, Any], expected: float) -> None:
    assert scale_after(steps, **settings) == expected


class DeepSpeedsRule:
    """A restatement of how DeepSpeed's `DynamicLossScaler` counts."""

    def __init__(self, power: int, window: int, hysteresis: int, consecutive: bool, smallest: float) -> None:
        self.scale, self.smallest = 2.0**power, smallest
        self.window, self.consecutive = window, consecutive
        self.delay = self.left = hysteresis
        self.iteration, self.last_overflow = 0, -1

    def step(self, overflow: bool) -> bool:
        """Return whether training may go on."""
        if overflow:
            self.last_overflow = self.iteration
            if self.delay > 1 and self.left > 1:
                self.left -= 1
            elif self.scale == self.smallest:
                return False
            else:
                self.scale = max(self.scale / 2, self.smallest)
        else:
            if self.consecutive:
                self.left = self.delay
            stable = self.iteration - self.last_overflow - 1
            if stable > 0 and stable % self.window == 0:
                self.left = self.delay
                self.scale *= 2
        self.iteration += 1
        return True


@given(st.lists(st.booleans(), max_size=60), st.data())
def test_the_scale_moves_as_deepspeeds(overflows: list[bool], data: st.DataObject) -> None:
    window, hysteresis = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    consecutive, smallest = data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 0.5, 8.0, 3.0]))
    resumed_at = data.draw(st.integers(0, len(overflows)))
    rule = DeepSpeedsRule(5, window, hysteresis, consecutive, smallest)
    config = FP16Config(
        initial_scale_power=5,
        loss_scale_window=window,
        hysteresis=hysteresis,
        consecutive_hysteresis=consecutive,
        min_loss_scale=smallest,
    )
    scaler = LossScale(config)
    for step, overflow in enumerate(overflows):
        if step == resumed_at:
            state = scaler.state_dict()
            scaler = LossScale(config)
            scaler.load_state_dict(state)
        if not rule.step(overflow):
            with pytest.raises(FloatingPointError):
                scaler.update(overflow=overflow)
            return
        scaler.update(overflow=overflow)
        assert scaler.scale == rule.scale, f"after {overflows[: step + 1]}"


def test_a_resumed_run_without_hysteresis_reacts_at_once() -> None:
    patient = LossScale(FP16Config(hysteresis=3))
    impatient = LossScale(FP16Config(hysteresis=1))
    impatient.load_state_dict(patient.state_dict())
    impatient.update(overflow=True)
    assert impatient.scale == 2.0**15


def test_the_scales_of_an_engine(alone: None) -> None:
    """A window of 2: DeepSpeed's scale is doubled by the third good step, then by every second."""
    fp16 = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    engine = make_engine(seeded(Stack), config={"fp16": fp16})
    data = micro_batches(global_batches(6), engine)
    scales = []
    for _ in range(6):
        engine.train_batch(data)
        scales.append(engine.get_loss_scale())
    assert scales == [256, 256, 512, 512, 1024, 1024]


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


@pytest.mark.parametrize("failing_rank", [slow(0), 1])
@pytest.mark.parametrize(
    ("zero", "pp", "tp"),
    [(0, 1, 1), slow(1, 1, 1), slow(2, 1, 1), (3, 1, 1), (1, 2, 1), (3, 1, 2)],
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
    weights, theirs = resumed.module_state_dict(), engine.module_state_dict()
    assert weights.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name])
