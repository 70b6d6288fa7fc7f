"""Loads samples, in processes of their own or in this one, with random numbers that depend on neither.

Each sample is made from generators that are seeded by `(seed, place in the order)`. So a random augmentation
is the same on any topology, with any number of processes, and after a resume. What `collate_fn` draws goes on
from there: it is the same wherever the micro batch is.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import mtrand
from torch.utils.data import DataLoader, Dataset

Places = list[tuple[int, int]]
"""A micro batch: the place of each sample in the order, and its number in the dataset."""


class Workers(NamedTuple):
    """The processes that load samples."""

    processes: int = 0
    """0 loads them in this process."""
    prefetch_factor: int | None = None
    persistent: bool = False
    pin_memory: bool = False


HERE = Workers()


class SampleFetcher:
    """Makes micro batches of a dataset's samples."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        seed: int,
        workers: Workers,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._samples = _SeededSamples(dataset, seed)
        self._workers, self._collate_fn = workers, collate_fn
        self._idle: DataLoader[Any] | None = None  # its persistent processes wait

    def fetch(self, wanted: Iterable[Places]) -> Iterator[Any]:
        """Yield the micro batches; processes run ahead. Closing it stops them, or lets them wait."""
        loader, self._idle = self._new_loader() if self._idle is None else self._idle, None
        loader.batch_sampler.wanted = wanted  # type: ignore[union-attr]
        try:
            with no_error_elsewhere():
                batches = iter(loader)
            here = nullcontext if self._workers.processes else _random_state_kept
            while True:
                with here():
                    batch = next(batches, _END)
                if batch is _END:
                    break
                yield batch
        except GeneratorExit:
            pass  # dropped in the middle
        except (OSError, EOFError, RuntimeError) as error:  # `loader` isn't used again
            if self._workers.processes and _is_death(error):
                raise RuntimeError(
                    f"a process that loads samples of {type(self._samples.dataset).__name__} died; look for "
                    "its own output, for a lack of memory or of /dev/shm, or load with num_local_io_workers 0"
                ) from error
            raise
        if self._workers.persistent and self._idle is None:
            self._idle = loader

    def _new_loader(self) -> DataLoader[Any]:
        workers, generator = self._workers, torch.Generator()
        generator.manual_seed(self._samples.seed_at(-1))  # else it would draw from the script's generator
        return DataLoader(
            self._samples,
            batch_sampler=_Wanted(),
            collate_fn=self._collate_fn,
            num_workers=workers.processes,
            prefetch_factor=workers.prefetch_factor,
            persistent_workers=workers.persistent,
            pin_memory=workers.pin_memory,
            generator=generator,
        )


@contextmanager
def no_error_elsewhere() -> Iterator[None]:
    """Take back torch's handler of SIGCHLD, by which a process that dies raises an error in any line.

    In the middle of a step, that would leave this rank behind the others. Without it, the death is noticed by
    the next batch, within 5 s.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGCHLD, before)


_END = object()


def _is_death(error: Exception) -> bool:
    """Return whether an error of torch's loader is none of the dataset: those begin with "Caught"."""
    return not str(error).startswith("Caught ") and (
        isinstance(error, OSError | EOFError) or "exited unexpectedly" in str(error)
    )


class _Wanted(Iterable[Places]):
    """Samples of the micro batches that a loader is to make next."""

    wanted: Iterable[Places] = ()

    def __iter__(self) -> Iterator[Places]:
        return iter(self.wanted)


class _SeededSamples(Dataset[Any]):
    """A dataset whose samples are made from generators seeded by their places."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self._seed = dataset, seed

    def __getitems__(self, wanted: Places) -> list[Any]:
        together = getattr(self.dataset, "__getitems__", None)
        if together is not None:
            self._seed_generators(wanted[0][0])
            samples: list[Any] = together([sample for _, sample in wanted])
            return samples
        samples = []
        for place, sample in wanted:
            self._seed_generators(place)
            samples.append(self.dataset[sample])
        return samples

    def seed_at(self, place: int) -> int:
        """Return the seed of the sample at a place, 63 bits."""
        digest = blake2b(f"{self._seed}:sample {place}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def _seed_generators(self, place: int) -> None:
        seed = self.seed_at(place)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices, which is slow
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)


_bits = np.random.MT19937(0)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Give the script's generators their states back."""
    states, numpys = (random.getstate(), torch.default_generator.get_state()), mtrand.get_bit_generator()
    mtrand.set_bit_generator(_bits)  # numpy takes long to copy a state
    try:
        yield
    finally:
        random.setstate(states[0])
        torch.default_generator.set_state(states[1])
        mtrand.set_bit_generator(numpys)
