"""The order of samples: the same on every topology, with one integer as its state."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from uni3d.config import BatchTriad
from uni3d.engine.data_loader import GlobalOrder, RepeatingLoader, TrainingLoader


class Position:
    """Count of consumed samples, as in an engine."""

    def __init__(self, samples: int = 0) -> None:
        self.samples = samples

    def __call__(self) -> int:
        return self.samples


def make_loader(n: int, batch: int, micro: int, rank: int, dp: int, position: Any = None) -> TrainingLoader:
    return TrainingLoader(
        TensorDataset(torch.arange(n)),
        BatchTriad(train_batch=batch, micro_batch=micro, accumulation=batch // (micro * dp)),
        dp_rank=rank,
        seed=5,
        position=position or Position(),
    )


def ids(batches: Iterator[Any], count: int) -> list[list[int]]:
    """Return the sample numbers of the next `count` micro batches."""
    return [batch[0].tolist() for batch in islice(batches, count)]


@given(st.integers(1, 50), st.integers(0, 2**32), st.integers(0, 4))
def test_each_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = GlobalOrder(n, seed)
    assert sorted(order[place] for place in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [[GlobalOrder(30, seed)[place] for place in range(60)] for seed in (1, 2)]
    parts = [order[i : i + 30] for order in orders for i in (0, 30)]
    assert len({tuple(part) for part in parts}) == 4
    assert [GlobalOrder(30, 1)[place] for place in reversed(range(60))] == orders[0][::-1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 30), st.integers(0, 40))
def test_the_ranks_share_each_global_batch(dp: int, micro: int, steps: int, n: int, start: int) -> None:
    batch = micro * steps * dp
    order = GlobalOrder(n, 5)
    loaders = [make_loader(n, batch, micro, rank, dp, Position(start * batch)) for rank in range(dp)]
    ranks = [loader.all_epochs() for loader in loaders]
    for k in range(start, start + 3):
        parts = [ids(rank, steps) for rank in ranks]
        assert all(len(samples) == micro for part in parts for samples in part)
        union = [sample for part in parts for samples in part for sample in samples]
        assert union == [order[place] for place in range(k * batch, (k + 1) * batch)]


def test_a_loader_begins_where_training_stands() -> None:
    position = Position()
    loader = make_loader(10, 4, 2, 0, 1, position)
    everything = ids(loader.all_epochs(), 8)
    for consumed in (4, 12):
        position.samples = consumed
        for batches in (iter(loader), iter(RepeatingLoader(loader)), loader.all_epochs()):
            assert ids(batches, 2) == everything[consumed // 2 : consumed // 2 + 2]


def test_the_collate_function_is_used() -> None:
    loader = TrainingLoader(
        TensorDataset(torch.arange(4)),
        BatchTriad(train_batch=2, micro_batch=2, accumulation=1),
        dp_rank=0,
        seed=0,
        position=Position(),
        collate_fn=len,
    )
    assert next(iter(loader)) == 2


def test_there_must_be_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        make_loader(0, 2, 2, 0, 1)
