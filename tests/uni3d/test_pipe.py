"""A pipeline written as a list of layers, as DeepSpeed's users write it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import assert_same, global_batches, make_engine, micro_batches, train, train_plainly, whole
from ranks import Ranks
from torch import Tensor, nn

import uni3d
from uni3d.pipe import LayerSpec, PipelineModule, TiedLayerSpec

STEPS = 3
VOCABULARY, WIDTH = 11, 6


class Mix(nn.Module):
    """A layer that takes and gives a tensor and a mask of integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = inputs
        return x + torch.tanh(self.linear(x)) * mask.unsqueeze(-1), mask


def as_logits(embedding: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(embedding, nn.Embedding)
    return x @ embedding.weight.T


def with_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone(), (x.detach()[..., 0] > 0).long()


def without_mask(inputs: tuple[Tensor, Tensor]) -> Tensor:
    return inputs[0]


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def tied_layers() -> list[Any]:
    return [
        TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH),
        with_mask,
        LayerSpec(Mix, WIDTH),
        LayerSpec(Mix, width=WIDTH),
        without_mask,
        LayerSpec(nn.LayerNorm, WIDTH),
        TiedLayerSpec("embed", nn.Embedding, VOCABULARY, WIDTH, forward_fn=as_logits),
    ]


class Plain(nn.Module):
    """Plain PyTorch of what the list stands for, with its parameters' names."""

    def __init__(self) -> None:
        super().__init__()
        self.tied_modules = nn.ModuleDict({"embed": nn.Embedding(VOCABULARY, WIDTH)})
        self.add_module("2", Mix(WIDTH))
        self.add_module("3", Mix(WIDTH))
        self.add_module("5", nn.LayerNorm(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        embedding = self.tied_modules["embed"]
        x = embedding(tokens)
        mask = (x.detach()[..., 0] > 0).long()
        for name in ("2", "3"):
            x, mask = self.get_submodule(name)((x, mask))
        return self.get_submodule("5")(x) @ embedding.weight.T


def token_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (STEPS, 12, 5), generator=generator)
    return [(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()) for batch in tokens]


def build(meta: bool, **options: Any) -> PipelineModule:
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    with torch.device("meta" if meta else "cpu"):
        return PipelineModule(tied_layers(), loss_fn=token_loss, **options)


def tied_case(pp: int, schedule: str, virtual: int, meta: bool) -> Any:
    options = {"pp": pp} if schedule == "1f1b" else {}
    config = {"parallel": options | {"device": "cpu", "schedule": schedule, "virtual_stages": virtual}}
    model = build(meta, num_stages=None if options else pp)
    engine = make_engine(model, zero=1, config=config)
    assert engine.model.topology.degrees.pp == pp
    start = {engine.model.first_name(n): t for n, t in whole(engine.module).items()}
    losses = train(engine, token_batches())
    end = {engine.model.first_name(n): t for n, t in whole(engine.module).items()}
    return losses, engine.get_global_grad_norm(), start, end


@pytest.mark.parametrize(
    ("world", "schedule", "virtual", "meta"),
    [
        slow(1, "1f1b", 1, False),
        slow(2, "1f1b", 1, False),
        (2, "1f1b", 1, True),
        (2, "zero_bubble_v", 2, True),
    ],
)
def test_tied_layers_and_tuples(ranks: Ranks, world: int, schedule: str, virtual: int, meta: bool) -> None:
    results = ranks.run(world, tied_case, world, schedule, virtual, meta)
    plain = Plain()
    start = {name: t for _, _, tensors, _ in results for name, t in tensors.items()}
    plain.load_state_dict(start)  # strict: the names are those of the list
    losses, norms, trained = _train_tokens(plain)
    for found, norm, _, _ in results:
        assert found == pytest.approx(losses, rel=1e-5)
        assert norm == pytest.approx(norms[-1], rel=1e-5)
    assert_same({name: t for _, _, _, tensors in results for name, t in tensors.items()}, trained)


def _train_tokens(model: nn.Module) -> tuple[list[float], list[float], nn.Module]:
    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).flatten(0, 1)

    batches = [(x, y.flatten()) for x, y in token_batches()]
    losses, norms, trained = train_plainly(WithLoss(), batches, loss=F.cross_entropy)
    return losses, norms, trained.model


def start_case(pp: int) -> dict[str, Tensor]:
    engine = make_engine(build(True), config={"parallel": {"pp": pp, "device": "cpu"}, "seed": 5})
    return {engine.model.first_name(n): t for n, t in whole(engine.module).items()}


def test_what_layers_are_filled_with_depends_on_seed_and_place_alone(ranks: Ranks) -> None:
    (alone,) = ranks.run(1, start_case, 1)
    split: dict[str, Tensor] = {}
    for tensors in ranks.run(4, start_case, 2):  # two data-parallel copies of two stages
        for name, tensor in tensors.items():
            assert torch.equal(split.setdefault(name, tensor), tensor), name
    assert split.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(split[name], tensor), name
    assert not torch.equal(alone["2.linear.weight"], alone["3.linear.weight"])
    assert torch.equal(alone["5.weight"], torch.ones(WIDTH)), "as the layer's own constructor fills it"


def test_seed_layers_are_those_of_torch_at_each_place() -> None:
    model = PipelineModule([LayerSpec(nn.Linear, 3, 3), LayerSpec(nn.Linear, 3, 3)], seed_layers=True)
    for place in range(2):
        torch.manual_seed(1234 + place)
        assert torch.equal(model.get_parameter(f"{place}.weight"), nn.Linear(3, 3).weight)
    with torch.device("meta"):
        lazy = PipelineModule([LayerSpec(nn.Linear, 3, 3), LayerSpec(nn.Linear, 3, 3)], seed_layers=True)
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape)
        lazy.init_parameter(name, full, torch.Generator())
        assert torch.equal(full, parameter), name
    seen: list[int] = []
    PipelineModule([nn.Tanh(), nn.Tanh()], seed_layers=True, seed_fn=seen.append, base_seed=7)
    assert seen == [7, 8]


def test_layers_run_in_order_as_one_module() -> None:
    model = PipelineModule([LayerSpec(nn.Linear, 3, 4), torch.tanh, nn.Linear(4, 2)])
    x = torch.randn(5, 3)
    weights = dict(model.named_parameters())
    assert list(weights) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    hidden = torch.tanh(F.linear(x, weights["0.weight"], weights["0.bias"]))
    assert torch.equal(model(x), F.linear(hidden, weights["2.weight"], weights["2.bias"]))
    assert model.pipeline_layers == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("method", "costs"),
    [
        ("parameters", [8, 0, 15, 0]),
        ("uniform", [1, 1, 1, 1]),
        ("type:linear", [1, 0, 1, 0]),
        ("TYPE:Tanh|relu", [0, 1, 0, 1]),
    ],
)
def test_partition_methods(method: str, costs: list[int]) -> None:
    frozen = nn.Linear(4, 3)
    layers = [LayerSpec(nn.Linear, 3, 2), torch.relu, frozen, LayerSpec(nn.Tanh)]
    assert PipelineModule(layers, partition_method=method).pipeline_costs == costs
    if method == "parameters":
        frozen.requires_grad_(False)
        assert PipelineModule(layers, partition_method=method).pipeline_costs == [8, 0, 0, 0]


def bad_tie() -> PipelineModule:
    return PipelineModule([TiedLayerSpec("k", nn.Linear, 2, 2), TiedLayerSpec("k", nn.Linear, 2, 3)])


def twice() -> PipelineModule:
    layer = nn.Linear(2, 2)
    return PipelineModule([layer, layer])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PipelineModule([], checkpointable_layers=[]), "checkpointable_layers isn't supported"),
        (lambda: PipelineModule([], activation_checkpoint_interval=2), r"interval=2 isn't supported"),
        (lambda: PipelineModule([nn.Tanh()], partition_method="profile"), "'profile'; expected parameters"),
        (lambda: PipelineModule([nn.Tanh()], partition_method="type:GRU"), "none of the layers: Tanh"),
        (
            bad_tie,
            r"TiedLayerSpec 'k': weight has shape \[3, 2\] in one layer, but in the first it has \[2, 2\]",
        ),
        (lambda: PipelineModule([TiedLayerSpec("k", nn.Tanh)]), "ties 'weight', but its parameters are"),
        (twice, "layer 1 occurs earlier in the list too"),
    ],
)
def test_what_cannot_be_is_said(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_argument() -> None:
    with pytest.raises(TypeError, match="no argument 'num_stage'"):
        PipelineModule([], num_stage=2)


def disagree_case() -> list[str]:
    messages = []
    for pp in (1, 2, "auto"):
        model = build(False, num_stages=2)
        try:
            engine = make_engine(model, config={"parallel": {"pp": pp, "dp": 1, "device": "cpu"}})
            messages.append(str(engine.model.topology.degrees))
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_num_stages_is_the_configs_pp(ranks: Ranks) -> None:
    for messages in ranks.run(2, disagree_case):
        assert messages == [
            "the PipelineModule has num_stages 2, but the config has parallel.pp 1; set only one of them",
            "(pp, dp, tp) = (2, 1, 1)",
            "(pp, dp, tp) = (2, 1, 1)",
        ]


class Counted(nn.Linear):
    """Counts its forward passes."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("interval", [0, 1])
def test_activation_checkpoint_interval(alone: None, interval: int) -> None:
    layers = [LayerSpec(Counted, 6, 6), torch.tanh, LayerSpec(nn.Linear, 6, 1)]
    model = PipelineModule(layers, loss_fn=F.mse_loss, activation_checkpoint_interval=interval)
    engine = make_engine(model, micro=6)
    data = micro_batches(global_batches(2), engine)
    engine.train_batch(data)
    Counted.calls = 0
    engine.train_batch(data)
    assert Counted.calls == 2 * (1 + interval), "two micro batches, each computed again"


def test_they_are_where_deepspeed_has_them() -> None:
    assert uni3d.PipelineModule is PipelineModule
    assert uni3d.LayerSpec is LayerSpec
    assert uni3d.TiedLayerSpec is TiedLayerSpec
