"""Shard groups smaller than dp: the same steps, each gradient counted once, checkpoints for other groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import matrix
from models import (
    WIDTH,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    micro_batches,
    save_and_wait,
    seeded,
    take_steps,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import Tensor, nn

pytestmark = pytest.mark.slow

STEPS, CLIP = 3, 0.5


def run_case(zero: int, pp: int, run: str) -> Any:
    engine = make_engine(seeded(Stack), zero=zero, pp=pp, micro=1, clip=CLIP, group=2 // pp)
    losses, norms = take_steps(engine, STEPS, micro_batches(global_batches(STEPS + 1), engine))
    save_and_wait(engine, run)
    engine.model.zero.reshard()
    local = {n: p.to_local().numel() for n, p in engine.module.named_parameters()}
    return losses, norms, whole(engine.module), local


def resume_case(zero: int, group: int, run: str) -> Any:
    engine = make_engine(seeded(Stack), zero=zero, micro=1, clip=CLIP, group=group)
    engine.resume(run)
    return train(engine, global_batches(STEPS + 1)[-1:]), whole(engine.module)


@pytest.mark.parametrize(
    ("zero", "pp", "resumed"),
    [(1, 1, (3, 1, -1)), (2, 1, (3, 3, 1)), (3, 1, (1, 3, -1)), (3, 2, (4, 2, 2))],
    ids=str,
)
def test_training_is_the_oracles_and_resumes_in_other_groups(
    ranks: Ranks, tmp_path: Path, zero: int, pp: int, resumed: tuple[int, int, int]
) -> None:
    batches = global_batches(STEPS + 1)
    losses, norms, model = train_plainly(seeded(Stack), batches[:STEPS], clip=CLIP)
    together: dict[str, Tensor] = {}
    for found, found_norms, state, local in ranks.run(4, run_case, zero, pp, str(tmp_path)):
        assert found == pytest.approx(losses, rel=1e-5)
        assert found_norms == pytest.approx(norms, rel=1e-5)
        together |= state
        for name, size in local.items():  # Stack's dimensions are even, but for the one output's
            expected = model.get_parameter(name).numel() // (2 // pp)
            assert size == expected or name.startswith("out"), "the group's part, whatever dp is"
    assert_same(together, model)
    losses, _, model = train_plainly(seeded(Stack), batches, clip=CLIP)
    for found, state in ranks.run(resumed[0], resume_case, *resumed[1:], str(tmp_path)):
        assert found == pytest.approx(losses[-1:], rel=1e-5)
        assert_same(state, model)


class Taking(nn.Module):
    """Model with two experts of one size; the sample decides which of them learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 1)
        self.second = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        expert = self.second if y.sum() > 1 else self.first
        return (expert(x) - y).square().mean()


def taking_case(zero: int, group: int) -> Any:
    engine = make_engine(seeded(Taking), zero=zero, micro=1, clip=CLIP, group=group)
    return train(engine, global_batches(1))[0], whole(engine.module)


@pytest.mark.parametrize(
    ("zero", "group"), [(0, -1), matrix(1, -1), (2, -1), (3, -1), (1, 2), matrix(2, 2), (3, 2)], ids=str
)
def test_ranks_and_micro_batches_that_use_other_parameters(ranks: Ranks, zero: int, group: int) -> None:
    model = seeded(Taking)
    (x, y), optimizer = global_batches(1)[0], torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    taken = [int(one.sum() > 1) for one in y]
    assert 0 < sum(taken[:3]) < 3, "one rank's own micro batches differ"
    total = torch.stack([model(x[i : i + 1], y[i : i + 1]) for i in range(12)]).mean()
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    for loss, state in ranks.run(4, taking_case, zero, group):
        assert loss == pytest.approx(total.item(), rel=1e-5)
        assert_same(state, model)


def dropped_case() -> Any:
    engine = make_engine(seeded(Stack), zero=2, micro=1, clip=CLIP, group=2)
    data = list(micro_batches(global_batches(1), engine))
    engine.backward(nn.MSELoss()(engine(data[0][0] + 5.0), data[0][1]))  # which is then given up
    with pytest.warns(UserWarning, match="drops the gradients of 1 of the step's"):
        engine.zero_grad()
    loss = engine.train_batch(iter(data)).item()
    return loss, whole(engine.module)


def test_gradients_that_were_dropped_before_their_last_sum(ranks: Ranks) -> None:
    losses, _, model = train_plainly(seeded(Stack), global_batches(1), clip=CLIP)
    for loss, state in ranks.run(4, dropped_case):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        assert_same(state, model)


def mixed_case(zero: int) -> list[float]:
    engine = make_engine(seeded(Taking), zero=zero, micro=1, clip=CLIP, config={"bf16": {"enabled": True}})
    (loss,), (norm,) = take_steps(engine, 1, micro_batches(global_batches(1), engine))
    return [loss, norm]


@pytest.mark.parametrize("zero", [1, 2], ids="zero{}".format)
def test_gradients_of_unused_parameters_have_the_type_of_the_others(ranks: Ranks, zero: int) -> None:
    """Check unused parameters' gradients: with bf16 they are fp32, and a bf16 zero would be an error."""
    model, (x, y) = seeded(Taking), global_batches(1)[0]
    total = torch.stack([model(x[i : i + 1], y[i : i + 1]) for i in range(12)]).mean()
    total.backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    for found in ranks.run(4, mixed_case, zero):
        assert found == pytest.approx([total.item(), norm], rel=0.03)
