"""Extra state of optimizers: it comes back at any ZeRO stage, or the save refuses it by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import matrix, slow
from models import Stack, global_batches, make_engine, seeded, train, train_plainly, whole
from paced_optimizer import Paced
from ranks import Ranks
from torch import Tensor

import ckpt

STEPS = 3


def paced_case(run: Path, zero: int, first: bool) -> Any:
    engine = make_engine(seeded(Stack), zero=zero, micro=1, optimizer=Paced)
    batches = global_batches(2 * STEPS)
    if first:
        losses = train(engine, batches[:STEPS])
        engine.save_checkpoint(run)
        losses += train(engine, batches[STEPS:])
        engine.load_checkpoint(run)  # back again, with other values in place
        assert train(engine, batches[STEPS:]) == losses[STEPS:]
        return losses, None
    engine.resume(run)
    counts = {s["count"].dtype for p, s in engine.optimizer.state.items() if isinstance(p, Tensor)}
    assert counts == {torch.int32}
    assert engine.last_load is not None
    report = engine.last_load.extra
    losses = train(engine, batches[STEPS:])
    engine.save_checkpoint(run, "again", save_latest=False)  # what was restored can be saved
    engine.wait_for_checkpoint()
    return losses, report


@pytest.mark.parametrize("zero", [matrix(0), slow(1), matrix(2), slow(3)])
def test_an_optimizer_s_extra_state(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    expected, _, _ = train_plainly(seeded(Stack), global_batches(2 * STEPS), Paced)
    for losses, _ in ranks.run(2, paced_case, tmp_path, zero, True):
        assert losses == pytest.approx(expected, rel=1e-5)
    for world, other in ((1, 0), (2, 3 - zero)):
        for losses, report in ranks.run(world, paced_case, tmp_path, other, False):
            assert losses == pytest.approx(expected[STEPS:], rel=1e-5)
            assert report == [
                "the optimizer's seen",
                "the optimizer's average",
                "the optimizer's state['global']",
            ]


def test_an_optimizer_goes_back_to_before_its_first_step(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), optimizer=Paced)
    engine.save_checkpoint(tmp_path, "start")
    losses = train(engine, global_batches(2))
    engine.load_checkpoint(tmp_path, "start")
    assert not engine.optimizer.state
    assert train(engine, global_batches(2)) == losses


def test_a_failed_load_leaves_the_optimizer_as_it_was(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), optimizer=Paced)
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path)
    fresh = make_engine(seeded(Stack, 3), optimizer=Paced)
    fresh.optimizer.state["global"] = {"decay": 0.25}
    with pytest.raises(ckpt.CheckpointError):
        fresh.load_checkpoint(tmp_path)
    assert fresh.optimizer.state == {"global": {"decay": 0.25}}
    assert fresh.optimizer.seen == 0


class Plain(Paced):
    load_state_dict = torch.optim.Optimizer.load_state_dict
    state_dict = torch.optim.Optimizer.state_dict


Plain.__name__ = Paced.__name__  # by which a load knows an optimizer


def test_an_optimizer_that_takes_no_extra_state(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), optimizer=Paced)
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path)
    other = make_engine(seeded(Stack), optimizer=Plain)
    with pytest.raises(ckpt.CheckpointError, match="unexpected by Paced, which loads as torch does: the opt"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert other.last_load is not None
    assert other.last_load.dropped["the optimizer's seen"] == "optimizer states were not requested"


def odd_key_case(run: Path) -> list[str]:
    engine = make_engine(seeded(Stack), zero=1, optimizer=Paced)
    train(engine, global_batches(1))
    errors = []
    for key, value in ((("a", 1), {}), (torch.zeros(2), {}), ("global", (1, 2)), ("global", {"w": engine})):
        before = copy.copy(engine.optimizer.state["global"])
        engine.optimizer.state[key] = value
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.save_checkpoint(run)
        errors.append(str(caught.value))
        del engine.optimizer.state[key]
        engine.optimizer.state["global"] = before
    engine.optimizer.seen += torch.distributed.get_rank()
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.save_checkpoint(run)
    return [*errors, str(caught.value)]


def test_states_that_are_no_parameter_s_are_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks.run(2, odd_key_case, tmp_path)
    assert one == other
    for error, expected in zip(
        one,
        (
            "Paced.state has the key ('a', 1), which is no parameter of the optimizer",
            "Paced.state has a tensor of shape [2], which is no parameter of the optimizer",
            "Paced.state_dict()/state/global is a tuple",
            "Paced.state_dict()/state/global/w is a Engine",
            "the optimizer's extra state differs between ranks 0 and 1",
        ),
        strict=True,
    ):
        assert error.startswith(expected)


def test_hooks_of_torch_extend_an_optimizer_too(alone: None, tmp_path: Path) -> None:
    def hooked() -> Any:
        engine = make_engine(seeded(Stack))
        found: dict[str, Any] = {"seen": 0}
        engine.optimizer.register_state_dict_post_hook(lambda _, d: {**d, "seen": found["seen"]})
        engine.optimizer.register_load_state_dict_pre_hook(lambda _, d: found.update(seen=d["seen"]))
        return engine, found

    engine, found = hooked()
    found["seen"] = 5
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path)
    losses = train(engine, global_batches(2))
    other, found = hooked()
    other.load_checkpoint(tmp_path)
    assert found == {"seen": 5}
    assert train(other, global_batches(2)) == losses
    assert all(torch.equal(whole(engine.module)[n], t) for n, t in whole(other.module).items())
