"""Corner cases of pipelines, compared with one process: plain PyTorch or pp = 1."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import STAGES, slow
from ranks import RankError, Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import uni3d
from uni3d.pipe import LayerSpec, PipelineModule, TiedLayerSpec

WIDTH, TOKENS = 8, 11


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def engine_of(layers: list[Any], loss: Any, *, zero: int = 0, **parallel: Any) -> uni3d.Engine:
    torch.manual_seed(0)
    model = PipelineModule(layers, loss_fn=loss, partition_method="uniform")
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": zero},
        "parallel": {"device": "cpu", **parallel},
    }
    return uni3d.initialize(model=model, config=config)[0]


def numbers(seed: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, WIDTH, generator=g), torch.randn(4, WIDTH, generator=g)) for _ in range(2)]


def tokens(seed: int, rows: int = 4, length: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, TOKENS, (rows, length), generator=g),) * 2 for _ in range(2)]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def frozen_case(frozen: str, zero: int, schedule: str, virtual: int) -> float:
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    for i in map(int, frozen):
        layers[i].requires_grad_(False)
    plain = nn.Sequential(*deepcopy(layers))
    engine = engine_of(layers, mse, zero=zero, pp=2, schedule=schedule, virtual_stages=virtual)
    batch = numbers(0)
    engine.train_batch(iter(batch))
    (sum(mse(plain(x), y) for x, y in batch) / 2).backward()
    apart = [0.0]
    for name, parameter in engine.module.named_parameters():
        given = plain.get_parameter(name)
        expected = given if given.grad is None else given - 0.5 * given.grad
        apart.append((whole(parameter) - expected).abs().max().item())
    return max(apart)


@pytest.mark.parametrize("frozen", [slow("0"), "01", "2"])
@pytest.mark.parametrize(
    ("zero", "schedule", "virtual"),
    [(0, "zero_bubble", 1), slow(0, "zero_bubble_v", 2), slow(3, "zero_bubble", 1), (3, "zero_bubble_v", 2)],
)
def test_split_backward_passes_after_frozen_layers(
    ranks: Ranks, frozen: str, zero: int, schedule: str, virtual: int
) -> None:
    assert max(ranks.run(2, frozen_case, frozen, zero, schedule, virtual)) < 1e-6


def buffers_case(pp: int) -> dict[str, list[float]]:
    layers = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)]
    layers += [nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)]
    engine = engine_of(layers, mse, pp=pp)
    for seed in range(2):
        engine.train_batch(iter(numbers(seed)))
    return {name: buffer.flatten().tolist() for name, buffer in engine.module.named_buffers()}


def test_running_statistics_learn_from_the_data_alone(ranks: Ranks) -> None:
    (expected,) = ranks.run(1, buffers_case, 1)
    first, second = ranks.run(2, buffers_case, 2)
    assert len(expected) == 6
    for name, values in (first | second).items():
        assert values == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name


def lengths_case(pp: int, zero: int) -> list[float]:
    layers = [nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, TOKENS)]
    engine = engine_of(layers, next_token, zero=zero, pp=pp)
    mine = [[3, 3, 3, 5], [3, 4, 5, 5]][engine.model.topology.dp_rank]  # each pads its own batch
    steps = [tokens(10 * s + engine.model.topology.dp_rank, 2, length) for s, length in enumerate(mine)]
    return [engine.train_batch(iter(batch)).item() for batch in steps]


@pytest.mark.parametrize("zero", [slow(0), 3])
def test_data_parallel_ranks_with_batches_of_other_lengths(ranks: Ranks, zero: int) -> None:
    expected = ranks.run(2, lengths_case, 1, zero)[0]
    for losses in ranks.run(4, lengths_case, 2, zero):
        assert losses == pytest.approx(expected, rel=1e-5)


class TwoTables(nn.Module):
    """Module with word and position embeddings; a tied head uses only the words."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(TOKENS, WIDTH), nn.Embedding(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.word(x), 0.0, self.training) + self.position(torch.arange(x.shape[1]))


def head(module: Any, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training) @ module.word.weight.T


def tied_case(pp: int) -> tuple[list[float], list[bool]]:
    tied: dict[str, Any] = {"tied_weight_attr": "word.weight"}
    plain_head = TiedLayerSpec("e", TwoTables, forward_fn=lambda m, x: x @ m.word.weight.T, **tied)
    layers = [TiedLayerSpec("e", TwoTables, **tied), LayerSpec(nn.Linear, WIDTH, WIDTH), plain_head]
    engine = engine_of(layers, next_token, pp=pp)
    losses = [engine.train_batch(iter(tokens(seed))).item() for seed in range(3)]
    if pp > 1:
        return losses, []
    alone = engine_of([*layers[:-1], TiedLayerSpec("e", TwoTables, forward_fn=head, **tied)], next_token)
    same = []
    for train in (True, False):
        alone.train(train)
        outputs = [alone(tokens(0)[0][0]) for _ in range(2)]
        same.append(torch.equal(*outputs))
    return losses, same


def test_a_tied_module_of_which_a_stage_uses_a_part(ranks: Ranks) -> None:
    ((expected, same),) = ranks.run(1, tied_case, 1)
    assert same == [False, True], "dropout in training, new each time; none in evaluation"
    for losses, _ in ranks.run(2, tied_case, 2):
        assert losses == pytest.approx(expected, rel=1e-5)


class WithIds(nn.Module):
    """Layer that passes tokens on with the activations and embeds them again."""

    def __init__(self, first: bool = False, last: bool = False) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.table, self.linear = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS if last else WIDTH)

    def forward(self, x: Any) -> Any:
        hidden, ids = (0.0, x) if self.first else x
        hidden = self.linear(hidden + self.table(ids))
        return hidden if self.last else (hidden, ids)


def ids_case(pp: int) -> list[float]:
    layers = [
        LayerSpec(WithIds, first=True),
        LayerSpec(WithIds),
        LayerSpec(WithIds),
        LayerSpec(WithIds, last=True),
    ]
    engine = engine_of(layers, next_token, pp=pp)
    return [engine.train_batch(iter(tokens(seed))).item() for seed in range(2)]


def test_tokens_that_are_handed_on(ranks: Ranks) -> None:
    (expected,) = ranks.run(1, ids_case, 1)
    for losses in ranks.run(2, ids_case, 2):
        assert losses == pytest.approx(expected, rel=1e-5)


class OneTuple(nn.Linear):
    def forward(self, x: Any) -> Any:
        return (super().forward(x[0] if isinstance(x, tuple) else x),)


def one_tuple_case() -> None:
    layers = [OneTuple(WIDTH, WIDTH), OneTuple(WIDTH, WIDTH)]
    engine_of(layers, mse, pp=2).train_batch(iter(numbers(0)))


def test_a_tuple_of_one_is_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="returned a tuple of one tensor"):
        ranks.run(2, one_tuple_case)


def counted_case() -> float:
    def loss(outputs: Tensor, targets: Tensor) -> Any:
        return F.mse_loss(outputs, targets, reduction="sum"), targets.numel()

    engine = engine_of([nn.Linear(WIDTH, WIDTH)], loss)
    batch = numbers(0)
    expected = torch.stack([mse(engine(x), y) for x, y in batch]).mean()
    return abs(engine.train_batch(iter(batch)).item() - expected.item())


def test_a_count_that_is_a_plain_number(ranks: Ranks) -> None:
    assert ranks.run(1, counted_case)[0] < 1e-6


def written_case(zero: int, inference: bool) -> float:
    engine = engine_of([nn.Linear(WIDTH, WIDTH)], mse, zero=zero)
    batch = numbers(engine.model.topology.dp_rank)
    batch = [(x[:2], y[:2]) for x, y in batch] if engine.world_size > 1 else batch
    engine.train_batch(iter(batch))
    engine.eval()
    with torch.inference_mode() if inference else torch.no_grad():
        engine(batch[0][0])
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.clamp_(-0.01, 0.01)
    assert not engine.module.training
    engine.eval_batch(iter(batch))
    assert not engine.module.training, "an evaluation leaves the mode as it was"
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.train_batch(iter(batch))
    return max(whole(p).abs().max().item() for p in engine.module.parameters())


@pytest.mark.parametrize("inference", [slow(False), True])
@pytest.mark.parametrize("zero", STAGES)
def test_what_a_script_writes_after_an_evaluation_stays(ranks: Ranks, zero: int, inference: bool) -> None:
    assert max(ranks.run(2, written_case, zero, inference)) <= 0.01


def two_balances_case() -> None:
    engine_of([nn.Linear(WIDTH, WIDTH)], mse, balance="parameters")


def test_two_ways_to_cut_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"ValueError: parallel\.balance is 'parameters', but"):
        ranks.run(1, two_balances_case)
