"""Initial weights: the same bits for the same seed and name, wherever they are held."""

import pytest
import torch
from initial_draws import drawn, drawn_at_once
from marks import slow
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import parallel
from parallel.weights import check_buffers, check_can_materialise, generator_for, is_meta


class Drawn(nn.Module):
    """Layers of the same shape, the last tied to the first, filled by the model's own `init_parameter`."""

    tp_plan = {"layers.*": "colwise"}  # noqa: RUF012 - as models declare it
    pipeline_layers = ["layers.0", "layers.1", "layers.2"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 10, bias=i == 1) for i in range(3))
        self.layers[2].weight = self.layers[0].weight

    def init_parameter(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        fill(name, tensor, generator)

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


class Wide(Drawn):
    """Layers of several tiles, cut by rows, by columns or not at all; two can't be drawn in tiles."""

    tp_plan = {"up": "colwise", "down": "rowwise", "whole.up": "colwise"}  # noqa: RUF012
    pipeline_layers = ["up", "whole", "down"]  # noqa: RUF012

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.up, self.down = nn.Linear(530, 1100), nn.Linear(1100, 70)
        self.whole = nn.ModuleDict({"up": nn.Linear(60, 20), "mix": nn.Conv1d(3, 41, 5)})


def fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if name.endswith("bias"):
        tensor.fill_(0.5)
    elif name.startswith("whole"):
        nn.init.orthogonal_(tensor, generator=generator)
    elif name.startswith("down"):
        nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
    else:
        tensor.uniform_(-1.0, 1.0, generator=generator)


def drawn_case(
    kind: type[Drawn], places: list[tuple[int, int, int, int, int | None]], seed: int
) -> list[dict[str, Tensor]]:
    results = []
    torch.manual_seed(torch.distributed.get_rank())  # which takes no part in it
    for pp, dp, tp, zero_stage, group in places:
        degrees = parallel.Degrees(pp=pp, dp=dp, tp=tp)
        topology = parallel.Topology(degrees, zero_stage=zero_stage, shard_group=group)
        with torch.device("meta"):
            model = kind()
        built = parallel.build(model, topology, parallel.Settings(zero_stage=zero_stage, seed=seed))
        parameters = dict(built.module.named_parameters())
        assert not any(p.is_meta for p in parameters.values())
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}
        results.append({n: t.detach().clone() for n, t in whole.items()})
    return results


def drawn_plainly(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    draw = drawn_at_once if name in ("whole.up.weight", "whole.mix.weight") else drawn
    return draw(seed, name, shape, lambda tensor, generator: fill(name, tensor, generator))


FIRST = {"layers.2.weight": "layers.0.weight"}
SHAPES: dict[type[Drawn], dict[str, tuple[int, ...]]] = {
    Drawn: {"layers.0.weight": (10, 3), "layers.1.weight": (10, 3), "layers.1.bias": (10,)},
    Wide: {
        "up.weight": (1100, 530),
        "up.bias": (1100,),
        "down.weight": (70, 1100),
        "down.bias": (70,),
        "whole.up.weight": (20, 60),
        "whole.up.bias": (20,),
        "whole.mix.weight": (41, 3, 5),
        "whole.mix.bias": (41,),
    },
}
PLACES: dict[int, list[tuple[int, int, int, int, int | None]]] = {
    1: [(1, 1, 1, 0, None)],
    3: [(1, 3, 1, 2, None)],
    4: [
        (2, 2, 1, 1, None),
        (2, 1, 2, 3, None),
        (1, 2, 2, 3, None),
        (1, 4, 1, 0, None),
        (1, 4, 1, 3, 2),
        (1, 1, 4, 1, None),
    ],
}


@pytest.mark.parametrize("kind", [Drawn, Wide])
@pytest.mark.parametrize("world", [1, slow(3), 4])
def test_the_same_bits_on_every_topology(ranks: Ranks, world: int, kind: type[Drawn]) -> None:
    shapes = SHAPES[kind]
    places = [place for place in PLACES[world] if kind is Wide or place[2] < 4]  # tp divides the layer
    by_rank = ranks.run(world, drawn_case, kind, places, 11)
    expected = {name: drawn_plainly(11, name, shape) for name, shape in shapes.items()}
    for i, place in enumerate(places):
        everything = set().union(*(results[i] for results in by_rank))
        assert everything >= set(shapes)
        if kind is Drawn:
            assert (everything == {*shapes, *FIRST}) == (place[0] > 1), "a stage of its own has its own copy"
        for results in by_rank:
            for name, tensor in results[i].items():
                assert torch.equal(tensor, expected[FIRST.get(name, name)]), f"{place}: {name}"


def test_each_seed_and_name_has_numbers_of_its_own() -> None:
    draws = {
        (seed, name): tuple(torch.rand(4, generator=generator_for(seed, name)).tolist())
        for seed in (0, 1, 10, 11)
        for name in ("0.weight", "1.weight", "0.bias", ":")
    }
    assert len(set(draws.values())) == len(draws)
    assert torch.rand(4, generator=generator_for(1, ":")).tolist() == list(draws[1, ":"])


def meta(model: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return model()


class Undrawn(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)


class Counting(Drawn):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(3))


def test_what_the_meta_device_would_lose_is_refused() -> None:
    assert check_can_materialise(meta(Drawn)) is not None
    with pytest.raises(ValueError, match=r"Undrawn has no init_parameter\(name, tensor, generator\)"):
        check_can_materialise(meta(Undrawn))
    with pytest.raises(ValueError, match=r"has buffers on the meta device \(count\).*meta_parameters\(\)"):
        check_buffers(meta(Counting))
    with parallel.meta_parameters():
        check_buffers(Counting())
    assert is_meta(meta(Undrawn))
    assert not is_meta(Undrawn())
    half = meta(Drawn)
    half.layers[1] = nn.Linear(3, 10)
    with pytest.raises(ValueError, match="some parameters are on the meta device and some are not"):
        is_meta(half)


def materialised_case(zero_stage: int) -> dict[str, Tensor]:
    torch.manual_seed(torch.distributed.get_rank())  # each rank draws its own
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[1].running_mean = torch.rand(5)
    topology = parallel.Topology(parallel.Degrees(pp=1, dp=3, tp=1), zero_stage=zero_stage)
    built = parallel.build(model, topology, parallel.Settings(zero_stage=zero_stage, seed=0))
    state = {**dict(built.module.named_parameters()), **dict(built.module.named_buffers())}
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def test_a_model_built_on_the_cpu_has_the_first_rank_s_values(ranks: Ranks) -> None:
    torch.manual_seed(0)
    expected = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    expected[1].running_mean = torch.rand(5)
    for state in ranks.run(3, materialised_case, 3):
        assert state.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(state[name], tensor), name
