"""Several `backward()` before a `step()`; boundaries that the script sets; passes that it runs itself.

Plain PyTorch in one process is the oracle: gradients of all losses of a step are added, and divided by the
number of micro batches and ranks.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import STAGES, matrix, slow
from models import save_and_wait, seeded, whole
from ranks import RankError, Ranks
from torch import Tensor, nn

import uni3d
from parallel.agreement import BatchError

WIDTH, MICRO, STEPS = 6, 2, 3


class TwoHeads(nn.Module):
    """Two outputs of one trunk, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, WIDTH), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x) * self.scale
        return self.heads[0](hidden), self.heads[1](hidden)


def engine_of(zero: int, accumulation: int, **config: Any) -> uni3d.Engine:
    values = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "eps": 0.01}},
        "parallel": {"device": "cpu"},
    }
    engine: uni3d.Engine = uni3d.initialize(model=seeded(TwoHeads), config=values | config)[0]
    return engine


def batches(ranks: int, accumulation: int) -> Iterator[Tensor]:
    """Yield the steps' micro batches: of shape (ranks, accumulation, MICRO, WIDTH)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        yield torch.randn(ranks, accumulation, MICRO, WIDTH, generator=generator)


def losses_of(model: Any, x: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield three losses, two of one forward pass, each with whether its graph is needed again."""
    one, three = model(x)
    yield one.square().mean(), True
    yield (three - 1).square().mean(), False
    yield model(-x)[1].abs().mean(), False


def plain(ranks: int, accumulation: int) -> tuple[dict[str, Tensor], list[float]]:
    model = seeded(TwoHeads)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, weight_decay=0.0, foreach=False)
    norms = []
    for step in batches(ranks, accumulation):
        optimizer.zero_grad()
        for x in step.flatten(0, 1):
            for loss, again in losses_of(model, x):
                (loss / (ranks * accumulation)).backward(retain_graph=again)
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), float("inf")).item())
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def several_case(
    zero: int, accumulation: int, config: dict[str, Any]
) -> tuple[dict[str, Tensor], list[float]]:
    engine, norms = engine_of(zero, accumulation, **config), []
    rank, ranks = engine.get_data_parallel_rank(), engine.dp_world_size
    for step in batches(ranks, accumulation):
        for x in step[rank]:
            for loss, again in losses_of(engine, x):
                engine.backward(loss, retain_graph=again)
            engine.step()
        norms.append(engine.get_global_grad_norm() or 0.0)
    assert engine.global_steps == STEPS
    assert engine.micro_steps == STEPS * accumulation
    return whole(engine.module), norms


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


CONFIGS: dict[str, dict[str, Any]] = {
    "group": {"zero_optimization": {"stage": 2, "mics_shard_size": 1}},
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
}


@pytest.mark.parametrize("accumulation", [1, slow(2)])
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("dp", [matrix(1), 2])
def test_they_add_up(ranks: Ranks, dp: int, zero: int, accumulation: int) -> None:
    expected, norms = plain(dp, accumulation)
    for found, found_norms in ranks.run(dp, several_case, zero, accumulation, {}):
        check_same(found, expected)
        assert found_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", [slow("group"), slow("offload")])
def test_they_add_up_elsewhere(ranks: Ranks, name: str) -> None:
    expected, norms = plain(2, 2)
    for found, found_norms in ranks.run(2, several_case, 2, 2, CONFIGS[name]):
        check_same(found, expected)
        assert found_norms == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("zero", [slow(0), 2])
def test_they_add_up_under_a_loss_scale(ranks: Ranks, zero: int) -> None:
    """Up to the rounding of fp16."""
    _, norms = plain(1, 2)
    [(_, found_norms)] = ranks.run(1, several_case, zero, 2, {"fp16": {"enabled": True, "loss_scale": 64}})
    assert found_norms == pytest.approx(norms, rel=5e-3)


# --- boundaries that the script sets -----------------------------------------------------------------------


def boundary_case(zero: int) -> tuple[dict[str, Tensor], int, int]:
    """Step once per global batch, as Accelerate does."""
    engine = engine_of(zero, 3)
    for step in batches(2, 3):
        for i, x in enumerate(step[engine.get_data_parallel_rank()]):
            engine.set_gradient_accumulation_boundary(i == 2)
            for loss, again in losses_of(engine, x):
                engine.backward(loss, retain_graph=again)
        engine.step()
    return whole(engine.module), engine.global_steps, engine.micro_steps


@pytest.mark.parametrize("zero", STAGES)
def test_the_script_sets_the_boundary(ranks: Ranks, zero: int) -> None:
    expected, _ = plain(2, 3)
    for found, steps, micro_steps in ranks.run(2, boundary_case, zero):
        check_same(found, expected)
        assert (steps, micro_steps) == (STEPS, STEPS)


def test_a_boundary_that_comes_too_late(alone: None) -> None:
    engine = engine_of(0, 2)
    x = torch.ones(MICRO, WIDTH)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(engine(x)[0].mean())
    engine.set_gradient_accumulation_boundary(True)
    with pytest.raises(RuntimeError, match="didn't sum the gradients over the ranks"):
        engine.step()
    engine.backward(engine(x)[0].mean())
    engine.step()
    engine.set_gradient_accumulation_boundary(None)
    assert not engine.is_gradient_accumulation_boundary()
    assert engine.global_steps == 1


# --- what isn't the engine's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("zero", range(4))
def test_a_backward_pass_by_hand_is_noticed(alone: None, zero: int) -> None:
    engine = engine_of(zero, 1)
    x = torch.ones(MICRO, WIDTH)
    one, three = engine(x)
    engine.backward(one.mean(), retain_graph=True)
    three.mean().backward()
    for call in (engine.step, engine.optimizer.step, lambda: engine.backward(three.mean())):
        with pytest.raises(RuntimeError, match=r"engine\.(step|backward)"):
            call()
    with pytest.warns(UserWarning, match="drops the gradients of 1 of"):
        engine.zero_grad()
    before = whole(engine.module)
    engine.backward(engine(x)[0].mean() * 0)
    engine.step()
    check_same(whole(engine.module), before)  # nothing of either pass is left


@pytest.mark.parametrize("zero", range(4))
def test_gradients_by_autograd_are_nobody_elses(alone: None, zero: int) -> None:
    """A gradient penalty asks for gradients of inputs, which adds to none of the parameters'."""
    engine, model = engine_of(zero, 1), seeded(TwoHeads)
    x = torch.ones(MICRO, WIDTH, requires_grad=True)
    for each in (engine, model):
        one, _ = each(x)
        (gradient,) = torch.autograd.grad(one.sum(), x, create_graph=True)
        loss = one.mean() + gradient.square().mean()
        engine.backward(loss) if each is engine else loss.backward()
    engine.step()
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-5)


def gan_case(zero: int, drop: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train two engines against each other; the second one's loss passes through the first."""
    judge, maker = engine_of(zero, 1), engine_of(zero, 1)
    for x, y in zip(*[batches(2, 1)] * 2, strict=False):
        rank = judge.get_data_parallel_rank()
        real, noise = x[rank, 0], y[rank, 0]
        if drop:
            judge.zero_grad()
        fake = noise + maker(noise)[1].mean()
        judge.backward((judge(real)[0] - 1).square().mean())
        judge.backward(judge(fake.detach())[0].square().mean())
        judge.step()
        maker.backward((judge(fake)[0] - 1).square().mean())
        maker.step()
    judge.zero_grad() if drop else judge.train_batch(iter([real]))
    return whole(judge.module), whole(maker.module)


def plain_gan() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    judge, maker = seeded(TwoHeads), seeded(TwoHeads)
    inner = [
        torch.optim.AdamW(model.parameters(), lr=0.02, eps=0.01, weight_decay=0.0, foreach=False)
        for model in (judge, maker)
    ]
    for x, y in zip(*[batches(2, 1)] * 2, strict=False):
        inner[0].zero_grad()
        fakes = [noise + maker(noise)[1].mean() for noise in y[:, 0]]
        for real, fake in zip(x[:, 0], fakes, strict=True):
            ((judge(real)[0] - 1).square().mean() / 2).backward()
            (judge(fake.detach())[0].square().mean() / 2).backward()
        inner[0].step()
        inner[1].zero_grad()
        for fake in fakes:
            ((judge(fake)[0] - 1).square().mean() / 2).backward()
        inner[1].step()
    return tuple({n: p.detach() for n, p in model.named_parameters()} for model in (judge, maker))  # type: ignore[return-value]


@pytest.mark.parametrize("zero", STAGES)
def test_two_engines_against_each_other(ranks: Ranks, zero: int) -> None:
    expected = plain_gan()
    for found in ranks.run(2, gan_case, zero, True):
        for one, other in zip(found, expected, strict=True):
            check_same(one, other)


def test_gradients_of_another_models_loss_must_be_dropped(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"call engine.zero_grad\(\) to drop them"):
        ranks.run(2, gan_case, 0, False)


def test_zero_grad_of_the_optimizer_keeps_the_steps_gradients(alone: None) -> None:
    for zero in range(4):
        engine = engine_of(zero, 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in batches(1, 2):
                for x in step[0]:
                    engine.optimizer.zero_grad()
                    for loss, again in losses_of(engine, x):
                        engine.backward(loss, retain_graph=again)
                    engine.step()
        check_same(whole(engine.module), plain(1, 2)[0])
        assert sum("keeps the gradients of the step" in str(w.message) for w in caught) == STEPS


def test_means_and_sums_in_one_step(alone: None) -> None:
    engine = engine_of(0, 1)
    x = torch.ones(MICRO, WIDTH)
    engine.backward(engine(x)[0].mean())
    with pytest.raises(BatchError, match="some losses of this step are means, and others a sum"):
        engine.backward((engine(x)[0].sum(), 2))


def test_sums_and_counts_add_up(alone: None) -> None:
    engine, model = engine_of(1, 2), seeded(TwoHeads)
    terms = 0
    for x in next(batches(1, 2))[0]:
        for loss, count in ((engine(x)[0].square().sum(), 2), (engine(x)[1].square().sum(), 6)):
            engine.backward((loss, count))
            terms += count
        engine.step()
        (model(x)[0].square().sum() + model(x)[1].square().sum()).backward()
    for parameter in model.parameters():
        parameter.grad /= terms  # type: ignore[operator]
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-5)


# --- a save in the middle of a step ------------------------------------------------------------------------


def save_case(zero: int, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Save after each micro batch; return the weights at the end, those of a resumed run, and its step."""
    engine, x = engine_of(zero, 2), list(batches(2, 2))
    rank, steps_saved = engine.get_data_parallel_rank(), 0
    for i, step in enumerate(x):
        for j, micro in enumerate(step[rank]):
            for loss, again in losses_of(engine, micro):
                engine.backward(loss, retain_graph=again)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    save_and_wait(engine, folder, tag=f"{i}-{j}", client_state={"i": i})
                said = [str(w.message) for w in caught if "saves the end of step" in str(w.message)]
                assert bool(said) == (rank == 0)
                assert all(f"end of step {i}" in text for text in said)
            engine.step()
    resumed = engine_of((zero + 1) % 4, 2)
    resumed.load_checkpoint(folder, tag="1-1")
    steps_saved = resumed.global_steps
    for step in x[steps_saved:]:
        for micro in step[rank]:
            for loss, again in losses_of(resumed, micro):
                resumed.backward(loss, retain_graph=again)
            resumed.step()
    return whole(engine.module), whole(resumed.module), steps_saved


@pytest.mark.parametrize("zero", STAGES)
def test_a_save_between_micro_batches_is_of_the_last_steps_end(
    ranks: Ranks, tmp_path: Path, zero: int
) -> None:
    expected, _ = plain(2, 2)
    for found, resumed, steps in ranks.run(2, save_case, zero, str(tmp_path)):
        assert steps == 1
        check_same(found, expected)
        check_same(resumed, expected)
