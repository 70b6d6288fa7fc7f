"""Ranks that run different layers: right at ZeRO 0-2, refused at stage 3."""

import warnings
from typing import Any

import pytest
import torch
from marks import STAGES, slow
from ranks import Ranks
from torch import Tensor, nn

import uni3d

WIDTH, STEPS = 6, 4
ADAMW = {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.5}


class Tasks(nn.Module):
    """Heads of equal and of other sizes, one per task; `skip` drops a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.heads = nn.ModuleDict(
            {"a": nn.Linear(WIDTH, 1), "b": nn.Linear(WIDTH, 1), "c": nn.Linear(WIDTH, 5)}
        )
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, task: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.trunk(x))
        for i, layer in enumerate(self.layers):
            if i != skip:
                x = x + torch.tanh(layer(x))
        x = self.heads["abc"[int(task)]](x)
        if task == 0:
            x = x * self.temperature
        return x.square().sum(), torch.tensor(len(x))


def model() -> Tasks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Tasks()


def batch(step: int, rank: int, micro: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a micro batch. In the first two steps nobody has task c, in the last one everybody."""
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + micro)
    x = torch.randn(2, WIDTH, generator=generator)
    task = 2 if step == STEPS - 1 or (step == 2 and rank == 1 and micro == 1) else (rank + micro) % 2
    return x, torch.tensor(task), torch.tensor((step + rank) % 4)


def plain(ranks: int, accumulation: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in one process of plain PyTorch, as DDP's `find_unused_parameters` does."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), **ADAMW)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = torch.zeros(()), 2 * ranks * accumulation
        for rank in range(ranks):
            for micro in range(accumulation):
                total = total + net(*batch(step, rank, micro))[0] / count
        total.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        optimizer.step()
        losses.append(total.item())
    return losses, norms, net.state_dict()


def engine_of(zero: int, accumulation: int, **config: Any) -> uni3d.Engine:
    values = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "parallel": {"device": "cpu"},
    }
    engine: uni3d.Engine = uni3d.initialize(model=model(), config=values | config)[0]
    return engine


def train_case(zero: int, accumulation: int, group: int | None) -> Any:
    sharding = {"stage": zero} | ({} if group is None else {"mics_shard_size": group})
    engine = engine_of(zero, accumulation, zero_optimization=sharding)
    losses, norms = [], []
    for step in range(STEPS):
        micros = [batch(step, engine.global_rank, micro) for micro in range(accumulation)]
        losses.append(engine.train_batch(iter(micros)).item())
        norms.append(engine.get_global_grad_norm())
    return losses, norms, engine.module_state_dict()


@pytest.mark.parametrize("accumulation", [slow(1), 2])
@pytest.mark.parametrize(
    ("zero", "size", "group"), [(0, 2, None), slow(1, 2, None), slow(2, 2, None), (2, 4, 2)]
)
def test_stages_0_to_2_give_the_sums_of_one_process(
    ranks: Ranks, zero: int, size: int, group: int | None, accumulation: int
) -> None:
    losses, norms, weights = plain(size, accumulation)
    for found in ranks.run(size, train_case, zero, accumulation, group):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(found[2][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def refused_case(accumulation: int) -> list[str]:
    engine = engine_of(3, accumulation)
    engine.train_batch(iter([batch(0, 0, 0)] * accumulation))  # the same on all ranks
    before = engine.module_state_dict()
    errors = []
    for step in range(2):  # heads a and b have the same size, so their gathers answer each other
        x, _, _ = batch(step, engine.global_rank, 0)
        micros = [(x, torch.tensor(engine.global_rank), torch.tensor(9))] * accumulation
        with pytest.raises(RuntimeError, match="not taken") as caught:
            engine.train_batch(iter(micros))
        errors.append(str(caught.value))
    after = engine.module_state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.train_batch(iter([batch(0, 0, 0)] * accumulation))
    assert engine.was_step_applied()
    return errors


@pytest.mark.parametrize("accumulation", [slow(1), 2])
def test_stage_3_refuses_them_by_name_on_all_ranks(ranks: Ranks, accumulation: int) -> None:
    first, second = ranks.run(2, refused_case, accumulation)
    assert first == second
    for error in first:
        assert error.startswith("step 2 was not taken: ranks 0 and 1 ran different layers")
        assert "heads.a on rank 0 and heads.b on rank 1" in error


def first_step_case() -> str:
    engine = engine_of(3, 1)
    x, _, _ = batch(0, engine.global_rank, 0)
    with pytest.raises(RuntimeError, match="is at") as caught:
        engine.train_batch(iter([(x, torch.tensor(2 * engine.global_rank), torch.tensor(9))]))
    return str(caught.value)


def test_the_first_step_at_stage_3_stops_before_other_layers_are_gathered(ranks: Ranks) -> None:
    """Heads a and c differ in size, so their gathers would end the processes."""
    first, second = ranks.run(2, first_step_case)
    assert first.startswith("rank 0 is at heads.a and rank 1 at heads.c: at ZeRO stage 3 all ranks")
    assert second.startswith("rank 1 is at heads.c and rank 0 at heads.a")


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i != skip:
                x = torch.tanh(layer(x))
        return x.square().mean()


def late_case() -> tuple[list[int], dict[str, Tensor]]:
    """Read a step's numbers during the next, as on GPUs; in step 3 rank 1 first skips a layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = Skipping()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": 0.1, "eps": 1e-3}},
        "parallel": {"device": "cpu"},
    }
    engine = uni3d.initialize(model=net, config=config)[0]
    engine._stepper._may_defer = True
    skipped = []
    for step in range(6):
        skip = torch.tensor(0 if step in (2, 4) and engine.global_rank == 1 else 9)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            engine.train_batch(iter([(inputs(step, engine.global_rank), skip)]))
        if any("was skipped" in str(warning.message) for warning in told):
            skipped.append(step)
    assert engine.skipped_steps == 1
    return skipped, engine.module_state_dict()


def inputs(step: int, rank: int) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def test_a_layer_first_left_out_after_numbers_were_deferred(ranks: Ranks) -> None:
    """The step in which it happens is skipped with a warning; the next time it is right."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = Skipping()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, eps=1e-3)
    for step in (0, 1, 3, 4, 5):  # without step 2
        optimizer.zero_grad()
        for rank in range(2):
            skip = torch.tensor(0 if step == 4 and rank == 1 else 9)
            (net(inputs(step, rank), skip) / 2).backward()
        optimizer.step()
    (skipped, weights), (_, same) = ranks.run(2, late_case)
    assert skipped == [3], "rank 0 warns during the next step"
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(weights[name], same[name])


def no_gradient_case(zero: int) -> str:
    engine = engine_of(zero, 1)
    constant = torch.zeros((), requires_grad=True)
    engine(*batch(0, 0, 0))
    engine.backward(constant * 2)
    with pytest.raises(RuntimeError, match="no trained parameter") as caught:
        engine.step()
    return str(caught.value)


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("size", [slow(1), 2])
def test_a_step_without_any_gradient_is_refused(ranks: Ranks, zero: int, size: int) -> None:
    for error in ranks.run(size, no_gradient_case, zero):
        assert "no trained parameter has a gradient" in error


def gradient_case(accumulation: int, zero: int) -> list[float]:
    net = nn.Linear(1, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "parallel": {"device": "cpu"},
    }
    engine = uni3d.initialize(model=net, config=config)[0]
    for _ in range(accumulation):
        engine.backward(engine(torch.ones(1, 1)).mean())
        if engine.is_gradient_accumulation_boundary():
            (gradient,) = [p.grad.full_tensor().item() for p in engine.module.parameters()]
            for parameter in engine.module.parameters():
                parameter.grad.mul_(0.5)
        engine.step()
    return [gradient, engine.get_global_grad_norm() or 0.0]


@pytest.mark.parametrize("accumulation", [slow(1), 4])
@pytest.mark.parametrize("zero", [0, slow(2), 3])
def test_gradients_before_the_step_are_means(ranks: Ranks, zero: int, accumulation: int) -> None:
    """DDP's are, too; and changes that a script makes to them count."""
    for gradient, norm in ranks.run(2, gradient_case, accumulation, zero):
        assert gradient == 1.0
        assert norm == 0.5
