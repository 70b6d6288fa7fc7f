"""Processes that load samples: the same batches with any number of them, and a clear end."""

import gc
import multiprocessing as mp
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import matrix, slow
from models import WIDTH, Stack, make_engine, seeded
from ranks import Ranks
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

import uni3d
from uni3d.config import BatchTriad, load_config
from uni3d.engine.data_loader import TrainingLoader
from uni3d.engine.sample_workers import HERE, Workers


class Augmented(Dataset[Any]):
    """Samples that differ each time they are drawn, with the process that made them."""

    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[float]:
        return [index, torch.rand(()).item(), random.random(), float(np.random.rand()), os.getpid()]


class Together(Augmented):
    def __getitems__(self, indices: list[int]) -> list[list[float]]:
        return [self[index] for index in indices]


def masked(samples: list[list[float]]) -> tuple[Any, list[float], float]:
    """Collate with a random number, as for masked language models."""
    return [sample[:4] for sample in samples], [sample[4] for sample in samples], random.random()


def make_loader(
    workers: Workers, *, data: Any = None, micro: int = 2, dp: int = 1, rank: int = 0, position: int = 0
) -> TrainingLoader:
    return TrainingLoader(
        data or Augmented(),
        BatchTriad(train_batch=12, micro_batch=micro, accumulation=12 // (micro * dp)),
        dp_rank=rank,
        seed=5,
        position=lambda: position,
        collate_fn=masked,
        workers=workers,
    )


def drawn(loader: TrainingLoader, count: int) -> list[Any]:
    """Return all but the processes' numbers."""
    return [(samples, mask) for samples, _, mask in islice(loader.all_epochs(), count)]


@pytest.mark.parametrize("data", [Augmented, Together])
def test_the_batches_are_the_same_with_any_number_of_processes(data: Any) -> None:
    expected = drawn(make_loader(HERE, data=data()), 18)
    random_numbers = [number for samples, mask in expected for s in samples for number in s[1:]]
    assert len({*random_numbers}) > len(random_numbers) // 2, "each sample differs from epoch to epoch"
    for workers in (Workers(1), Workers(2, prefetch_factor=5)):
        assert drawn(make_loader(workers, data=data()), 18) == expected
        assert drawn(make_loader(workers, data=data(), position=12), 12) == expected[6:], "after a resume"


def test_random_numbers_dont_depend_on_the_topology() -> None:
    expected = drawn(make_loader(HERE, dp=1), 6)
    ranks = [drawn(make_loader(HERE, dp=3, rank=rank), 2) for rank in range(3)]
    assert [batch for rank in ranks for batch in rank] == expected
    samples = [sample for batch, _ in expected for sample in batch]
    other = [sample for batch, _ in drawn(make_loader(HERE, micro=3), 4) for sample in batch]
    assert other == samples, "another micro batch"


@pytest.mark.parametrize("workers", [HERE, Workers(1)])
def test_the_scripts_generators_go_on_as_without_a_loader(workers: Workers) -> None:
    def numbers() -> list[float]:
        return [torch.rand(()).item(), random.random(), float(np.random.rand())]

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    expected = numbers() + numbers()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(3)
    found = numbers()
    batches = make_loader(workers).all_epochs()
    next(batches)
    next(batches)
    assert found + numbers() == expected


earlier: set[int | None] = set()
"""Processes from before the test, such as those that load samples for an engine of another file's."""


@pytest.fixture(autouse=True)
def only_the_tests_own() -> Iterator[None]:
    earlier.update(child.pid for child in mp.active_children())
    yield
    earlier.clear()


def loading() -> list[Any]:
    """Return the processes that load samples, without the ranks of the tests' pool."""
    children = [child for child in mp.active_children() if child.pid not in earlier]
    return [child for child in children if not type(child).__name__.startswith("Spawn")]


def processes(batches: Any) -> set[float]:
    return {process for _, numbers, _ in batches for process in numbers}


def test_processes_load_ahead_but_nothing_else_counts() -> None:
    consumed = [0]
    loader = make_loader(Workers(1, prefetch_factor=6))
    loader._position = lambda: consumed[0]
    batches = loader.all_epochs()
    first = [next(batches)[0] for _ in range(6)]  # six more are loaded, or on their way
    consumed[0] = 12
    assert [samples for samples, *_ in islice(loader, 6)] == [samples for samples, *_ in islice(batches, 6)]
    assert first != [samples for samples, *_ in islice(loader, 6)]


@pytest.mark.parametrize("persistent", [False, True])
def test_processes_end_with_their_iterator_or_wait_for_the_next(persistent: bool) -> None:
    loader = make_loader(Workers(2, persistent=persistent))
    first = processes(loader)
    assert len(first) == 2
    assert os.getpid() not in first
    assert len(loading()) == (2 if persistent else 0)
    dropped = iter(loader)
    second = processes([next(dropped)])
    assert (second <= first) is persistent
    beside = iter(loader)
    assert not processes([next(beside)]) & (first | second), "they are in use"
    del dropped, beside
    gc.collect()
    assert len(loading()) == (2 if persistent else 0)
    third = [*loader]
    assert [samples for samples, *_ in third] == [samples for samples, *_ in make_loader(HERE)]
    assert (processes(third) == first) is persistent
    del loader
    gc.collect()
    assert not loading()


# --- failures ----------------------------------------------------------------------------------------------


class Failing(Dataset[Any]):
    """Samples of `Stack`; on the ranks given, the fifth micro batch of a process fails."""

    def __init__(self, how: str, ranks: list[int]) -> None:
        self.how, self.rank_fails = how, torch.distributed.get_rank() in ranks
        self.drawn = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        if self.rank_fails and self.drawn > 12:
            assert get_worker_info() is not None
            if self.how == "raises":
                raise OSError(f"sample {index} is damaged")
            os._exit(7)
        return torch.full((WIDTH,), float(index)), torch.ones(1)


def with_children() -> None:
    """Allow this rank of the tests' pool, a daemon, to fork processes of its own."""
    mp.set_start_method("fork", force=True)
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def failing_case(how: str) -> list[str]:
    with_children()
    config = {"num_local_io_workers": 1, "persistent_workers": True}
    engine = make_engine(seeded(Stack), training_data=Failing(how, [1]), config=config)
    messages = []
    for _ in range(4):
        try:
            engine.train_batch()
        except RuntimeError as error:
            messages.append(f"{type(error).__name__}: {error}")
            break
        except OSError as error:
            messages.append(f"{type(error).__name__}: {error}")
            break
    messages.append(str(engine.global_steps))
    del engine
    gc.collect()
    deadline = time.monotonic() + 30
    while loading() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loading()
    return messages


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", matrix("dies")])
def test_a_process_that_fails_is_one_error_on_all_ranks(ranks: Ranks, how: str) -> None:
    (other, steps), (own, its_steps) = ranks.run(2, failing_case, how)
    assert steps == its_steps
    assert steps == "2" or how == "dies", "which loses what is on its way"
    reason = "Caught OSError in DataLoader worker process 0"
    if how == "dies":
        reason = "a process that loads samples of Failing died; look for its own output"
    assert reason in own
    assert f"RankFailedError: step {int(steps) + 1}: train_batch() failed on rank 1: " in other
    assert reason in other


# --- engines -----------------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    def __init__(self, length: int = 24) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.full((WIDTH,), index / 24) + 0.1 * torch.randn(WIDTH)
        return x, x.square().mean(0, keepdim=True)


def resumed_case(run: Path, workers: int, steps: list[int], tp: int) -> list[float]:
    """Train on samples with noise, resuming if there is a checkpoint; return the losses."""
    with_children()
    config = {"num_local_io_workers": workers, "parallel": {"tp": tp, "device": "cpu"}, "seed": 7}
    engine = make_engine(seeded(Stack), training_data=Noisy(30), config=config)
    engine.resume(run)
    losses = [engine.train_batch().item() for _ in steps]
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    return losses


@pytest.mark.parametrize("world", [slow(2), matrix(4)])
def test_a_resume_draws_the_same_noise_on_any_ranks_and_processes(
    ranks: Ranks, tmp_path: Path, world: int
) -> None:
    expected = ranks.run(1, resumed_case, tmp_path / "whole", 0, [*range(7)], 1)[0]
    found = ranks.run(world, resumed_case, tmp_path / "parts", 1, [*range(3)], 1)[0]
    found += ranks.run(1, resumed_case, tmp_path / "parts", 0, [*range(2)], 1)[0]
    found += ranks.run(world, resumed_case, tmp_path / "parts", 0, [*range(2)], 1)[0]
    assert found == pytest.approx(expected, rel=1e-5)


# --- the config --------------------------------------------------------------------------------------------


def test_the_keys_of_the_config() -> None:
    config = load_config({"train_batch_size": 1, "num_workers": 3, "prefetch_factor": 4})
    assert (config.num_local_io_workers, config.prefetch_factor, config.persistent_workers) == (3, 4, False)
    for key in ("prefetch_factor", "persistent_workers"):
        with pytest.raises(ValueError, match=rf"{key}\((4|True)\) has no effect without processes that load"):
            load_config({"train_batch_size": 1, key: 4 if key == "prefetch_factor" else True})
    with pytest.raises(ValueError, match="num_workers is 1, but num_local_io_workers, which means the same"):
        load_config({"num_workers": 1, "num_local_io_workers": 2})


def test_an_engines_loader_has_the_configs_processes(alone: None) -> None:
    engine = make_engine(
        seeded(Stack), training_data=Noisy(), config={"num_local_io_workers": 2, "prefetch_factor": 1}
    )
    batches = iter(engine.training_dataloader)
    next(batches)
    assert len(loading()) == 2
    assert isinstance(engine, uni3d.Engine)
    del batches
    gc.collect()
    assert not loading()
