"""Habits of scripts around an engine come out as in plain PyTorch, or are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import OwnLoss, global_batches, make_engine, micro_batches, save_and_wait, seeded
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, SequentialLR

import uni3d

WIDTH = 6


class Normed(nn.Module):
    """A model with a batch norm, which scripts freeze by putting it into eval mode."""

    returns_loss = True

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm, self.out = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.out(self.norm(self.lin(x))), y)


def frozen_norm_case(zero: int, size: int) -> Any:
    engine = make_engine(seeded(Normed), zero=zero, micro=12 // size)
    ((x, y),) = global_batches(1)
    mine = [(x.chunk(size)[engine.global_rank], y.chunk(size)[engine.global_rank])]
    engine.train()
    engine.module.norm.eval()
    evaluated = engine.eval_batch(iter(mine)).item()
    modes = engine.module.training, engine.module.norm.training, engine.module.lin.training
    trained = engine.train_batch(iter(mine)).item()
    return (
        evaluated,
        trained,
        modes,
        engine.module.norm.training,
        engine.module.norm.num_batches_tracked.item(),
    )


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("zero", [0, 3])
def test_modules_that_the_script_put_into_eval_mode_stay_in_it(ranks: Ranks, zero: int, size: int) -> None:
    plain = seeded(Normed)
    ((x, y),) = global_batches(1)
    expected = plain.eval()(
        x, y
    ).item()  # a linear model without dropout: the frozen norm is all that matters
    for evaluated, trained, modes, norm, counted in ranks.run(size, frozen_norm_case, zero, size):
        assert (evaluated, trained) == pytest.approx((expected, expected), rel=1e-5)
        assert modes == (True, False, True)
        assert (norm, counted) == (False, 0)


class Merging(nn.Linear):
    """A layer whose weights are changed in eval mode, as by LoRA, and changed back by `train`."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            with torch.no_grad():
                self.weight.mul_(0.5 if mode else 2.0)
        return super().train(mode)


class Merged(OwnLoss):
    def __init__(self) -> None:
        super().__init__()
        self.out = Merging(WIDTH, 1)


def merging_case() -> tuple[bool, bool]:
    engine = make_engine(seeded(Merged), micro=12)
    engine.train()
    before = engine.module_state_dict()["out.weight"]
    engine.eval_batch(iter(global_batches(1)))
    return torch.equal(engine.module_state_dict()["out.weight"], before), engine.module.out.training


def test_a_layer_with_its_own_train_is_told_of_both_modes(ranks: Ranks) -> None:
    assert ranks.run(1, merging_case) == [(True, True)]


def own_step_case() -> None:
    engine = make_engine(seeded(OwnLoss), zero=1)
    for x, y in micro_batches(global_batches(2), engine):
        engine.backward(engine(x, y))
        engine.optimizer.step()


def test_a_loop_that_steps_the_optimizer_itself_is_refused(ranks: Ranks) -> None:
    """The engine would neither clip nor count, nor move the schedule."""
    with pytest.raises(
        RankError, match=r"call engine.step\(\) after each backward\(\), and not optimizer.step"
    ):
        ranks.run(2, own_step_case)


class Cached(torch.optim.SGD):
    """An optimizer that keeps a list of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.flat = {"all": [p for group in self.param_groups for p in group["params"]]}


def cached_case() -> None:
    model = seeded(OwnLoss)
    make_engine(model, optimizer=Cached(p for p in model.parameters() if p.requires_grad))


def test_an_optimizer_that_would_step_other_tensors_is_refused(ranks: Ranks) -> None:
    message = r"Cached also keeps parameters in .flat, .* such as lambda groups: Cached\(groups\)"
    with pytest.raises(RankError, match=message):
        ranks.run(1, cached_case)


class NoRate(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"scale": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["scale"])


def no_rate_case() -> Any:
    engine = make_engine(seeded(OwnLoss), optimizer=NoRate)
    losses = []
    for _ in range(3):
        losses.append(engine.train_batch(micro_batches(global_batches(1), engine)).item())
    return losses, engine.get_lr()


def test_an_optimizer_without_a_rate_trains(ranks: Ranks) -> None:
    ((losses, rates),) = ranks.run(1, no_rate_case)
    assert losses[-1] < losses[0]
    assert rates == [0.0]


def warmed(optimizer: torch.optim.Optimizer) -> SequentialLR:
    parts = [
        LinearLR(optimizer, 0.1, total_iters=2),
        ExponentialLR(optimizer, 0.9),
        ConstantLR(optimizer, 0.5),
    ]
    return SequentialLR(optimizer, parts, [2, 4])


def scheduler_case(run: Path, steps: list[int]) -> Any:
    """Train by the steps of each part, going on from a checkpoint before each but the first."""
    rates = []
    for part, count in enumerate(steps):
        engine = make_engine(seeded(OwnLoss), micro=12, lr_scheduler=warmed)
        if part:
            engine.load_checkpoint(run)
        for batch in global_batches(count):
            rates += engine.get_lr()
            engine.train_batch(iter([batch]))
        save_and_wait(engine, run)
    return rates


def test_a_sequence_of_schedulers_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    (whole,) = ranks.run(1, scheduler_case, tmp_path / "whole", [6])
    (parts,) = ranks.run(1, scheduler_case, tmp_path / "parts", [1, 2, 3])
    assert parts == whole
    assert len(set(whole)) > 4


class Shared(OwnLoss):
    """A model with a buffer under two names, and a module under two."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encode.register_buffer("table", torch.arange(3).to(dtype))
        self.out.register_buffer("table", self.encode.table)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)
        self.again = self.norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.again(x), y)


def shared_case(run: Path) -> Any:
    engine = make_engine(seeded(Shared), micro=12)
    engine.train_batch(iter(global_batches(1)))
    save_and_wait(engine, run)
    state = engine.module_state_dict()
    resumed = make_engine(seeded(Shared), zero=3, micro=12)
    resumed.load_checkpoint(run)
    return state, resumed.module_state_dict()


def test_shared_buffers_have_all_their_names(ranks: Ranks, tmp_path: Path) -> None:
    ((state, resumed),) = ranks.run(1, shared_case, tmp_path)
    from_disk = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    for found in (state, resumed, from_disk):
        model = Shared()
        model.load_state_dict(found)
        assert model.norm.num_batches_tracked == 1


def kept_case(zero: int, size: int) -> Any:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=12 // size)
    kept = engine.module_state_dict()
    before = {name: tensor.clone() for name, tensor in kept.items()}
    ((x, y),) = global_batches(1)
    engine.train_batch(iter([(x.chunk(size)[engine.global_rank], y.chunk(size)[engine.global_rank])]))
    after = engine.module_state_dict()
    return [name for name in kept if not torch.equal(kept[name], before[name])], [
        name for name in kept if torch.equal(after[name], before[name])
    ]


@pytest.mark.parametrize(("zero", "size"), [(0, 1), (3, 1), (0, 2)])
def test_weights_that_a_script_keeps_stay_as_they_were(ranks: Ranks, zero: int, size: int) -> None:
    for changed, unchanged in ranks.run(size, kept_case, zero, size):
        assert changed == []
        assert sorted(unchanged) == ["fixed.bias", "fixed.weight"], "the frozen ones"


def complex_case() -> None:
    make_engine(Shared(torch.complex64))


def test_a_buffer_that_no_checkpoint_can_hold_is_refused_at_once(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"buffer encode.table is complex64, .* persistent=False"):
        ranks.run(1, complex_case)
