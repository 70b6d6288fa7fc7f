"""Tiles of initial weights: what a rank draws, that it is what all draw, and what can't be drawn in tiles."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from initial_draws import drawn, drawn_at_once, tile_extents, tile_generator
from torch import Tensor, nn

from parallel.dtensor_layout import LocalPart
from parallel.initial_weights import INITIAL_WEIGHTS, TILE, TileGenerators, draw, tile_shape, tiles_of
from parallel.recorded_init import Operation, record
from parallel.weights import generator_for, materialise

Fill = Callable[[Tensor, torch.Generator], object]


def normal(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, 0.02, generator=generator)


def recorded(fill: Fill, shape: tuple[int, ...]) -> list[Operation] | None:
    return record(lambda _, t, g: fill(t, g), "w", shape, torch.float32, generator_for(3, "w"))


def whole(fill: Fill, shape: tuple[int, ...], name: str = "w") -> Tensor:
    """Draw a parameter in one part."""
    operations = recorded(fill, shape)
    assert operations is not None
    data = torch.full(shape, math.nan)
    draw(LocalPart(data, shape, (0,) * len(shape)), operations, 3, name)
    return data


@st.composite
def boxes(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shape of a parameter, and a box of it: offset and shape."""
    most = {1: 40_000, 2: 1200, 3: 60, 4: 16}
    ndim = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, most[ndim]), min_size=ndim, max_size=ndim)))
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return shape, offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))


@settings(deadline=None, max_examples=60)
@given(boxes())
def test_a_part_is_that_part_of_the_whole(case: tuple[tuple[int, ...], ...]) -> None:
    shape, offset, size = case
    drawn_shapes: list[tuple[int, ...]] = []
    operations = recorded(normal, shape)
    assert operations is not None
    operations += [Operation(lambda tile: drawn_shapes.append(tuple(tile.shape)), (), {})]
    part = torch.full(size, math.nan)
    draw(LocalPart(part, shape, offset), operations, 3, "w")
    place = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    assert torch.equal(part, drawn(3, "w", shape, normal)[place])
    extents = tile_extents(shape)
    met = [(o + n - 1) // e - o // e + 1 for o, n, e in zip(offset, size, extents, strict=True)]
    assert len(drawn_shapes) == (math.prod(met) if part.numel() else 0)
    assert all(math.prod(tile) <= TILE for tile in drawn_shapes)


def test_a_part_in_other_memory() -> None:
    """Parts of fused projections and of shards with gaps aren't contiguous; scalars and nothing are parts."""
    expected, data = drawn(3, "w", (70, 90), normal), torch.zeros(90, 140)
    operations = recorded(normal, (70, 90))
    assert operations is not None
    draw(LocalPart(data.t()[::2], (70, 90), (0, 0)), operations, 3, "w")
    assert torch.equal(data.t()[::2], expected)
    assert not data.t()[1::2].any()
    scalar = whole(normal, ())
    assert scalar == torch.empty(()).normal_(0.0, 0.02, generator=tile_generator(3, "w", 0))
    assert whole(normal, (0, 5)).numel() == 0


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((), ()),
        ((7,), (7,)),
        ((100_000,), (16_384,)),
        ((8192, 8192), (32, 512)),
        ((10, 3), (10, 3)),
        ((100_000, 3), (5461, 3)),
        ((2, 100_000), (2, 8192)),
        ((128, 14_336, 4096), (1, 32, 512)),
        ((512, 512, 3, 3), (3, 512, 3, 3)),
        ((64, 3, 7, 7), (64, 3, 7, 7)),
        ((5, 0), (5, 1)),
    ],
)
def test_the_grid_of_version_1(shape: tuple[int, ...], tile: tuple[int, ...]) -> None:
    assert INITIAL_WEIGHTS == 1, "another version has another grid or other generators"
    assert tile_shape(shape) == tile


def test_the_bits_of_version_1() -> None:
    """Take the words of the state from numpy's own Mersenne Twister."""
    found = whole(lambda t, g: t.uniform_(generator=g), (4, 9000))
    seeds = [tile_generator(3, "w", i).get_state()[24:].numpy().view(np.uint64)[:624] for i in range(3)]
    for i, seed in enumerate(seeds):
        twister = np.random.MT19937()
        twister.state = {"bit_generator": "MT19937", "state": {"key": seed.astype(np.uint32), "pos": 624}}
        tile = found[:, 4096 * i : 4096 * (i + 1)]
        bits = twister.random_raw(tile.numel()).reshape(tile.shape)
        assert np.array_equal(tile.numpy(), (bits % 2**24 / 2**24).astype(np.float32))
    some = [[int(2**24 * x) for x in tile.flatten()[:3]] for tile in (found[:, :4096], found[:, 8192:])]
    assert some == [[7311407, 11448367, 9600029], [2242417, 10171618, 9126740]]


def test_tiles_have_the_distribution_that_was_asked_for_and_nothing_in_common() -> None:
    shape = (640, 1536)
    tensors = [whole(normal, shape), whole(normal, shape, "v")]
    operations = recorded(normal, shape)
    assert operations is not None
    other_seed = torch.empty(shape)
    draw(LocalPart(other_seed, shape, (0, 0)), operations, 4, "w")
    tiles = []
    for tensor in (*tensors, other_seed):
        assert abs(tensor.mean()) < 4 * 0.02 / math.sqrt(tensor.numel())
        assert tensor.std() == pytest.approx(0.02, rel=0.005)
        for _, ((i, j), (m, n)) in tiles_of(shape, ((0, 0), shape)):
            tiles.append(tensor[i : i + m, j : j + n].flatten() / 0.02)
    assert len(tiles) == 3 * 60
    correlations = torch.stack(tiles) @ torch.stack(tiles).T / TILE
    correlations.fill_diagonal_(0.0)
    assert correlations.abs().max() < 6 / math.sqrt(TILE)
    for lag in (1, 2, 397, 624):  # of the recurrence
        first, second = torch.stack(tiles)[:, :-lag], torch.stack(tiles)[:, lag:]
        assert abs((first * second).mean()) < 6 / math.sqrt(first.numel())


def test_generators_differ_in_seed_name_and_tile() -> None:
    places = [
        (s, n, i) for s in (0, 1, 10) for n in ("", "0", "0:", "a.weight") for i in (0, 1, 255, 256, 2**40)
    ]
    draws = {tuple(torch.rand(3, generator=TileGenerators(s, n).at(i)).tolist()) for s, n, i in places}
    assert len(draws) == len(places)
    generators = TileGenerators(1, "w")
    first = torch.randn(20, generator=generators.at(5))
    generators.at(6)
    assert torch.equal(torch.randn(20, generator=generators.at(5)), first), "at its beginning"


def test_another_form_of_torch_s_generator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_SEED", 5), ("_WORDS", slice(0, 16))):
        with monkeypatch.context() as patch:
            patch.setattr(TileGenerators, name, value)
            with pytest.raises(RuntimeError, match="keeps the state of its CPU generator in another form"):
                TileGenerators(0, "w")


def small_timm(tensor: Tensor, generator: torch.Generator) -> None:
    """Truncate a normal distribution by its inverse, as older releases of torch do."""
    tensor.uniform_(-0.9545, 0.9545, generator=generator)
    tensor.erfinv_().mul_(0.02 * math.sqrt(2.0)).add_(0.0).clamp_(min=-0.04, max=0.04)


SHAPE = (300, 700)
FAN_IN, FAN_OUT = 700, 300
IN_TILES: dict[str, tuple[Fill, float, float]] = {
    "normal_": (lambda t, g: nn.init.normal_(t, 1.0, 0.5, generator=g), 1.0, 0.5),
    "uniform_": (lambda t, g: nn.init.uniform_(t, 0.0, 1.0, generator=g), 0.5, 12**-0.5),
    "trunc_normal_": (lambda t, g: nn.init.trunc_normal_(t, generator=g), 0.0, 0.8796),
    "trunc_normal_ far out": (
        lambda t, g: nn.init.trunc_normal_(t, 0, 1, 1.5, 4, generator=g),
        1.9376,
        0.3836,
    ),
    "inverse": (small_timm, 0.0, 0.8796 * 0.02),
    "xavier_uniform_": (lambda t, g: nn.init.xavier_uniform_(t, generator=g), 0, (2 / 1000) ** 0.5),
    "xavier_normal_": (
        lambda t, g: nn.init.xavier_normal_(t, gain=3.0, generator=g),
        0,
        3 * (2 / 1000) ** 0.5,
    ),
    "kaiming_uniform_": (lambda t, g: nn.init.kaiming_uniform_(t, generator=g), 0, (2 / 700) ** 0.5),
    "kaiming_normal_": (
        lambda t, g: nn.init.kaiming_normal_(t, mode="fan_out", generator=g),
        0,
        (2 / 300) ** 0.5,
    ),
    "ones_": (lambda t, g: nn.init.ones_(t), 1, 0),
    "zeros_": (lambda t, g: nn.init.zeros_(t), 0, 0),
    "constant_": (lambda t, g: nn.init.constant_(t, 0.25), 0.25, 0),
    "operators": (lambda t, g: t.normal_(generator=g).__imul__(2).__iadd__(1).__isub__(3), -2, 2),
    "alpha": (lambda t, g: t.zero_().add_(2, alpha=3), 6, 0),
    "data": (lambda t, g: t.data.normal_(generator=g).detach().div_(4), 0, 0.25),
    "a parameter": (lambda t, g: nn.Parameter(t).data.normal_(generator=g), 0, 1),
    "by its shape": (
        lambda t, g: t.normal_(0, t.size(1) ** -0.5 * t.ndim / len(t.shape), generator=g),
        0,
        700**-0.5,
    ),
    "its fill is undone": (lambda t, g: t.normal_(generator=g).fill_(3), 3, 0),
    "torch's generator": (lambda t, g: t.normal_().mul_(2), 0, 2),
    "torch's generator by name": (lambda t, g: t.normal_(generator=torch.default_generator), 0, 1),
    "bernoulli": (lambda t, g: t.bernoulli_(0.5, generator=g), 0.5, 0.5),
}


@pytest.mark.parametrize("name", IN_TILES)
def test_what_is_drawn_in_tiles(name: str) -> None:
    fill, mean, std = IN_TILES[name]
    before = torch.get_rng_state()
    tensor = whole(fill, SHAPE)
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator isn't used"
    wide = max(std, 1e-6)
    assert tensor.mean() == pytest.approx(mean, abs=5 * wide / math.sqrt(tensor.numel()))
    assert tensor.std() == pytest.approx(std, rel=0.01)
    if "torch's" in name:
        return
    if name in ("uniform_", "trunc_normal_", "inverse", "operators", "data"):  # they don't look at the shape
        assert torch.equal(tensor, drawn(3, "w", SHAPE, fill))


def reseeding(tensor: Tensor, generator: torch.Generator) -> None:
    generator.manual_seed(5)
    tensor.normal_(generator=generator)


def reseeding_torch(tensor: Tensor, generator: torch.Generator) -> None:
    torch.manual_seed(5)
    tensor.normal_()


def stubborn(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)
    try:
        tensor[0] = 0.0
    except Exception:
        tensor.mul_(2.0)


def until_it_fits(tensor: Tensor, generator: torch.Generator) -> None:
    while tensor.normal_(generator=generator).mean() < 0.0:
        pass


SQUARE = (24, 24)
ELSEWHERE = torch.zeros(24, 24)
AT_ONCE: dict[str, Fill] = {
    "orthogonal_": lambda t, g: nn.init.orthogonal_(t, generator=g),
    "sparse_": lambda t, g: nn.init.sparse_(t, 0.1, generator=g),
    "eye_": lambda t, g: nn.init.eye_(t),
    "dirac_": lambda t, g: nn.init.dirac_(t.view(24, 8, 3)),
    "padding row": lambda t, g: t.normal_(generator=g)[0].zero_(),
    "slice": lambda t, g: t.zero_()[:, 3:].normal_(generator=g),
    "assigned": lambda t, g: t.normal_(generator=g).__setitem__(0, 1.0),
    "copied": lambda t, g: t.copy_(torch.randn(t.shape, generator=g)),
    "second tensor": lambda t, g: t.normal_(generator=g).mul_(torch.arange(24.0)),
    "itself": lambda t, g: t.normal_(generator=g).mul_(t),
    "statistics": lambda t, g: t.normal_(generator=g).div_(t.std().item()),
    "until it fits": until_it_fits,
    "another generator": lambda t, g: t.normal_(generator=torch.Generator().manual_seed(1)),
    "reseeding": reseeding,
    "reseeding torch's": reseeding_torch,
    "caught": stubborn,
    "numpy": lambda t, g: t.normal_(generator=g).numpy().fill(2.0),
    "into": lambda t, g: torch.randn(24, 24, out=t, generator=g),
    "many at once": lambda t, g: torch._foreach_mul_([t.normal_(generator=g)], 2.0),
    "cumulative": lambda t, g: t.normal_(generator=g).cumsum_(0),
    "elsewhere first": lambda t, g: ELSEWHERE.normal_(generator=g).add_(t.zero_().numel()),
    "truncated elsewhere": lambda t, g: t.copy_(nn.init.trunc_normal_(torch.empty(24, 24), generator=g)),
}


class Filled(nn.Module):
    """Model of one parameter that `fill` fills."""

    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(SQUARE, device="meta"))
        self.fill = fill

    def filled(self) -> Tensor:
        options: Any = {"seed": 3, "device": torch.device("cpu"), "first_names": {}}
        materialise(self, lambda _, t, g: self.fill(t, g), **options)
        return self.w.detach()


@pytest.mark.parametrize("name", AT_ONCE)
def test_anything_else_is_drawn_at_once(name: str) -> None:
    fill = AT_ONCE[name]
    before = torch.get_rng_state()
    assert recorded(fill, SQUARE) is None
    tensor = Filled(fill).filled()
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator isn't used"
    expected = drawn_at_once(3, "w", SQUARE, fill)
    assert torch.equal(tensor, expected)


def test_an_empty_or_unfounded_recording_is_none() -> None:
    assert recorded(lambda t, g: None, SQUARE) is None
    assert recorded(lambda t, g: t.mul_(2.0), SQUARE) is None, "of what was in memory"


def test_a_whole_draw_from_torch_s_generator_depends_on_seed_and_name() -> None:
    def both(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.stack([torch.randn(288), torch.randn(288, generator=generator)]).view(SQUARE))

    torch.manual_seed(1)
    first = Filled(both).filled()
    torch.manual_seed(2)
    assert torch.equal(Filled(both).filled(), first)
    assert len(first.unique()) == first.numel(), "each generator has numbers of its own"


def test_an_error_of_the_model_is_raised() -> None:
    def fails(tensor: Tensor, generator: torch.Generator) -> None:
        raise KeyError("no rule for w")

    with pytest.raises(KeyError, match="no rule for w"):
        Filled(fails).filled()
