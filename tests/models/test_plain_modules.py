"""Unusual but valid modules train under ZeRO unchanged, with the steps of plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import STAGES
from models import WIDTH, assert_same, global_batches, make_engine, seeded, train, train_plainly, whole
from ranks import Ranks
from torch import Tensor, nn

from parallel.layers import blocks, units

STEPS = 3
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}}}


class Net(nn.Module):
    """Classifier on top of `features`, with a loss."""

    returns_loss = True

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 1)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.out(self.features(x)), y)


class NestedLists(Net):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2))

    def features(self, x: Tensor) -> Tensor:
        for row in self.rows:
            for layer in row:
                x = torch.tanh(layer(x))
        return x


class Dicts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"first": nn.Linear(WIDTH, WIDTH), "second": nn.Linear(WIDTH, WIDTH)})

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.parts["second"](torch.tanh(self.parts["first"](x))))


class Bare(Net):
    """Module with a 0-d parameter, a one-element one, one used twice and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.shift = nn.Parameter(torch.tensor([0.1]))
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 2)
        self.unused = nn.Parameter(torch.randn(3, 3))

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.matrix) @ self.matrix) * self.temperature + self.shift


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)

    def features(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1]


class Convolutions(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 1, 1))
        self.net[0].weight.data = self.net[0].weight.data.transpose(0, 2).contiguous().transpose(0, 2)
        assert not self.net[0].weight.is_contiguous()

    def features(self, x: Tensor) -> Tensor:
        return self.net(x.unsqueeze(1)).squeeze(1)


class Normed(Net):
    """Model with batch norm, whose statistics come from each rank's own samples."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU())
        self.layers = nn.ModuleList([layer])

    def features(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class HalfLow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(WIDTH, WIDTH).to(torch.bfloat16)
        self.high = nn.Linear(WIDTH, WIDTH)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.low(self.high(x)))


KINDS: dict[str, Callable[[], Net]] = {
    "nested lists": NestedLists,
    "dicts": Dicts,
    "bare": Bare,
    "recurrent": Recurrent,
    "convolutions": Convolutions,
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


def steps_case(zero: int) -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    results = {}
    for kind in KINDS:
        engine = make_engine(seeded(KINDS[kind]), zero=zero, clip=0.5, config=SGD)
        results[kind] = (train(engine, global_batches(STEPS)), whole(engine.module))
    return results


@pytest.mark.parametrize("zero", STAGES)
def test_the_steps_are_those_of_one_process(ranks: Ranks, zero: int) -> None:
    results = ranks.run(2, steps_case, zero)
    for kind in KINDS:
        losses, _, model = train_plainly(seeded(KINDS[kind]), global_batches(STEPS), sgd, clip=0.5)
        for result in results:
            found, state = result[kind]
            assert found == pytest.approx(losses, rel=1e-5), kind
            assert_same(state, model)


def test_layers_in_nested_containers_are_gathered_one_by_one() -> None:
    for model, layers in ((NestedLists(), 4), (Dicts(), 2)):
        assert len(units(model, blocks(model))) == layers


def batch_norm_case() -> tuple[list[float], torch.dtype, torch.dtype, float]:
    torch.manual_seed(3)
    model = Normed()
    types: list[torch.dtype] = []
    model.layers[0][0].register_forward_hook(lambda _m, _a, out: types.append(out.dtype))
    engine = make_engine(model, zero=3, config=SGD | {"bf16": {"enabled": True}})
    losses = train(engine, global_batches(STEPS))
    norm: Any = engine.module.get_submodule("layers.0.1")
    return losses, types[0], norm.running_mean.dtype, norm.running_mean.abs().sum().item()


def test_batch_norms_compute_in_fp32_where_the_rest_is_in_bf16(ranks: Ranks) -> None:
    for losses, linear, statistics, moved in ranks.run(2, batch_norm_case):
        assert losses[-1] == losses[-1]
        assert (linear, statistics) == (torch.bfloat16, torch.float32)
        assert moved > 0


def low_case() -> tuple[set[torch.dtype], dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(3)
    model = HalfLow()
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    engine = make_engine(model, zero=2, model_parameters=list(model.parameters()))
    return {p.dtype for p in engine.parameters()}, before, whole(engine.module)


def test_low_precision_parameters_become_fp32_masters(ranks: Ranks) -> None:
    for types, before, after in ranks.run(2, low_case):
        assert types == {torch.float32}
        for name, parameter in before.items():
            assert torch.equal(after[name], parameter), name


def refused_case(dtype: torch.dtype) -> str:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(model.weight.detach().to(dtype))
    with pytest.raises(ValueError, match="parameters must be") as caught:
        make_engine(model, zero=1)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types_are_refused(ranks: Ranks, dtype: torch.dtype) -> None:
    (error,) = ranks.run(1, refused_case, dtype)
    assert error.startswith(f"weight is {dtype}; parameters must be torch.float32, torch.bfloat16 or")
