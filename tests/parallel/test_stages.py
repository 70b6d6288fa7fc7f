"""A chain of layers, split into pipeline stages."""

from copy import deepcopy
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model import GPT, GPTConfig
from torch import nn

from parallel.placement import Placement, balanced_cuts
from parallel.stages import Chain, layer_names, split_layers


def every_cut(n: int, parts: int) -> list[list[tuple[int, int]]]:
    """Return all ways to cut n things into non-empty runs."""
    return [list(pairwise((0, *inner, n))) for inner in combinations(range(1, n), parts - 1)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.data())
def test_cuts_are_as_even_as_can_be(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    cuts = balanced_cuts(costs, parts)
    candidates = every_cut(len(costs), parts)
    assert cuts in candidates, "non-empty runs that cover everything in order"
    best = min(max(sum(costs[a:b]) for a, b in cut) for cut in candidates)
    assert max(sum(costs[a:b]) for a, b in cuts) == best


GPT_OPTIONS = {"vocab_size": 61, "hidden_size": 16, "num_layers": 5, "num_heads": 2, "max_seq_len": 16}


def gpt(**options: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**(GPT_OPTIONS | options)))


def matrix_elements(model: nn.Module, layers: list[str]) -> int:
    """Return the number of elements of the matrices in these layers."""
    return sum(
        module.weight.numel()
        for name in layers
        for module in model.get_submodule(name).modules()
        if isinstance(module, nn.Linear)
    )


def all_elements(model: nn.Module, layers: list[str]) -> int:
    return sum(p.numel() for name in layers for p in model.get_submodule(name).parameters())


@pytest.mark.parametrize("vocab_size", [8, 61, 400, 2000], ids="vocab{}".format)
@pytest.mark.parametrize("num_layers", [5, 7])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_each_balance_is_as_even_as_can_be(num_layers: int, stages: int, vocab_size: int) -> None:
    """A large vocabulary costs parameters at both ends, but multiplications at one."""
    model = gpt(vocab_size=vocab_size, num_layers=num_layers)
    layers = model.pipeline_layers
    costs = {"flops": matrix_elements, "parameters": all_elements, "uniform": lambda _, names: len(names)}
    for balance, cost in costs.items():
        cut = split_layers(model, layers, stages, balance)
        assert [name for stage in cut for name in stage] == layers
        options = every_cut(len(layers), stages)
        best = min(max(cost(model, layers[a:b]) for a, b in option) for option in options)
        assert max(cost(model, stage) for stage in cut) == best, balance
        if (balance, stages, vocab_size, num_layers) == ("flops", 2, 2000, 5):
            assert cut[1] == ["head"], "a head that costs more than all layers is alone"


def test_what_each_balance_counts() -> None:
    """Put in an embedding, which has parameters but multiplies nothing."""
    model = nn.Sequential(nn.Embedding(100, 4), *(nn.Linear(4, 4) for _ in range(4)))
    names = [str(i) for i in range(5)]
    assert [len(stage) for stage in split_layers(model, names, 2, "flops")] == [3, 2]
    assert [len(stage) for stage in split_layers(model, names, 2, "parameters")] == [1, 4]
    assert max(len(stage) for stage in split_layers(model, names, 2, "uniform")) == 3
    assert split_layers(model, names, 2) == split_layers(model, names, 2, "flops")


@given(st.lists(st.integers(0, 30), min_size=2, max_size=7), st.data())
def test_what_a_model_says_its_layers_cost_comes_first(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    balance = data.draw(st.sampled_from(["flops", "parameters", "uniform"]))
    model = nn.Sequential(*(nn.Identity() for _ in costs))
    model.pipeline_costs = costs
    cut = split_layers(model, [str(i) for i in range(len(costs))], stages, balance)
    assert [[int(name) for name in stage] for stage in cut] == [
        list(range(a, b)) for a, b in balanced_cuts(costs, stages)
    ]


def test_costs_of_other_layers() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model.pipeline_costs = [1]
    with pytest.raises(ValueError, match="pipeline_costs has 1 numbers for 2 pipeline_layers"):
        split_layers(model, ["0", "1"], 2)


@given(st.integers(1, 6), st.integers(1, 4))
def test_every_stage_has_one_rank(pp: int, virtual: int) -> None:
    schedules: list[Any] = ["interleaved", "zero_bubble", *(["zero_bubble_v"] if virtual == 2 else [])]
    for schedule in schedules:
        placement = Placement.of(pp, schedule=schedule, virtual_stages=virtual)
        assert placement.stages == pp * virtual
        assert sorted(s for rank in range(pp) for s in placement.on(rank)) == list(range(pp * virtual))
        assert all(len(placement.on(rank)) == virtual for rank in range(pp))
        assert placement.on(0)[0] == 0, "inputs enter on the first rank"
        assert placement.is_last(pp * virtual - 1)
        last = 0 if schedule == "zero_bubble_v" else pp - 1
        assert placement.on(last)[-1] == pp * virtual - 1, "where the loss is known"


@pytest.mark.parametrize("deal", [lambda i: i % 2, lambda i: i % 3], ids=["two", "three"])
def test_stretches_on_one_rank_share_no_parameter(deal: Any) -> None:
    """Each has a copy of a tied weight, under its own name, and together they run as the model."""
    model = gpt(num_layers=4, tied_head=True)
    tokens = torch.randint(0, 61, (2, 8))
    expected, names = model(tokens), dict(model.named_parameters(remove_duplicate=False))
    stages = split_layers(model, model.pipeline_layers, 6)
    chain = Chain(deepcopy(model), stages)
    assert torch.equal(chain(tokens), expected)
    held = dict(chain.named_parameters())
    assert held.keys() == names.keys()
    assert all(torch.equal(held[name], names[name]) for name in names)
    some = [stage for i, stage in enumerate(stages) if deal(i) == 0]
    part = Chain(deepcopy(model), some)
    assert sorted(dict(part.named_parameters())) == sorted(
        name for name in names if name.startswith(tuple(f"{layer}." for stage in some for layer in stage))
    )


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize(("pp", "num_layers"), [(1, 5), (2, 5), (3, 5), (8, 5), (5, 12)])
def test_the_stages_in_a_row_are_the_model(pp: int, num_layers: int, tied_head: bool) -> None:
    model = gpt(num_layers=num_layers, tied_head=tied_head, positions="learned")  # 12: layers.1 and layers.10
    tokens = torch.randint(0, 61, (2, 8))
    expected = model(tokens)
    stages = split_layers(model, model.pipeline_layers, pp)
    x, names = tokens, []
    for layers in stages:
        stage = Chain(deepcopy(model), [layers])
        held = [name for name, _ in stage.named_parameters(remove_duplicate=False)]
        assert all(name.startswith(tuple(f"{layer}." for layer in layers)) for name in held)
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name
        names += held
        x = stage(x)
    assert torch.equal(x, expected)
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


class Custom(nn.Module):
    """A chain with the given `pipeline_layers`."""

    def __init__(self, layers: list[str] | None, loose: str | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        if layers is not None:
            self.pipeline_layers = layers
        if loose == "parameter":
            self.scale = nn.Parameter(torch.ones(2))
        if loose == "buffer":
            self.register_buffer("count", torch.zeros(2))


def test_a_chain_that_is_not_declared_well() -> None:
    assert layer_names(Custom(None)) is None
    assert layer_names(Custom(["first", "second.0", "second.1"])) == ["first", "second.0", "second.1"]
    with pytest.raises(ValueError, match="names 'third', but Custom has no such module"):
        layer_names(Custom(["first", "second", "third"]))
    with pytest.raises(ValueError, match=r"^second\.1\.weight is in none of the pipeline_layers"):
        layer_names(Custom(["first", "second.0"]))
    for layers in (["first", "second", "second"], ["second", "second.0", "first"]):
        with pytest.raises(ValueError, match="twice, or a part of it"):
            layer_names(Custom(layers))
    for loose, name in (("parameter", "scale"), ("buffer", "count")):
        with pytest.raises(ValueError, match=f"^{name} is in none of the pipeline_layers"):
            layer_names(Custom(["first", "second"], loose))


def test_more_stages_than_layers() -> None:
    model = Custom(["first", "second"])
    assert split_layers(model, ["first", "second"], 2) == [["first"], ["second"]]
    with pytest.raises(
        ValueError, match=r"^a pipeline of 3 stages needs at least 3 layers, but the model has 2$"
    ):
        split_layers(model, ["first", "second"], 3)
