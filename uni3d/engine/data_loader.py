"""The order of samples: one global order that doesn't depend on the topology.

Each epoch is a permutation drawn from `(seed, epoch)`; the epochs follow each other without end. Global
batch k has the samples `k * B` to `(k + 1) * B` of that order, and each data-parallel rank takes its slice.
The state is one integer, the samples consumed, which means the same on every topology.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, Sampler

from parallel import ParallelModel
from uni3d.config import BatchTriad
from uni3d.engine.arguments import check_data
from uni3d.engine.batches import check_batches, on_device


class GlobalOrder:
    """The endless order: maps a position to a sample index."""

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


class _MicroBatchSampler(Sampler[list[int]]):
    """Endless lists of sample indices: this rank's micro batches after the first `start` samples."""

    def __init__(self, order: GlobalOrder, start: int, triad: BatchTriad, dp_rank: int) -> None:
        self._order, self._start, self._triad = order, start, triad
        self._share = triad.micro_batch * triad.accumulation
        self._first = dp_rank * self._share

    def __iter__(self) -> Iterator[list[int]]:
        micro_batch, batch_start = self._triad.micro_batch, self._start
        while True:
            begin = batch_start + self._first
            for i in range(begin, begin + self._share, micro_batch):
                yield [self._order[place] for place in range(i, i + micro_batch)]
            batch_start += self._triad.train_batch


class LoaderIterator(Iterator[Any]):
    """Iterator of a `TrainingLoader`, whose micro batches have the config's number of samples."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)


class TrainingLoader:
    """Endless micro batches of this rank, starting at the current position.

    `iter(loader)` starts at the first sample that hasn't been consumed. An iterator made before a checkpoint
    was loaded is at the wrong position, so its next batch is an error.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        triad: BatchTriad,
        *,
        dp_rank: int,
        seed: int,
        position: Callable[[], int],
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """`position` returns the number of samples consumed so far, over all ranks."""
        check_data(dataset)
        self._dataset = dataset
        self._order = GlobalOrder(len(dataset), seed)  # type: ignore[arg-type]
        self._triad, self._dp_rank = triad, dp_rank
        self._collate_fn = collate_fn
        self._position = position
        self._generation = 0

    def moved(self) -> None:
        """Invalidate existing iterators: the position has changed."""
        self._generation += 1

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self._batches())

    def _batches(self) -> Iterator[Any]:
        generation = self._generation
        sampler = _MicroBatchSampler(self._order, self._position(), self._triad, self._dp_rank)
        for batch in DataLoader(self._dataset, batch_sampler=sampler, collate_fn=self._collate_fn):
            if generation != self._generation:
                raise RuntimeError(
                    "this data iterator was made before a checkpoint was loaded, so its samples would be "
                    "out of order; call iter() on the loader again"
                )
            yield batch


class BatchSource:
    """Source of each step's micro batches: the script's iterator or the engine's own loader.

    Attributes:
        sure: True if the last ones have the config's number of samples, whatever their tensors' first dims.
    """

    def __init__(self, loader: TrainingLoader | None, model: ParallelModel, triad: BatchTriad) -> None:
        self._loader = loader
        self._model = model
        self._triad = triad
        self._iterator: Iterator[Any] | None = None
        self.sure = False

    def take(self, data_iter: Iterator[Any] | None) -> list[Any]:
        """Return a step's micro batches on the device, from `data_iter`, or from the loader if it is None.

        Raises:
            ValueError: there is no data, or `check_batches` refuses it.
        """
        if data_iter is not None:
            self._iterator = None  # the loader's next use starts at the position of that time
        else:
            if self._loader is None:
                raise ValueError("no data: pass a data iterator, or training_data to initialize()")
            if self._iterator is None:
                self._iterator = iter(self._loader)
            data_iter = self._iterator
        device = self._model.topology.device
        batches = [on_device(next(data_iter), device) for _ in range(self._triad.accumulation)]
        self.sure = isinstance(data_iter, LoaderIterator)
        check_batches(self._model, batches)
        return batches

    def moved(self) -> None:
        """Restart the loader at the next step: the position in the training data has changed."""
        self._iterator = None
        if self._loader is not None:
            self._loader.moved()
