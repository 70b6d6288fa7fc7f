"""The data loader: each rank's part of one global order that doesn't depend on the topology.

Each epoch is a permutation keyed by `(seed, epoch)`; the epochs follow each other without end. Global
batch k has the samples `k * B` to `(k + 1) * B` of that order, and each data-parallel rank takes its slice.
The state is one integer, the samples consumed, which means the same on every topology.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from parallel import ParallelModel, Topology
from uni3d.config import BatchTriad, Config
from uni3d.config.data import epoch_length
from uni3d.engine.arguments import check_dataset
from uni3d.engine.batches import check_batches, on_device
from uni3d.engine.given_loader import GivenLoader
from uni3d.engine.sample_order import GlobalOrder
from uni3d.engine.sample_workers import HERE, Places, SampleFetcher, Workers

_AT_ONCE = 4096
"""Samples that are looked up in the order together, at 0.2 us each on one core; 4 at once take 50 us each."""


class _MicroBatchPlaces(Iterable[Places]):
    """Samples of this rank's micro batches of the global batches that begin before `end`.

    The first global batch begins at `start`; its first `taken` micro batches are left out. Without an end,
    the epochs follow each other.
    """

    def __init__(
        self, order: GlobalOrder, triad: BatchTriad, dp_rank: int, *, start: int, end: int | None, taken: int
    ) -> None:
        self._order, self._triad = order, triad
        self._share = triad.micro_batch * triad.accumulation
        self._first = dp_rank * self._share
        self._start, self._end, self._taken = start, end, taken

    def __iter__(self) -> Iterator[Places]:
        return islice(self._micro_batches(), self._taken, None)

    def _micro_batches(self) -> Iterator[Places]:
        size, step = self._triad.micro_batch, self._triad.train_batch
        starts = count(self._start, step) if self._end is None else range(self._start, self._end, step)
        begins = (start + self._first + i for start in starts for i in range(0, self._share, size))
        while several := list(islice(begins, max(1, _AT_ONCE // size))):
            places = np.add.outer(np.array(several, np.int64), np.arange(size))
            samples = self._order.samples(places).tolist()
            yield from (list(zip(*both, strict=True)) for both in zip(places.tolist(), samples, strict=True))


class LoaderIterator(Iterator[Any]):
    """Iterator of a `TrainingLoader`, whose micro batches have the config's number of samples."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return next(self._batches)


class TrainingLoader:
    """Micro batches of this rank: each `for` gives the rest of an epoch, from where training stands.

    Global batches are always complete: where their size doesn't divide the number of samples, the last one
    of an epoch goes on with the first samples of the next, or with `drop_last` is left out. An epoch's `for`
    gives the global batches that begin in that epoch.

    Processes that load may be ahead of training. Only what is trained on counts.

    A `for` begins at the first sample that hasn't been consumed, so it goes on with the next epoch after one
    that has been trained on, and in the middle of one after a `break` or a resume. An iterator made before a
    checkpoint was loaded is at the wrong position, so its next batch is an error.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        triad: BatchTriad,
        *,
        dp_rank: int,
        seed: int,
        position: Callable[[], int] | None = None,
        taken: Callable[[], int] = lambda: 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        drop_last: bool = False,
        workers: Workers = HERE,
    ) -> None:
        """Load from where training stands, or without a `position` from the first sample.

        `position` returns the number of samples consumed so far, over all ranks, and `taken` how many micro
        batches this rank has had backward passes of since, those inside `no_sync` included.
        """
        check_dataset(dataset)
        samples = len(dataset)  # type: ignore[arg-type]
        self._length = epoch_length(samples, triad.train_batch, drop_last=drop_last)
        self._order = GlobalOrder(samples, seed, self._length)
        self._triad, self._dp_rank = triad, dp_rank
        self._fetcher = SampleFetcher(dataset, seed=seed, workers=workers, collate_fn=collate_fn)
        self.follows_training = position is not None
        self._position, self._taken = position or (lambda: 0), taken
        self._generation = 0
        self._behind = (-1, 0, 0)

    def moved(self) -> None:
        """Invalidate existing iterators: the position has changed."""
        self._generation += 1
        self._behind = (-1, 0, 0)

    def __len__(self) -> int:
        """Return this rank's micro batches of an epoch that begins with its first sample."""
        return -(-self._length // self._triad.train_batch) * self._triad.accumulation

    def __iter__(self) -> LoaderIterator:
        return LoaderIterator(self._epoch())

    def _epoch(self) -> Iterator[Any]:
        generation, began = self._generation, (self._position(), self._taken())
        start, taken = self._start()
        end = (start // self._length + 1) * self._length
        yield from self._batches(start, end, taken)
        # Micro batches in `no_sync` and those dropped by `zero_grad` count nowhere: the next epoch follows.
        now = (self._position(), self._taken())
        if generation == self._generation and began < now < (end, 0):
            self._behind = (*now, end + (start - end) % self._triad.train_batch)

    def all_epochs(self) -> LoaderIterator:
        """Return micro batches without end, epoch after epoch, from where training stands."""
        start, taken = self._start()
        return LoaderIterator(self._batches(start, None, taken))

    def _start(self) -> tuple[int, int]:
        """Return the first sample, and the number of its step's micro batches that have been taken."""
        start, taken = self._position(), self._taken()
        behind, taken_then, end = self._behind
        if start == behind:
            start, taken = end, max(taken - taken_then, 0)
        whole, rest = divmod(taken, self._triad.accumulation)
        return start + whole * self._triad.train_batch, rest

    def _batches(self, start: int, end: int | None, taken: int) -> Iterator[Any]:
        generation = self._generation
        wanted = _MicroBatchPlaces(self._order, self._triad, self._dp_rank, start=start, end=end, taken=taken)
        for batch in self._fetcher.fetch(wanted):
            if generation != self._generation:
                raise RuntimeError(
                    "this data iterator was made before a checkpoint was loaded, so its samples would be "
                    "out of order; call iter() on the loader again"
                )
            yield batch


def loading(config: Config, topology: Topology) -> dict[str, Any]:
    """Return the arguments of a `TrainingLoader` that this rank has from the config."""
    workers = Workers(
        config.num_local_io_workers,
        config.prefetch_factor,
        config.persistent_workers,
        pin_memory=config.dataloader_pin_memory and topology.device.type == "cuda",
    )
    return {
        "dp_rank": topology.dp_rank,
        "seed": config.seed,
        "drop_last": config.dataloader_drop_last,
        "workers": workers,
    }


class RepeatingLoader:
    """Endless batches of a loader: at its end, it is iterated over again, as by DeepSpeed's wrapper.

    `next` and a `for` go on where the last stopped. Only the loader that `initialize` returned knows where
    training stands: there a `for` begins. It and those of `Engine.loader` give one epoch after another.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._batches: Iterator[Any] = iter(())

    def __iter__(self) -> RepeatingLoader:
        if isinstance(self.loader, TrainingLoader | GivenLoader) and self.loader.follows_training:
            self._batches = iter(())
        return self

    def __next__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            loader = self.loader
            if isinstance(loader, TrainingLoader | GivenLoader):
                self._batches = loader.all_epochs()
            else:
                self._batches = iter(loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                f"the {type(loader).__name__} has no batches, or iter() doesn't begin it anew; give "
                "RepeatingLoader a loader that has some, each time"
            ) from None


class BatchSource:
    """Source of each step's micro batches: the script's iterator or the engine's own loader.

    Attributes:
        sure: True if the last ones have the config's number of samples, whatever their tensors' first dims.
    """

    def __init__(
        self, loader: TrainingLoader | GivenLoader | None, model: ParallelModel, triad: BatchTriad
    ) -> None:
        self._loader = loader
        self._model = model
        self._triad = triad
        self._iterator: Iterator[Any] | None = None
        self.sure = False

    def take(self, data_iter: Iterator[Any] | None) -> list[Any]:
        """Return a step's micro batches on the device, from `data_iter`, or from the loader if it is None.

        Raises:
            StopIteration: `data_iter` has too few.
            ValueError: there is no data, or `check_batches` refuses it.
        """
        if data_iter is not None:
            self._iterator = None  # the loader's next use starts at the position of that time
        else:
            if self._loader is None:
                raise ValueError("no data: pass a data iterator, or training_data to initialize()")
            if self._iterator is None:
                self._iterator = self._loader.all_epochs()
            data_iter = self._iterator
        device = self._model.topology.device
        batches: list[Any] = []
        for done in range(self._triad.accumulation):
            try:
                batches.append(on_device(next(data_iter), device))
            except StopIteration:
                raise StopIteration(
                    f"the data iterator ended after {done} of a step's {self._triad.accumulation} micro "
                    "batches; pass a new one for each epoch, or uni3d.RepeatingLoader(loader), which goes on"
                ) from None
        self.sure = isinstance(data_iter, LoaderIterator)
        check_batches(self._model, batches)
        return batches

    def moved(self) -> None:
        """Restart the loader at the next step: the position in the training data has changed."""
        self._iterator = None
        if self._loader is not None:
            self._loader.moved()
