"""Resumes: the run continues as if it had not been interrupted."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import matrix
from models import OwnLoss, Stack, global_batches, make_engine, seeded, train, train_plainly, whole
from ranks import Ranks
from torch import nn
from torch.utils.data import TensorDataset

STEPS = 3
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}}


class PartlyUsed(Stack):
    """Model with a parameter that is in no loss, so it gets neither a gradient nor optimizer states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].register_parameter("spare", nn.Parameter(torch.ones(3, 2)))


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def plain_sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05)


def adagrad(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(groups, lr=0.05)


class Slowing(torch.optim.Optimizer):
    """Optimizer whose only state is a number: the count of steps of each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["times"] = self.state[p].get("times", 0) + 1
                    p -= group["lr"] / self.state[p]["times"] * p.grad


def other_values(model: nn.Module) -> nn.Module:
    """Return the model with every value changed, so that a value that isn't restored shows."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 7
    return model


CASES: dict[str, dict[str, Any]] = {
    "own_loss": {"model": OwnLoss},
    "own_loss_zero3": {"model": OwnLoss, "zero": 3},
    "unused_parameter": {"model": PartlyUsed, "zero": 1},
    "momentum": {"model": Stack, "optimizer": sgd, "zero": 2},
    "no_states": {"model": Stack, "optimizer": plain_sgd},
    "states_at_once": {"model": Stack, "optimizer": adagrad, "zero": 1},
    "numbers_alone": {"model": Stack, "optimizer": Slowing, "zero": 2},
    "stages": {"model": PartlyUsed, "pp": 2},
    "scheduler": {"model": Stack, "config": {"scheduler": WARMUP}},
}


def resume_case(name: str, run: Path, first: int) -> Any:
    """Train with and without an interruption after `first` steps and compare; return both lists of losses."""
    given = {k: v for k, v in CASES[name].items() if k != "model"}
    batches = global_batches(STEPS)
    engine = make_engine(seeded(CASES[name]["model"]), **given)
    losses = train(engine, batches[:first])
    engine.save_checkpoint(run)
    saved = whole(engine.module)
    losses += train(engine, batches[first:])
    resumed = make_engine(other_values(seeded(CASES[name]["model"])), **given)
    assert resumed.resume(run) == {}
    report = resumed.last_load
    assert not report.defaulted
    assert not report.dropped
    loaded = whole(resumed.module)
    again = train(resumed, batches[first:])
    for each, other in ((saved, loaded), (whole(engine.module), whole(resumed.module))):
        for tensor in each.keys() - {"scratch"}:
            assert torch.equal(each[tensor], other[tensor]), tensor
    assert engine.get_lr() == resumed.get_lr()
    assert (resumed.global_steps, resumed.global_samples) == (STEPS, 12 * STEPS)
    if "scratch" in loaded:
        assert loaded["scratch"].tolist() == [7.0, 7.0], "a buffer that isn't persistent isn't saved"
        assert loaded["calls"] == 2 * first, "a buffer that is comes back"
    return losses, again


FIRST = {0: "before_the_first_step", 2: "after_two_steps"}
QUICK = {("states_at_once", 0), *((name, 2) for name in CASES if name != "own_loss")}
ALL = [case if case in QUICK else matrix(*case) for case in product(CASES, FIRST)]


@pytest.mark.parametrize(("name", "first"), ALL, ids=FIRST.get)
def test_the_run_goes_on_bit_for_bit(ranks: Ranks, tmp_path: Path, name: str, first: int) -> None:
    for losses, again in ranks.run(2, resume_case, name, tmp_path, first):
        assert again == losses[first:]
        if name == "own_loss":
            assert losses == pytest.approx(train_plainly(seeded(OwnLoss), global_batches(STEPS))[0], rel=1e-5)


class Apart(Stack):
    """Model with a buffer that differs between ranks and is large enough for them to share its writing."""

    def __init__(self) -> None:
        super().__init__()
        self.out.register_buffer("mine", torch.zeros(1024, 1024))


def apart_case(run: Path) -> Any:
    engine = make_engine(seeded(Apart))
    engine.module.out.mine.fill_(1.0 + torch.distributed.get_rank())
    engine.save_checkpoint(run)
    engine.load_checkpoint(run)
    return engine.module.out.mine.unique().tolist()


def test_buffers_that_differ_are_the_first_rank_s(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, apart_case, tmp_path) == [[1.0], [1.0]]


def test_a_trained_engine_can_go_back_to_the_very_beginning(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack))
    engine.save_checkpoint(tmp_path, tag="start")
    losses = train(engine, global_batches(STEPS))
    engine.load_checkpoint(tmp_path, tag="start")
    assert not engine.optimizer.state, "no moments of the future"
    assert engine.global_steps == 0
    assert train(engine, global_batches(STEPS)) == losses


def test_each_group_s_hyperparameters_come_back(alone: None, tmp_path: Path) -> None:
    def engine_of(**hyperparameters: Any) -> Any:
        model = seeded(Stack)
        first = {"params": model.layers.parameters(), **hyperparameters}
        return make_engine(model, model_parameters=[first, {"params": model.out.parameters()}])

    first = engine_of(lr=0.5, betas=(0.5, 0.6), eps=0.1, weight_decay=0.3)
    first.optimizer.param_groups[1]["lr"] = 0.25  # by hand, on the way
    train(first, global_batches(1))
    first.save_checkpoint(tmp_path)
    engine = engine_of()
    with pytest.warns(UserWarning, match=r"group 0's betas is \[0.9, 0.999\] in this run, \[0.5, 0.6\] in"):
        engine.load_checkpoint(tmp_path)
    for saved, loaded in zip(first.optimizer.param_groups, engine.optimizer.param_groups, strict=True):
        for key in saved.keys() - {"params"}:
            assert loaded[key] == saved[key], key
            assert type(loaded[key]) is type(saved[key]), key


def test_the_loader_goes_on_with_the_next_samples(alone: None, tmp_path: Path) -> None:
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*global_batches(5), strict=True)))
    engine = make_engine(seeded(Stack), training_data=data)
    losses = [engine.train_batch().item() for _ in range(2)]
    engine.save_checkpoint(tmp_path)
    losses += [engine.train_batch().item() for _ in range(4)]  # into the second epoch
    other = make_engine(seeded(Stack), training_data=data)
    stale = iter(other.training_dataloader)
    other.train_batch(stale)
    other.train_batch()
    other.load_checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match="made before a checkpoint was loaded"):
        other.train_batch(stale)
    assert [other.train_batch().item() for _ in range(4)] == losses[2:]


def test_a_resume_on_another_topology_says_so(alone: None, capsys: Any, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack))
    engine.save_checkpoint(tmp_path)
    lines = []
    for zero in (0, 1):
        resumed = make_engine(seeded(Stack), zero=zero)
        capsys.readouterr()
        resumed.resume(tmp_path)
        lines.append(capsys.readouterr().err.splitlines())
    assert [len(found) for found in lines] == [1, 2]
    change = "1 rank (pp 1 x dp 1 x tp 1, ZeRO 0) -> 1 rank (pp 1 x dp 1 x tp 1, ZeRO 1)"
    assert lines[1][1] == f"uni3d: new topology: {change}"
