"""The engine's steps against plain PyTorch, by `train_batch` and by forward, backward and step."""

from typing import Any

import pytest
import torch
from marks import slow
from models import (
    OwnLoss,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    micro_batches,
    seeded,
    take_steps,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import nn

STEPS = 3
MODELS = {"own_loss": OwnLoss, "loss_fn": Stack}


def steps_by_hand(engine: Any, batches: list[Any]) -> list[float]:
    """Train with forward, backward and step; return the losses."""
    micro, losses = micro_batches(batches, engine), []
    for _ in batches:
        parts = []
        while True:
            x, y = next(micro)
            boundary = engine.is_gradient_accumulation_boundary()
            loss = engine(x, y) if isinstance(engine.module, OwnLoss) else nn.MSELoss()(engine(x), y)
            parts.append(engine.backward(loss).item())
            engine.step()
            if boundary:
                break
        losses.append(sum(parts))  # each is divided by their number, as DeepSpeed's are
    return losses


def train_case(name: str, zero: int, by_hand: bool) -> Any:
    engine = make_engine(seeded(MODELS[name]), zero=zero)
    batches = global_batches(STEPS)
    if by_hand:
        losses = steps_by_hand(engine, batches)
    else:
        losses = train(engine, batches)
    return losses, engine.get_global_grad_norm(), whole(engine.module), engine.global_samples


@pytest.mark.parametrize("by_hand", [False, True], ids=["train_batch", "by_hand"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids="zero{}".format)
def test_one_rank(alone: None, name: str, zero: int, by_hand: bool) -> None:
    losses, norms, model = train_plainly(seeded(MODELS[name]), global_batches(STEPS))
    found_losses, norm, state, samples = train_case(name, zero, by_hand)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert norm == pytest.approx(norms[-1], rel=1e-5)
    assert_same(state, model, ignore=("calls", "scratch"))
    assert samples == 12 * STEPS
    if name == "own_loss":
        assert state["calls"] == 4 * STEPS, "once for each micro batch"


@pytest.mark.parametrize(
    ("name", "zero"), [slow("own_loss", 0), ("own_loss", 3), slow("loss_fn", 1), ("loss_fn", 2)]
)
def test_two_ranks(ranks: Ranks, name: str, zero: int) -> None:
    losses, norms, model = train_plainly(seeded(MODELS[name]), global_batches(STEPS))
    for by_hand in (False, True):
        results = ranks.run(2, train_case, name, zero, by_hand)
        reported = [result[0] for result in results]
        if by_hand:  # each rank computes the loss of its own samples
            reported = [[sum(parts) / 2 for parts in zip(*reported, strict=True)]]
        for found in reported:
            assert found == pytest.approx(losses, rel=1e-5)
        for _, norm, state, _ in results:
            assert norm == pytest.approx(norms[-1], rel=1e-5)
            assert_same(state, model, ignore=("calls", "scratch"))


def test_the_step_comes_at_the_accumulation_boundary(alone: None, tmp_path: Any) -> None:
    engine = make_engine(seeded(OwnLoss), micro=4)
    before = whole(engine.module)
    boundaries = []
    for batch in micro_batches(global_batches(2), engine):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        engine.backward(engine(*batch))
        if not boundaries[-1]:
            with pytest.raises(RuntimeError, match=r"between a step.s micro batches"):
                engine.load_checkpoint(tmp_path)
        engine.step()
        if len(boundaries) < 3:
            assert torch.equal(before["out.weight"], whole(engine.module)["out.weight"])
            assert engine.global_steps == 0
    assert boundaries == [False, False, True] * 2
    assert engine.global_steps == 2
    assert not torch.equal(before["out.weight"], whole(engine.module)["out.weight"])
    with pytest.raises(RuntimeError, match=r"one backward\(\) per micro batch; this one had 0"):
        engine.step()


@pytest.mark.parametrize("zero", [0, 1, 2, 3], ids="zero{}".format)
def test_a_look_at_the_output_between_backward_and_step_changes_nothing(alone: None, zero: int) -> None:
    _, _, model = train_plainly(seeded(Stack), global_batches(STEPS))
    engine = make_engine(seeded(Stack), zero=zero, micro=12)
    for x, y in global_batches(STEPS):
        engine.backward(nn.MSELoss()(engine(x), y))
        with torch.no_grad():
            engine(x)
        engine.step()
    assert_same(whole(engine.module), model)


@pytest.mark.parametrize("clip", [0.1, 50.0])
def test_clipping(alone: None, clip: float) -> None:
    batches = global_batches(STEPS)
    _, norms, model = train_plainly(seeded(Stack), batches, clip=clip)
    assert 0.1 < min(norms) <= max(norms) < 50.0, "one clips every step, the other none"
    engine = make_engine(seeded(Stack), config={"gradient_clipping": clip})
    _, found = take_steps(engine, STEPS, micro_batches(batches, engine))
    assert found == pytest.approx(norms, rel=1e-5), "the norms before clipping"
    assert_same(whole(engine.module), model)


def nan_case(name: str, pp: int) -> Any:
    engine = make_engine(seeded(MODELS[name]), zero=0 if pp == 2 else 2, pp=pp)
    good, bad = global_batches(2), global_batches(1, seed=5)
    bad[0][0][-1, 0] = float("nan")  # the last rank's data
    engine.train_batch(micro_batches(good[:1], engine))
    before = whole(engine.module)
    try:
        engine.train_batch(micro_batches(bad, engine))
    except FloatingPointError as error:
        message = str(error)
    after = whole(engine.module)
    unchanged = [torch.equal(before[name], after[name]) for name in before]
    loss = engine.train_batch(micro_batches(good[1:], engine)).item()
    return message, all(unchanged), engine.global_steps, loss


@pytest.mark.parametrize(("name", "pp"), [slow("loss_fn", 1), ("loss_fn", 2)], ids=["dp2", "pp2"])
def test_a_loss_of_nan_stops_all_ranks_and_changes_nothing(ranks: Ranks, name: str, pp: int) -> None:
    losses, _, _ = train_plainly(seeded(MODELS[name]), global_batches(2))
    results = ranks.run(2, nan_case, name, pp)
    assert len({message for message, *_ in results}) == 1
    for message, unchanged, steps, loss in results:
        assert message.startswith("step 2: the loss is nan")
        assert unchanged
        assert steps == 2, "training goes on, without the step that wasn't taken"
        assert loss == pytest.approx(losses[1], rel=1e-5)


def stages_case() -> list[str]:
    engine = make_engine(seeded(Stack), pp=2)
    messages = []
    for call in (lambda: engine(torch.zeros(1, 6)), lambda: engine.backward(torch.zeros(())), engine.step):
        with pytest.raises(RuntimeError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_single_calls_are_refused_where_a_rank_has_a_stage_only(ranks: Ranks) -> None:
    for messages in ranks.run(2, stages_case):
        for name, message in zip(("forward", "backward", "step"), messages, strict=True):
            assert message.startswith(f"{name}() needs the whole model on a rank, but pp is 2")
            assert "use train_batch()" in message


def test_a_whole_batch_between_micro_batches(alone: None) -> None:
    engine = make_engine(seeded(Stack))
    batches = micro_batches(global_batches(2), engine)
    inputs, _ = next(batches)
    engine.backward(engine(inputs).sum())
    with pytest.raises(RuntimeError, match=r"train_batch\(\) can't be called between .* call step\(\)"):
        engine.train_batch(batches)
