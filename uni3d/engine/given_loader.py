"""Loaders and streams that a script brings as `training_data`: used as they are, by each data-parallel rank.

A resume goes on where the run stood if the loader, or the stream's dataset, has `state_dict` and
`load_state_dict`, or if its order is known: then the epoch's first batches are loaded and left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from parallel import Topology
from uni3d.config import BatchTriad, Config
from uni3d.config.data import epoch_length
from uni3d.engine.sample_workers import no_error_elsewhere


def is_given_loader(data: Any) -> bool:
    """Return whether the data is used as it is, rather than in an order of the engine's own."""
    if isinstance(data, DataLoader | IterableDataset):
        return True
    return has_state(data) and hasattr(data, "__iter__") and not hasattr(data, "__getitem__")


def has_state(owner: Any) -> bool:
    """Return whether an object can say where it stands, and go back there."""
    return all(callable(getattr(owner, name, None)) for name in ("state_dict", "load_state_dict"))


class GivenLoader:
    """Micro batches of a loader that the script brings.

    Each `for` is an epoch of the loader, after a resume the rest of one. Where its sampler has `set_epoch`,
    the epochs are numbered unless the script does so.

    Attributes:
        kind: the name of the data's class.
        problem: why this rank can't use it, or None. To be compared by all ranks.
        resumes: True if a checkpoint can keep where it stands.
    """

    follows_training = True

    def __init__(
        self, loader: Iterable[Any], *, kind: str, keeper: Any, known_order: bool, problem: str | None = None
    ) -> None:
        """Use `loader`. `keeper` has its state, or is None; `known_order` if its number defines an epoch."""
        self._loader, self.kind, self.problem = loader, kind, problem
        self._keeper = keeper
        self.resumes = keeper is not None or known_order
        sampler = getattr(loader, "sampler", None)
        self._sampler: Any = sampler if hasattr(sampler, "set_epoch") and hasattr(sampler, "epoch") else None
        self._set = self._epoch = 0 if self._sampler is None else int(self._sampler.epoch)
        self._batches = 0  # taken from the epoch
        self._restored = False
        self._generation = 0
        self._endless: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Return the micro batches of an epoch, if the loader knows them."""
        return len(self._loader)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True  # a stream has no length to ask for

    def __iter__(self) -> Iterator[Any]:
        return self._pass(self._generation)

    def all_epochs(self) -> Iterator[Any]:
        """Return micro batches without end, epoch after epoch; the same iterator until a load."""
        if self._endless is None:
            self._endless = self._passes(self._generation)
        return self._endless

    def moved(self) -> None:
        """Do nothing: only a load of its own state moves it."""

    def _passes(self, generation: int) -> Iterator[Any]:
        while True:
            restored, some = self._restored, False
            for batch in self._pass(generation):
                some = True
                yield batch
            if not (some or restored):
                raise ValueError(
                    f"training_data, a {self.kind}, has no batches, or iter() doesn't begin it anew; give "
                    "one that has some in each epoch"
                )

    def _pass(self, generation: int) -> Iterator[Any]:
        skipped = self._begin(generation)
        with no_error_elsewhere():
            batches = iter(self._loader)
        for i in range(skipped):
            if next(batches, None) is None:
                raise ValueError(
                    f"training_data, a {self.kind}, ended after {i} of the {skipped} micro batches that the "
                    "checkpoint had taken from the epoch; give the data it had"
                )
        for batch in batches:
            self._check(generation)
            self._batches += 1
            yield batch
        self._check(generation)
        self._epoch, self._batches = self._epoch + 1, 0

    def _begin(self, generation: int) -> int:
        """Begin an epoch, or go on with a restored one; return how many batches are to be left out."""
        self._check(generation)
        if self._batches and not self._restored:  # a `for` that was left
            self._epoch, self._batches = self._epoch + 1, 0
        if (sampler := self._sampler) is not None:
            if sampler.epoch != self._set:  # by the script
                if self._restored and self._batches:
                    raise ValueError(
                        f"the checkpoint was saved after {self._batches} micro batches of epoch "
                        f"{self._epoch}, but the script has called set_epoch({sampler.epoch}); begin with "
                        "that epoch after a resume, or leave the numbers to the engine"
                    )
                self._epoch = int(sampler.epoch)
            sampler.set_epoch(self._epoch)
            self._set = self._epoch
        skipped = self._batches if self._restored and self._keeper is None else 0
        self._restored = False
        return skipped

    def _check(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError(
                "this data iterator was made before a checkpoint was loaded, so its samples would be out of "
                "order; call iter() on the loader again"
            )

    # --- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        state = {"epoch": self._epoch, "batches": self._batches}
        return state if self._keeper is None else state | {"loader": self._keeper.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where it stood."""
        self.begin_anew()
        self._epoch, self._batches, self._restored = state["epoch"], state["batches"], True
        if self._keeper is not None:
            self._keeper.load_state_dict(state["loader"])
        elif self._batches >= len(self):
            self._epoch, self._batches = self._epoch + 1, 0
        if self._sampler is not None:
            self._sampler.set_epoch(self._epoch)
            self._set = self._epoch

    def begin_anew(self) -> None:
        """Begin with an epoch, whatever was taken before."""
        self._generation += 1
        self._endless, self._batches, self._restored = None, 0, False


def data_as_used(
    data: Any,
    config: Config,
    triad: BatchTriad,
    topology: Topology,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> Any:
    """Return a `GivenLoader` of data that is used as it is; a map-style dataset unchanged.

    Raises:
        ValueError: it doesn't fit the config; the same on all ranks.
    """
    if not is_given_loader(data):
        samples = 0 if data is None else len(data)
        epoch_length(samples, triad.train_batch, drop_last=config.dataloader_drop_last)  # or it is refused
        return data
    kind = type(data).__name__
    if isinstance(data, IterableDataset):
        return _of_stream(data, config, triad, topology, collate_fn)
    if collate_fn is not None:
        raise ValueError(f"training_data is a {kind}, which makes its own batches; give collate_fn to it")
    if not isinstance(data, DataLoader):
        return GivenLoader(data, kind=kind, keeper=data, known_order=False)
    batches = data.batch_sampler if data.batch_size is None else data
    size = getattr(batches, "batch_size", None)
    if size is not None and size != triad.micro_batch:
        raise ValueError(
            f"training_data is a {kind} of {size} samples a batch, but train_micro_batch_size_per_gpu is "
            f"{triad.micro_batch}; give both the same"
        )
    # With a batch sampler of the script's own, the order is unknown.
    sampler = None if data.batch_size is None or isinstance(data.dataset, IterableDataset) else data.sampler
    known = isinstance(sampler, SequentialSampler | DistributedSampler)
    keeper = data if has_state(data) else None
    problem = _wrong_part(sampler, topology)
    return GivenLoader(data, kind=kind, keeper=keeper, known_order=known, problem=problem)


def _of_stream(
    data: IterableDataset[Any],
    config: Config,
    triad: BatchTriad,
    topology: Topology,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> GivenLoader:
    kind, processes = type(data).__name__, config.num_local_io_workers
    if has_state(data) and processes:
        raise ValueError(
            f"training_data is a {kind} with a state, which num_local_io_workers({processes}) would keep to "
            "themselves; load with 0, or give torchdata's StatefulDataLoader of it"
        )
    generator = torch.Generator()
    generator.manual_seed(config.seed + topology.dp_rank)  # else it would draw from the script's generator
    loader: DataLoader[Any] = DataLoader(
        data,
        batch_size=triad.micro_batch,
        collate_fn=collate_fn,
        num_workers=processes,
        prefetch_factor=config.prefetch_factor,
        persistent_workers=config.persistent_workers,
        pin_memory=config.dataloader_pin_memory and topology.device.type == "cuda",
        drop_last=config.dataloader_drop_last,
        generator=generator,
    )
    return GivenLoader(loader, kind=kind, keeper=data if has_state(data) else None, known_order=False)


def _wrong_part(sampler: Any, topology: Topology) -> str | None:
    """Return why a sampler doesn't give each data-parallel rank its own part of the data; None if unknown."""
    dp, rank = topology.degrees.dp, topology.dp_rank
    remedy = (
        f"give its DataLoader a DistributedSampler(dataset, num_replicas={dp}, rank=...) with the "
        "data-parallel rank, or pass the dataset itself"
    )
    if isinstance(sampler, DistributedSampler):
        if (sampler.num_replicas, sampler.rank) != (dp, rank):
            return (
                f"training_data's DistributedSampler is number {sampler.rank} of {sampler.num_replicas}, but "
                f"this rank is number {rank} of {dp} data-parallel ranks; {remedy}"
            )
    elif dp > 1 and isinstance(sampler, RandomSampler | SequentialSampler):
        return (
            f"training_data's {type(sampler).__name__} would give each of the {dp} data-parallel ranks all "
            f"samples; {remedy}"
        )
    return None
