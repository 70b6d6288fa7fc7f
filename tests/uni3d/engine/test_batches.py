"""Micro batches of unequal sizes, other shapes and other kinds: plain PyTorch's numbers, or a BatchError."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from ranks import Ranks
from torch import Tensor, nn

import uni3d
from parallel.agreement import BatchError
from uni3d.pipe import PipelineModule

WIDTH, MICRO = 6, 4


class Net(nn.Module):
    """Regression of each token; returns its own loss as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        error = (x - y).square()
        return error.mean() if self.kind == "mean" else (error.sum(), error.numel())


def engine_of(model: nn.Module, zero: int = 0, steps: int = 2, **config: Any) -> uni3d.Engine:
    settings = {
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": zero},
        "parallel": {"device": "cpu"},
    }
    return uni3d.initialize(model=model, config=settings | config)[0]


def pairs(shapes: list[tuple[int, ...]], seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*s, WIDTH, generator=g), torch.randn(*s, WIDTH, generator=g)) for s in shapes]


def whole(engine: uni3d.Engine) -> dict[str, Tensor]:
    return engine.module_state_dict()


def refused(call: Callable[[Any], Any], batches: list[Any]) -> str:
    try:
        call(iter(batches))
    except BatchError as error:
        return str(error)
    raise AssertionError("no BatchError")


# --- sizes -----------------------------------------------------------------------------------------------


def plain_sums(shapes: list[list[tuple[int, ...]]]) -> tuple[list[float], dict[str, Tensor]]:
    """Train on each step's micro batches in one process: the mean over all elements."""
    model = Net("sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in shapes:
        results = [model(*batch) for batch in step_batches(step)]
        loss = sum(r[0] for r in results) / sum(r[1] for r in results)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def step_batches(shapes: list[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    return [pair for i, shape in enumerate(shapes) for pair in pairs([shape], i)]


LENGTHS: list[list[tuple[int, ...]]] = [[(4, 3), (4, 5), (4, 2), (4, 7)], [(4, 3), (4, 3), (1, 6), (3, 2)]]
"""Shapes of the micro batches of two steps: first rank 0's two, then rank 1's."""


def sums_case(zero: int) -> tuple[list[float], dict[str, Tensor], float, int]:
    engine = engine_of(Net("sum"), zero)
    first = 2 * engine.model.topology.dp_rank
    mine = [step_batches(step)[first : first + 2] for step in LENGTHS]
    evaluated = engine.eval_batch(iter(mine[0])).item()
    return [engine.train_batch(iter(b)).item() for b in mine], whole(engine), evaluated, engine.global_samples


@pytest.mark.parametrize("zero", [0, slow(1), slow(2), slow(3)])
def test_sums_and_counts_are_right_with_any_sizes_and_lengths(ranks: Ranks, zero: int) -> None:
    losses, expected = plain_sums(LENGTHS)
    for found, weights, evaluated, samples in ranks.run(2, sums_case, zero):
        assert found == pytest.approx(losses, rel=1e-5)
        assert evaluated == pytest.approx(losses[0], rel=1e-5)
        assert samples == 16 + 12, "as many as came"
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def mean_lengths_case(zero: int) -> tuple[float, dict[str, Tensor]]:
    engine = engine_of(Net("mean"), zero)
    first = 2 * engine.model.topology.dp_rank
    return engine.train_batch(iter(step_batches(LENGTHS[0])[first : first + 2])).item(), whole(engine)


@pytest.mark.parametrize("zero", [slow(0), 3])
def test_means_of_micro_batches_of_other_lengths_count_alike(ranks: Ranks, zero: int) -> None:
    model = Net("mean")
    loss = torch.stack([model(*batch) for batch in step_batches(LENGTHS[0])]).mean()
    loss.backward()
    for found, weights in ranks.run(2, mean_lengths_case, zero):
        assert found == pytest.approx(loss.item(), rel=1e-5)
        for name, weight in model.named_parameters():
            torch.testing.assert_close(weights[name], weight.detach() - 0.5 * weight.grad)


def short_case(zero: int, loss: str) -> tuple[list[str], float, int]:
    """One rank's last micro batch is short; afterwards train on two whole ones."""
    if loss == "loss_fn":
        model: nn.Module = nn.Linear(WIDTH, WIDTH)
        torch.manual_seed(0)
        nn.init.normal_(model.weight)
        nn.init.zeros_(model.bias)
        model.loss_fn = F.mse_loss
    else:
        model = Net("mean")
    engine = engine_of(model, zero)
    rank = engine.model.topology.dp_rank
    before = whole(engine)
    errors = []
    for call in (engine.train_batch, engine.eval_batch):
        errors.append(refused(call, pairs([(4,), (3,) if rank == 1 else (4,)], rank)))
    assert all(torch.equal(whole(engine)[name], before[name]) for name in before)
    found = engine.train_batch(iter(pairs([(4,), (4,)], rank))).item()
    return errors, found, engine.global_steps


@pytest.mark.parametrize("loss", ["own", slow("loss_fn")])
@pytest.mark.parametrize("zero", [0, slow(2), 3])
def test_means_of_a_short_last_batch_are_refused_by_all_ranks(ranks: Ranks, zero: int, loss: str) -> None:
    (errors, first, steps), (theirs, second, _) = ranks.run(2, short_case, zero, loss)
    assert errors == theirs
    assert errors[0].startswith(
        "step 1 was not taken: rank 1: the data iterator gave micro batches of [4, 3] samples; "
    )
    assert errors[1].startswith("rank 1: the data iterator gave micro batches of [4, 3] samples; ")
    assert "expected train_micro_batch_size_per_gpu(4) in each" in errors[0]
    assert first == second > 0
    assert steps == 1


def late_case() -> tuple[str, int, int, bool]:
    """Read a step's numbers during the next, as on GPUs."""
    optimizer = {"type": "Adam", "params": {"lr": 0.1}}
    engine = engine_of(Net("mean"), optimizer=optimizer)
    rank, before = engine.model.topology.dp_rank, whole(engine)
    engine._stepper.deferred = True
    engine.train_batch(iter(pairs([(4,), (3,) if rank == 1 else (4,)], rank)))
    message = refused(engine.train_batch, pairs([(4,), (4,)], rank))
    unchanged = all(torch.equal(w, before[name]) for name, w in whole(engine).items())
    engine.train_batch(iter(pairs([(4,), (4,)], rank)))
    engine.module_state_dict()
    return message, engine.global_steps, engine.global_samples, unchanged


def test_a_short_batch_that_is_noticed_a_step_later(ranks: Ranks) -> None:
    first, second = ranks.run(2, late_case)
    assert first == second
    message, steps, samples, unchanged = first
    assert message.startswith("step 1 was not taken: rank 1: the data iterator gave micro batches of [4, 3]")
    assert (steps, samples, unchanged) == (1, 15 + 16 + 16, True), "two batches were lost"


def test_sizes_that_cannot_be_seen_are_the_scripts_affair(alone: None) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, 1)

        def forward(self, x: Tensor, starts: Tensor) -> Tensor:
            return self.linear(x).square().mean() + 0 * starts.sum()

    engine = engine_of(Flat(), steps=1)
    engine.train_batch(iter([(torch.ones(17, WIDTH), torch.zeros(4))]))
    assert engine.global_samples == MICRO


def test_a_collate_function_may_pack_its_samples(alone: None) -> None:
    data = [torch.ones(WIDTH) for _ in range(20)]
    model = nn.Linear(WIDTH, 1)
    model.loss_fn = lambda outputs, targets: (outputs - targets).square().mean()

    def collate(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
        packed = torch.stack(samples)[None]
        return packed, packed[..., :1]

    config = {
        "train_micro_batch_size_per_gpu": MICRO,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "parallel": {"device": "cpu"},
    }
    engine, _, loader, _ = uni3d.initialize(
        model=model, config=config, training_data=data, collate_fn=collate
    )
    engine.train_batch()
    engine.train_batch(iter(loader))
    assert engine.global_samples == 2 * MICRO


def test_losses_of_two_kinds_in_a_step_are_refused(alone: None) -> None:
    model = Net("mean")
    kinds = iter(["mean", "sum", "mean", "mean"])
    model.register_forward_pre_hook(lambda module, _: setattr(module, "kind", next(kinds)))
    engine = engine_of(model)
    message = refused(engine.train_batch, pairs([(4,), (4,)], 0))
    assert "the losses of some micro batches are means, and others a sum and its number of terms" in message
    engine.train_batch(iter(pairs([(4,), (4,)], 0)))


def kinds_case() -> str:
    engine = engine_of(Net("mean" if torch.distributed.get_rank() else "sum"))
    with pytest.raises(RuntimeError, match="a mean on some and a sum with a count on others") as caught:
        engine.train_batch(iter(pairs([(4,), (4,)], 0)))
    return str(caught.value)


def test_ranks_with_losses_of_two_kinds_are_refused(ranks: Ranks) -> None:
    first, second = ranks.run(2, kinds_case)
    assert first == second


# --- kinds -----------------------------------------------------------------------------------------------


def weighted(outputs: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    weights = targets["weights"]
    return ((outputs - targets["values"]).square() * weights).sum(), weights.sum() * WIDTH


class Two(nn.Module):
    """Model of two inputs, and a loss of a dict of targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.loss_fn = weighted

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * scale


class First(nn.Module):
    """First layer of a chain, of a tuple of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, scale = inputs
        return torch.tanh(self.a(x)), scale


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, scale = inputs
        return self.b(x) * scale


def chain() -> PipelineModule:
    torch.manual_seed(0)
    first, last = First(), Last()
    return PipelineModule([first, last], loss_fn=weighted, partition_method="uniform")


def kind_batches(rank: int, kind: str) -> list[Any]:
    g = torch.Generator().manual_seed(rank)
    made = []
    for _ in range(2):
        x, scale = torch.randn(MICRO, WIDTH, generator=g), torch.rand(MICRO, 1, generator=g)
        weights = torch.randint(0, 3, (MICRO, 1), generator=g)
        targets = {"values": torch.randn(MICRO, WIDTH, generator=g), "weights": weights}
        inputs = {"dict": {"x": x, "scale": scale}, "list": [x, scale]}.get(kind, (x, scale))
        made.append((inputs, targets))
    return made


def plain_two(dp: int) -> tuple[float, dict[str, Tensor]]:
    model = Two()
    results = [
        weighted(model(*inputs), targets)
        for rank in range(dp)
        for inputs, targets in kind_batches(rank, "tuple")
    ]
    loss = sum(r[0] for r in results) / sum(r[1] for r in results)
    loss.backward()
    return loss.item(), {n: p.detach() - 0.5 * p.grad for n, p in model.named_parameters()}


def kind_case(kind: str, pp: int, schedule: str = "1f1b") -> tuple[float, float, dict[str, Tensor]]:
    parallel = {"device": "cpu", "pp": pp, "schedule": schedule}
    engine = engine_of(chain() if kind == "chain" else Two(), parallel=parallel)
    batches = kind_batches(engine.model.topology.dp_rank, kind)
    evaluated = engine.eval_batch(iter(batches)).item()
    loss = engine.train_batch(iter(batches)).item()
    names = {name.split(".", 1)[1] if kind == "chain" else name: w for name, w in whole(engine).items()}
    return loss, evaluated, names


KINDS = [("tuple", 1, "1f1b"), ("dict", 1, "1f1b"), ("chain", 2, "gpipe"), ("chain", 2, "zero_bubble")]
SLOW = [slow("list", 1, "1f1b"), slow("chain", 1, "1f1b"), slow("chain", 2, "1f1b")]


@pytest.mark.parametrize(("kind", "pp", "schedule"), [*KINDS, *SLOW])
def test_tuples_and_dicts_with_a_loss_fn(ranks: Ranks, kind: str, pp: int, schedule: str) -> None:
    loss, expected = plain_two(2 // pp)
    seen: set[str] = set()
    for found, evaluated, weights in ranks.run(2, kind_case, kind, pp, schedule):
        assert (found, evaluated) == (pytest.approx(loss, rel=1e-5),) * 2
        seen |= weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[name])
    assert seen == expected.keys()


# --- pipelines -------------------------------------------------------------------------------------------


def pipe_case(dp: int) -> tuple[list[str], list[float]]:
    """Give batches that torch's schedules can't take, on the last data-parallel rank; then good ones."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(2)]
    model = PipelineModule(layers, loss_fn=F.mse_loss, partition_method="uniform")
    engine = engine_of(model, parallel={"device": "cpu", "pp": 2})
    good = pairs([(4, 3), (4, 3)], engine.model.topology.dp_rank)
    x, y = good[0]
    bad: list[list[Any]] = [
        pairs([(4, 3), (4, 5)], 0),
        pairs([(4, 3), (3, 3)], 0),
        pairs([(2, 3), (2, 3)], 0),
        [({"x": x}, y)] * 2,
        [((x,), y)] * 2,
    ]
    last = engine.model.topology.dp_rank == dp - 1
    errors = [refused(engine.train_batch, b if last else good) for b in bad]
    errors.append(refused(engine.eval_batch, bad[0] if last else good))
    engine.module.train(True)
    return errors, [engine.train_batch(iter(good)).item(), engine.eval_batch(iter(good)).item()]


@pytest.mark.parametrize("dp", [slow(1), 2])
def test_what_a_pipeline_cannot_take_is_refused_by_all_ranks(ranks: Ranks, dp: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(2)))
    batches = [batch for rank in range(dp) for batch in pairs([(4, 3), (4, 3)], rank)]
    expected = []
    for _ in range(2):
        loss = torch.stack([F.mse_loss(model(x), y) for x, y in batches]).mean()
        expected.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
    results = ranks.run(2 * dp, pipe_case, dp)
    for errors, losses in results:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert errors == results[0][0]
        for message, error in zip(
            [
                r"one shape in a step; got [4, 3, 6] (float32) and [4, 5, 6] (float32)",
                "micro batches of [4, 3] samples; a pipeline needs train_micro_batch_size_per_gpu(4)",
                "micro batches of [2, 2] samples",
                "the inputs of a micro batch are a dict; a pipeline takes a tensor or a tuple of tensors",
                "the inputs of a micro batch are a tuple of Tensor; a pipeline takes",
                "one shape in a step",
            ],
            errors,
            strict=True,
        ):
            assert message in error
            assert dp == 1 or "rank " in error
