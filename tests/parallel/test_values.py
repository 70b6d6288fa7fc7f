"""Values on their way into a split model: those of a model that was built whole, and buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fresh_memory import fresh_memory_is_nan
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import parallel
from parallel.values import _where_ranks_meet

WIDTH = 4


class Odd(nn.Module):
    """Chain with a tie, an RNN, frozen, scalar and transposed weights, and a tensor that `_apply` moves."""

    tp_plan = {"layers.0": "colwise", "layers.1": "rowwise"}  # noqa: RUF012 - as models declare it
    pipeline_layers = ["layers.0", "layers.1", "layers.2", "table", "layers.3"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.layers[2].weight = self.layers[3].weight
        self.layers[2].bias.requires_grad_(False)
        self.table = Table()

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(float(len(name)))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(()))
        self.turned = nn.Parameter(torch.rand(WIDTH, 3).t())
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.plain = torch.arange(3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.plain = fn(self.plain)
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] * self.scale


def odd(seed: int = 7) -> Odd:
    torch.manual_seed(seed)
    return Odd()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def split(model: nn.Module, place: tuple[int, int, int, int], *, offload: bool = False, **how: Any) -> Any:
    pp, dp, tp, zero = place
    topology = parallel.Topology(parallel.Degrees(pp=pp, dp=dp, tp=tp), zero_stage=zero)
    settings = parallel.Settings(zero_stage=zero, offload=offload)
    with fresh_memory_is_nan():
        return parallel.build(model, topology, settings, **how).module


PLACES = [(1, 1, 1, 0), (1, 2, 1, 0), (1, 2, 1, 3), (2, 1, 1, 1), (1, 1, 2, 3)]
SOME = [PLACES[0], *(slow(place) for place in PLACES[1:2]), *PLACES[2:]]


def built_case(place: tuple[int, int, int, int], dtype: torch.dtype, offload: bool) -> None:
    first, mine = odd().to(dtype), odd(7 + torch.distributed.get_rank()).to(dtype)
    module = split(mine, place, offload=offload)
    expected = {**dict(first.named_parameters(remove_duplicate=False)), **dict(first.named_buffers())}
    found = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    assert found.keys() == expected.keys() if place[0] == 1 else found.keys() < expected.keys()
    for name, tensor in found.items():
        wanted = expected[name].detach()
        if isinstance(tensor, nn.Parameter):
            assert tensor.requires_grad == expected[name].requires_grad, name
            wanted = wanted.float()
        assert torch.equal(whole(tensor), wanted), name
    if hasattr(module, "table"):
        assert module.table.plain.tolist() == [0, 1, 2]
        flat = module.table.rnn._flat_weights
        assert all(a is b for a, b in zip(flat, module.table.rnn.parameters(), strict=True))


@pytest.mark.parametrize("place", SOME, ids=str)
def test_a_built_model_has_the_first_rank_s_values(ranks: Ranks, place: tuple[int, int, int, int]) -> None:
    world = place[0] * place[1] * place[2]
    ranks.run(world, built_case, place, torch.float32, False)
    ranks.run(world, built_case, place, torch.bfloat16, True)


def built(where: str, seed: int = 7) -> Odd:
    with parallel.meta_parameters() if where == "meta" else torch.device("cpu"):
        return odd(seed)


def later_case(place: tuple[int, int, int, int], where: str) -> None:
    module = split(built(where, 7 + torch.distributed.get_rank()), place, loaded_later=True)
    for name, parameter in module.named_parameters():
        assert whole(parameter).isnan().all(), name
    buffers = dict(built(where).named_buffers())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("where", ["meta", "cpu"])
@pytest.mark.parametrize("place", SOME, ids=str)
def test_parameters_that_are_to_be_loaded_are_nan(
    ranks: Ranks, place: tuple[int, int, int, int], where: str
) -> None:
    ranks.run(place[0] * place[1] * place[2], later_case, place, where)


def drawn_case(place: tuple[int, int, int, int]) -> None:
    module = split(built("meta", 7 + torch.distributed.get_rank()), place)
    if not hasattr(module, "table"):
        return
    assert module.table.scale.item() == len("table.scale")
    assert module.table.steps.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(module.table.scratch, built("meta").table.scratch), "rank 0's"
    assert module.table.plain.tolist() == [0, 1, 2]


@pytest.mark.parametrize("place", SOME, ids=str)
def test_buffers_keep_their_values_when_parameters_are_drawn(
    ranks: Ranks, place: tuple[int, int, int, int]
) -> None:
    ranks.run(place[0] * place[1] * place[2], drawn_case, place)


def test_meta_parameters_are_the_same_objects_everywhere() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)
            weight.mark = 1  # type: ignore[attr-defined]
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.first.weight = weight
            self.second.weight = weight
            self.rnn = nn.LSTM(3, 3)

    with parallel.meta_parameters():
        model = Shared()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.first.weight is model.second.weight
    assert not model.first.weight.requires_grad
    assert model.second.weight.mark == 1
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    assert not any(parameter.is_meta for parameter in Shared().parameters()), "only in the context"


@pytest.mark.parametrize(("backend", "where"), [("cuda:fake", "cuda:1"), ("cpu:fake,cuda:fake", "cpu")])
def test_values_are_sent_between_cpus_where_the_group_connects_them(backend: str, where: str) -> None:
    dist.init_process_group(backend, rank=0, world_size=2, store=FakeStore())
    try:
        assert str(_where_ranks_meet(torch.device("cuda", 1))) == where
    finally:
        dist.destroy_process_group()
