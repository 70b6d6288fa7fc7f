"""The order of samples: evenly drawn permutations, the same everywhere, in memory that does not grow."""

import math
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import sample_at

from uni3d.engine.sample_order import GlobalOrder, mix
from uni3d.manifest import SAMPLE_ORDER

Counts = npt.NDArray[np.int64]


def epochs_of(n: int, epochs: int, seed: int = 0) -> Counts:
    """Return the first epochs, `(epochs, n)`."""
    return GlobalOrder(n, seed).samples(np.arange(epochs * n).reshape(epochs, n))


def deviation(counts: Counts) -> float:
    """Return chi-square of equal chances in standard deviations, by Wilson and Hilferty's cube root."""
    expected = counts.sum() / counts.size
    return normal(float(((counts - expected) ** 2).sum() / expected), counts.size - 1)


def normal(squares: float, freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return ((squares / freedom) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def deviation_of_pairs(first: Counts, second: Counts, n: int) -> float:
    """Return that of the pairs of two permutations: each number of one is with one number of the other."""
    counts = np.bincount((first * n + second).ravel(), minlength=n * n)
    expected = counts.sum() / counts.size
    squares = float(((counts - expected) ** 2).sum() / expected)
    return normal(squares * (n - 1) / n, (n - 1) ** 2)


SIZES = sorted({4**k + d for k in range(3, 7) for d in (-1, 0, 1)} | {*range(1, 40), 127, 128, 129, 1000})


@pytest.mark.parametrize("n", SIZES)
def test_each_epoch_has_each_sample_once(n: int) -> None:
    assert (np.sort(epochs_of(n, 7)) == np.arange(n)).all()


@given(st.integers(1, 5000), st.integers(0, 2**70), st.integers(0, 2**40))
def test_any_epoch_of_any_seed_has_each_sample_once(n: int, seed: int, epoch: int) -> None:
    order = GlobalOrder(n, seed)
    assert sorted(order.samples(epoch * n + np.arange(n))) == list(range(n))


@settings(max_examples=50)
@given(st.integers(1, 2**62), st.integers(0, 2**70), st.integers(0, 2**63 - 1))
def test_the_written_definition_gives_the_same(n: int, seed: int, place: int) -> None:
    """Check against plain Python, which shares no code with it."""
    assert GlobalOrder(n, seed).samples([place]) == [sample_at(*divmod(place, n), n=n, seed=seed)]


def test_the_order_is_the_same_everywhere() -> None:
    """Pin it: checkpoints hold a position in it, so another order needs another version."""
    assert SAMPLE_ORDER == 1
    pinned = {
        (0, 0, 10): [8, 2, 6, 7, 5, 0, 1, 4, 3, 9],
        (42, 3, 7): [5, 0, 6, 1, 4, 3, 2],
        (42, 0, 10**9): [376498532, 926751257, 930429830, 267044993],
        (2**64 + 1, 1, 2**62): [1139992694175718131, 604064076111375931, 4087315638475803245],
    }
    for (seed, epoch, n), expected in pinned.items():
        places = epoch * n + np.arange(len(expected))
        assert GlobalOrder(n, seed).samples(places).tolist() == expected


def test_the_mix_is_that_of_splitmix64() -> None:
    """Compare the first numbers of the generator seeded with 1234567, as published with other libraries."""
    states = 1234567 + np.arange(1, 4, dtype=np.uint64) * 0x9E3779B97F4A7C15
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n", range(2, 8))
def test_each_order_of_few_samples_is_as_likely(n: int) -> None:
    found = epochs_of(n, max(5000, 20 * math.factorial(n)))
    _, counts = np.unique(found @ n ** np.arange(n), return_counts=True)
    assert len(counts) == math.factorial(n)
    assert abs(deviation(counts)) < 4


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 15, 16, 17, 63, 64, 65, 100])
def test_each_sample_is_as_likely_at_each_place(n: int) -> None:
    found = epochs_of(n, 5000)
    places = np.broadcast_to(np.arange(n), found.shape)
    assert abs(deviation_of_pairs(places, found, n)) < 4


@pytest.mark.parametrize("n", [5, 8, 9, 16, 64, 100])
def test_epochs_are_independent_of_each_other(n: int) -> None:
    """Check what comes in a sample's place in the next epoch, and in the same epoch of the next seed."""
    found = epochs_of(n, 5000)
    assert abs(deviation_of_pairs(found[:-1], found[1:], n)) < 4
    other = epochs_of(n, 5000, seed=1)
    assert abs(deviation_of_pairs(found, other, n)) < 4


@pytest.mark.parametrize("n", [8, 9, 16, 17, 64, 100])
def test_neighbours_are_any_two_samples(n: int) -> None:
    found = epochs_of(n, 5000)
    steps = (found[:, 1::2] - found[:, : n // 2 * 2 : 2]) % n
    assert abs(deviation(np.bincount(steps.ravel(), minlength=n)[1:])) < 4


@pytest.mark.parametrize("n", [2, 7, 16, 36, 100, 300])
def test_one_sample_stays_in_its_place_on_average(n: int) -> None:
    stay = (epochs_of(n, 4000) == np.arange(n)).sum(1)
    assert abs(stay.mean() - 1) < 4 / math.sqrt(len(stay))
    assert abs(stay.var() - 1) < 0.2, "as of a Poisson distribution"


@pytest.mark.parametrize("n", [7, 8, 9, 15, 16, 25, 36, 49])
def test_half_of_the_orders_are_even_permutations(n: int) -> None:
    """Check for a bias that a network on columns and rows of odd number has."""
    found = epochs_of(n, 2000)
    swaps = sum((found[:, i + 1 :] < found[:, i : i + 1]).sum(1) for i in range(n))
    assert abs(np.mean(swaps % 2) - 0.5) < 4 * 0.5 / math.sqrt(len(found))


@pytest.mark.parametrize("n", [10**9, 2**32 - 1, 2**32, 2**32 + 1, 2**62 - 1, 2**62])
def test_many_samples(n: int) -> None:
    order, some = GlobalOrder(n, 3), 20_000
    first, last, following = (order.samples(start + np.arange(some)) for start in (0, n - some, n))
    both = np.concatenate([first, last])
    assert len(set(both.tolist())) == 2 * some
    assert both.min() >= 0
    assert both.max() < n
    for part in (first, last, following):
        assert abs(deviation(np.bincount((part / n * 100).astype(int), minlength=100))) < 4
    for one, other in ((first, last), (first, following), (first[1:], first[:-1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(some)


def test_memory_does_not_grow_with_the_data() -> None:
    tracemalloc.start()
    GlobalOrder(10**9, 3).samples(np.arange(4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_places_come_in_any_shape_and_order() -> None:
    order = GlobalOrder(30, 1)
    places = np.arange(60)
    found = order.samples(places)
    assert (order.samples(places[::-1]) == found[::-1]).all()
    assert (order.samples(places.reshape(4, 15)) == found.reshape(4, 15)).all()
    assert order.samples([]).tolist() == []
    assert order.samples(7).shape == ()
    with pytest.raises(OverflowError):
        order.samples([2**63])
    with pytest.raises(ValueError, match="no samples"):
        GlobalOrder(0, 1)
