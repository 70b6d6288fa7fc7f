"""The order of samples: one global order that doesn't depend on the topology.

In each epoch the samples come in an order drawn from `(seed, epoch)`. Global batch k is the samples at the
places `k * B` to `(k + 1) * B` of that endless order, and each data-parallel rank takes its stretch of it.
So the whole state is one integer, the samples consumed, and it means the same on every topology.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from uni3d.engine.engine import Engine


class GlobalOrder:
    """Sample index at each place of the endless order."""

    def __init__(self, n_samples: int, seed: int) -> None:
        if n_samples < 1:
            raise ValueError("the training data has no samples")
        self._n = n_samples
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._draw)  # a batch can straddle two epochs

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._n)

    def __getitem__(self, place: int) -> int:
        epoch, i = divmod(place, self._n)
        return int(self._epoch(epoch)[i])


class _MicroBatches(Sampler[list[int]]):
    """Endless lists of sample indices: this rank's micro batches, from `start` samples on."""

    def __init__(
        self, order: GlobalOrder, start: int, train_batch: int, micro_batch: int, dp_rank: int, dp: int
    ) -> None:
        self._order, self._start = order, start
        self._train_batch, self._micro_batch = train_batch, micro_batch
        self._share = train_batch // dp
        self._first = dp_rank * self._share

    def __iter__(self) -> Iterator[list[int]]:
        batch_start = self._start
        while True:
            begin = batch_start + self._first
            for i in range(begin, begin + self._share, self._micro_batch):
                yield [self._order[place] for place in range(i, i + self._micro_batch)]
            batch_start += self._train_batch


class TrainingLoader:
    """Endless micro batches of this rank, from where training stands.

    `iter(loader)` begins at the first sample that hasn't been consumed. An iterator that was begun before
    a checkpoint was loaded would give the wrong samples, and refuses to go on.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        train_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp: int,
        seed: int,
        position: Callable[[], int],
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """`position` gives the samples consumed so far, over all ranks."""
        self._dataset = dataset
        self._order = GlobalOrder(len(dataset), seed)  # type: ignore[arg-type]
        self._split = (train_batch, micro_batch, dp_rank, dp)
        self._collate_fn = collate_fn
        self._position = position
        self._generation = 0

    def moved(self) -> None:
        """The position has jumped: iterators that were begun before are of no use any more."""
        self._generation += 1

    def __iter__(self) -> Iterator[Any]:
        generation = self._generation
        sampler = _MicroBatches(self._order, self._position(), *self._split)
        for batch in DataLoader(self._dataset, batch_sampler=sampler, collate_fn=self._collate_fn):
            if generation != self._generation:
                raise RuntimeError(
                    "this data iterator was made before a checkpoint was loaded, and would give samples "
                    "out of order; call iter() on the loader again"
                )
            yield batch


def engine_loader(
    engine: Engine,
    dataset: Dataset[Any],
    collate_fn: Callable[[list[Any]], Any] | None = None,
    position: Callable[[], int] = lambda: 0,
) -> TrainingLoader:
    """A loader of `dataset` with the engine's batch sizes, for this rank.

    Without `position` each `iter()` begins at the same first sample, as evaluation wants it.
    """
    topology = engine.model.topology
    return TrainingLoader(
        dataset,
        train_batch=engine.triad.train_batch,
        micro_batch=engine.triad.micro_batch,
        dp_rank=topology.dp_rank,
        dp=topology.degrees.dp,
        seed=engine.config.seed,
        position=position,
        collate_fn=collate_fn,
    )
