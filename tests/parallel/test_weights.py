"""Initial weights: the same bits for the same seed and name, wherever they are held."""

import hashlib

import pytest
import torch
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
        tensor.uniform_(-1.0, 1.0, generator=generator)

    def loss_fn(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


def drawn_case(places: list[tuple[int, int, int, int]], seed: int) -> list[dict[str, Tensor]]:
    results = []
    for pp, dp, tp, zero_stage in places:
        topology = parallel.Topology(parallel.Degrees(pp=pp, dp=dp, tp=tp), zero_stage=zero_stage)
        with torch.device("meta"):
            model = Drawn()
        built = parallel.build(model, topology, parallel.Settings(zero_stage=zero_stage, seed=seed))
        parameters = dict(built.module.named_parameters())
        assert not any(p.is_meta for p in parameters.values())
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}
        results.append({n: t.detach().clone() for n, t in whole.items()})
    return results


def drawn_plainly(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw as documented: once and whole, from a CPU generator seeded by the hash of seed and name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=generator)


FIRST = {"layers.2.weight": "layers.0.weight"}
SHAPES = {"layers.0.weight": (10, 3), "layers.1.weight": (10, 3), "layers.1.bias": (10,)}
PLACES = {1: [(1, 1, 1, 0)], 3: [(1, 3, 1, 2)], 4: [(2, 2, 1, 1), (2, 1, 2, 3), (1, 2, 2, 3), (1, 4, 1, 0)]}


@pytest.mark.parametrize("world", [1, slow(3), 4])
def test_the_same_bits_on_every_topology(ranks: Ranks, world: int) -> None:
    by_rank = ranks.run(world, drawn_case, PLACES[world], 11)
    for i, place in enumerate(PLACES[world]):
        everything = set().union(*(results[i] for results in by_rank))
        assert everything >= set(SHAPES)
        assert (everything == {*SHAPES, *FIRST}) == (place[0] > 1), "a stage of its own has its own copy"
        for results in by_rank:
            for name, tensor in results[i].items():
                first = FIRST.get(name, name)
                assert torch.equal(tensor, drawn_plainly(11, first, SHAPES[first])), f"{place}: {name}"


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
