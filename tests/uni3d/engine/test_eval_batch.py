"""`eval_batch` returns the loss and changes nothing; dropout repeats after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import (
    OwnLoss,
    Stack,
    global_batches,
    make_engine,
    micro_batches,
    seeded,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks

STEPS = 3
MODELS = {"own_loss": OwnLoss, "loss_fn": Stack}


def eval_case(name: str, zero: int, pp: int) -> Any:
    engine = make_engine(seeded(MODELS[name]), zero=zero, pp=pp)
    batches, held_out = global_batches(STEPS), global_batches(1, seed=9)
    data = micro_batches(batches, engine)
    losses, evaluations = [], []
    for _ in range(STEPS):
        evaluations.append(engine.eval_batch(micro_batches(held_out, engine)).item())
        losses.append(engine.train_batch(data).item())
    return losses, evaluations, engine.module.training, whole(engine.module).get("calls")


@pytest.mark.parametrize(
    ("name", "zero", "pp"),
    [slow("own_loss", 1, 1), ("own_loss", 3, 1), slow("loss_fn", 0, 1), ("loss_fn", 2, 1), ("loss_fn", 1, 2)],
)
def test_it_gives_the_loss_and_learns_nothing(ranks: Ranks, name: str, zero: int, pp: int) -> None:
    batches, (held_out,) = global_batches(STEPS), global_batches(1, seed=9)
    expected = []
    for steps in range(STEPS):
        x, y = held_out
        model = train_plainly(seeded(MODELS[name]), batches[:steps])[2].eval()
        expected.append((model(x, y) if name == "own_loss" else F.mse_loss(model(x), y)).item())
    losses = train_plainly(seeded(MODELS[name]), batches)[0]
    for found, evaluations, training, calls in ranks.run(2, eval_case, name, zero, pp):
        assert evaluations == pytest.approx(expected, rel=1e-5)
        assert found == pytest.approx(losses, rel=1e-5)
        assert training, "back in training mode"
        if name == "own_loss":
            assert calls == 2 * STEPS, "buffers that count training alone"


@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids="zero{}".format)
def test_between_the_micro_batches_of_a_step(alone: None, zero: int) -> None:
    """Evaluate during gradient accumulation; the gradients don't change."""
    batches = global_batches(STEPS)
    losses = train_plainly(seeded(OwnLoss), batches)[0]
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=4)
    found = []
    for batch in micro_batches(batches, engine):
        found.append(engine.backward(engine(*batch)).item())
        engine.eval_batch(micro_batches(batches, engine))
        engine.step()
    assert [sum(found[i : i + 3]) for i in (0, 3, 6)] == pytest.approx(losses, rel=1e-5)


def dropout_case(run: Path) -> Any:
    engine = make_engine(seeded(OwnLoss, 0.5), zero=1)
    batches = global_batches(4)
    losses = train(engine, batches[:2])
    engine.save_checkpoint(run)
    losses += train(engine, batches[2:])
    torch.manual_seed(99)  # a new process has another random state
    resumed = make_engine(seeded(OwnLoss, 0.5), zero=1)
    resumed.load_checkpoint(run)
    again = train(resumed, batches[2:])
    x = torch.ones(1, 6)
    masks = engine(x, torch.zeros(1, 1)).item()
    return losses, again, masks


def test_dropout_is_the_same_after_a_resume_and_different_on_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(2, dropout_case, tmp_path)
    plain = train_plainly(seeded(OwnLoss), global_batches(4))[0]
    for losses, again, _ in results:
        assert again == losses[2:]
        assert losses != pytest.approx(plain, rel=1e-3), "or nothing was dropped"
    assert results[0][2] != results[1][2], "data-parallel ranks draw apart"
