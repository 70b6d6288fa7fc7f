"""The loader's order: the same on every topology, with one integer as its state."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from uni3d.config import BatchTriad
from uni3d.engine import data_loader
from uni3d.engine.data_loader import RepeatingLoader, TrainingLoader
from uni3d.engine.sample_order import GlobalOrder


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
        assert union == order.samples(range(k * batch, (k + 1) * batch)).tolist()


@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_places_are_computed_some_at_once(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(data_loader, "_AT_ONCE", at_once)
    loader = make_loader(10, 6, 3, 0, 1)
    order = GlobalOrder(10, 5).samples(np.arange(27).reshape(9, 3)).tolist()
    assert ids(loader.all_epochs(), 9) == order
    assert ids(iter(loader), 9) == order[:4]


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
