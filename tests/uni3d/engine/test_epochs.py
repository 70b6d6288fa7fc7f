"""Epochs of the data loader: one `for` is the rest of an epoch, and no sample is dropped or doubled."""

from collections.abc import Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from models import Stack, global_batches, make_engine, seeded
from ranks import Ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import uni3d
from uni3d.config import BatchTriad
from uni3d.engine.data_loader import TrainingLoader
from uni3d.engine.sample_order import GlobalOrder


class Training:
    """Loader of one rank, and the counts of an engine that trains on its batches."""

    def __init__(
        self, n: int, micro: int, accumulation: int, rank: int = 0, dp: int = 1, *, drop_last: bool = False
    ) -> None:
        self.triad = BatchTriad(
            train_batch=micro * accumulation * dp, micro_batch=micro, accumulation=accumulation
        )
        self.samples, self.done, self.taken = 0, 0, 0
        self.loader = TrainingLoader(
            TensorDataset(torch.arange(n)),
            self.triad,
            dp_rank=rank,
            seed=5,
            position=lambda: self.samples,
            taken=lambda: self.taken,
            drop_last=drop_last,
        )

    def step(self, *, counts: bool = True) -> None:
        """End a micro batch, or without `counts` one inside `no_sync`."""
        self.taken += 1
        self.done += counts
        if self.done == self.triad.accumulation:
            self.samples, self.done, self.taken = self.samples + self.triad.train_batch, 0, 0

    def epoch(self) -> list[list[int]]:
        """Train on one `for`'s micro batches; return their samples."""
        found = []
        for (batch,) in self.loader:
            found.append(batch.tolist())
            self.step()
        return found


def flat(batches: list[list[int]]) -> list[int]:
    return [sample for batch in batches for sample in batch]


def global_order(ranks: list[list[list[int]]], accumulation: int) -> list[int]:
    """Put the micro batches of all ranks together to global batches."""
    steps = range(0, len(ranks[0]), accumulation)
    return [sample for i in steps for rank in ranks for sample in flat(rank[i : i + accumulation])]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
def test_epochs_follow_each_other_without_a_gap(dp: int, micro: int, accumulation: int, n: int) -> None:
    ranks = [Training(n, micro, accumulation, rank, dp) for rank in range(dp)]
    order, size, begin = GlobalOrder(n, 5), micro * accumulation * dp, 0
    for epoch in range(3):
        found = global_order([rank.epoch() for rank in ranks], accumulation)
        end = next(k for k in count(begin, size) if k >= (begin // n + 1) * n)
        assert found == order.samples(range(begin, end)).tolist()
        if epoch == 0:
            assert len(found) == len(ranks[0].loader) * micro * dp
            assert set(found) == set(range(n)), "each sample, in whole global batches"
        if n % size == 0:
            assert sorted(found) == list(range(n)), "each sample once"
        begin = end


def test_the_order_of_epochs_is_that_of_the_endless_loader() -> None:
    training = Training(10, 2, 2)
    endless = [batch.tolist() for (batch,) in islice(uni3d.RepeatingLoader(training.loader), 10)]
    assert [len(training.epoch()) for _ in range(2)] == [6, 4], "10 samples are 2.5 global batches"
    training.samples = 0
    assert training.epoch() + training.epoch() == endless


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))
def test_an_epoch_ends_before_an_incomplete_global_batch(
    dp: int, micro: int, accumulation: int, n: int
) -> None:
    size = micro * accumulation * dp
    if n < size:
        with pytest.raises(ValueError, match=rf"the data has {n} samples, fewer than train_batch_size"):
            Training(n, micro, accumulation, drop_last=True, dp=dp)
        return
    ranks = [Training(n, micro, accumulation, rank, dp, drop_last=True) for rank in range(dp)]
    endless = [[b.tolist() for (b,) in islice(r.loader.all_epochs(), 3 * len(r.loader))] for r in ranks]
    order, everything = GlobalOrder(n, 5), []
    for epoch in range(3):
        found = [rank.epoch() for rank in ranks]
        assert len(found[0]) == len(ranks[0].loader)
        samples = global_order(found, accumulation)
        assert samples == order.samples(range(epoch * n, epoch * n + n // size * size)).tolist()
        everything.append(found)
    assert [[b for epoch in everything for b in epoch[rank]] for rank in range(dp)] == endless


def test_a_break_in_an_epoch_with_dropped_samples() -> None:
    whole, training = Training(11, 2, 2, drop_last=True), Training(11, 2, 2, drop_last=True)
    expected = [whole.epoch() for _ in range(3)]
    assert [len(epoch) for epoch in expected] == [4, 4, 4]
    for epoch in expected:
        found = []
        for (batch,) in training.loader:
            if len(found) == 3:
                break
            found.append(batch.tolist())
            training.step()
        assert found + training.epoch() == epoch


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
def test_a_break_loses_and_doubles_nothing(steps: int) -> None:
    """Also in the middle of a step: its first micro batches have been used."""
    whole, training, found = Training(12, 2, 3).epoch(), Training(12, 2, 3), []
    for (batch,) in training.loader:
        if len(found) == steps:
            break  # without this one
        found.append(batch.tolist())
        training.step()
    if steps == len(whole):
        assert flat(training.epoch()) != flat(whole), "the next epoch"
    else:
        assert found + training.epoch() == whole


def test_an_epoch_that_nothing_was_trained_on_begins_again() -> None:
    training = Training(8, 2, 2)
    first = [batch.tolist() for (batch,) in training.loader]
    assert [batch.tolist() for (batch,) in training.loader] == first == training.epoch()


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("per_count", [2, 3, 5, 7])
def test_micro_batches_that_count_nowhere_dont_shorten_the_epochs(per_count: int, start: int) -> None:
    """`no_sync` takes micro batches beyond the engine's count; an epoch is an epoch all the same."""
    expected, training, taken = Training(8, 2, 1), Training(8, 2, 1), 0
    expected.samples = training.samples = start
    for _ in range(5):
        found = []
        for (batch,) in training.loader:
            found.append(batch.tolist())
            taken += 1
            training.step(counts=taken % per_count == 0)
        assert found == expected.epoch()


def test_after_a_load_only_the_count_tells_the_place() -> None:
    training = Training(8, 2, 1)
    for i, _ in enumerate(training.loader):
        training.step(counts=i % 2 == 1)
    assert training.samples == 4
    training.loader.moved()
    assert len(training.epoch()) == 2, "from 4 to 8"


# --- an engine ---------------------------------------------------------------------------------------------


def data(steps: int) -> TensorDataset:
    return TensorDataset(*(torch.cat(parts) for parts in zip(*global_batches(steps), strict=True)))


def one_epoch(engine: uni3d.Engine, data: Any = None, stop: int | None = None) -> list[torch.Tensor]:
    """Train like a DeepSpeed script, on up to `stop` micro batches; return this rank's inputs."""
    found: list[torch.Tensor] = []
    for inputs, targets in data or engine.training_dataloader:
        if len(found) == stop:
            break
        engine.backward(F.mse_loss(engine(inputs), targets))
        engine.step()
        found.append(inputs)
    return found


def epochs_case(run: str) -> Any:
    engine = make_engine(seeded(Stack), training_data=data(4), zero=1)
    gas, loader = engine.gradient_accumulation_steps(), engine.training_dataloader
    found = [torch.cat(one_epoch(engine)) for _ in range(2)]
    counts = [len(loader), len(found[0]) // 3, engine.global_steps]
    engine.train_batch(loader := iter(loader))
    engine.save_checkpoint(run)
    engine.train_batch(loader)
    counts.append(len(one_epoch(engine)) // gas)
    other = make_engine(seeded(Stack), training_data=data(4), zero=1)
    other.load_checkpoint(run)
    counts += [len(one_epoch(other)) // gas, len(one_epoch(other)) // gas, other.global_steps]
    return counts, found


@pytest.mark.parametrize("world", [slow(1), 2])
def test_a_script_that_loops_over_epochs(ranks: Ranks, tmp_path: Path, world: int) -> None:
    results = ranks.run(world, epochs_case, str(tmp_path))
    micro_batches = 4 * 4 // world
    for counts, _ in results:
        assert counts == [micro_batches, micro_batches, 8, 2, 3, 4, 16]
    samples = data(4).tensors[0]
    for epoch in range(2):
        mine = torch.cat([found[epoch] for _, found in results])
        assert sorted(mine.tolist()) == sorted(samples.tolist()), "each sample once per epoch"


def part_of_epochs_case(run: str, steps: int, drops: bool) -> Any:
    """Resume on these ranks; return the samples of the rest of the epoch, of the next, and of some steps."""
    x = torch.arange(40.0).unsqueeze(1).expand(40, 6).contiguous()
    engine = make_engine(
        seeded(Stack),
        micro=2,
        training_data=TensorDataset(x, x[:, :1] / 40),
        config={"dataloader_drop_last": drops, "train_batch_size": 12},
    )
    engine.resume(run)
    gas = engine.gradient_accumulation_steps()
    found = [one_epoch(engine) for _ in range(2)] + [one_epoch(engine, stop=steps * gas)]
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    return [[batch[:, 0].int().tolist() for batch in part] for part in found], len(engine.training_dataloader)


@pytest.mark.parametrize("drops", [False, True])
def test_a_resume_on_other_ranks_begins_with_the_rest_of_the_epoch(
    ranks: Ranks, tmp_path: Path, drops: bool
) -> None:
    """Compare with a plain walk over the order: the position that each run leaves is the next one's."""
    order, used, begin = GlobalOrder(40, 42), 36 if drops else 40, 0
    for world in (1, 2, 3, 1):
        results = ranks.run(world, part_of_epochs_case, str(tmp_path), 2, drops)
        for part in range(3):
            found = global_order([parts[part] for parts, _ in results], 12 // (2 * world))
            end = next(k for k in count(begin, 12) if k >= (begin // used + 1) * used)
            end = begin + 24 if part == 2 else end
            places = [p // used * 40 + p % used for p in range(begin, end)]
            assert found == order.samples(places).tolist()
            begin = end
        assert [length for _, length in results] == [(36 if drops else 48) // 12 * (6 // world)] * world


def test_ways_to_take_batches_can_be_mixed(alone: None) -> None:
    engine = make_engine(seeded(Stack), micro=12, training_data=data(3))
    loader, losses = engine.training_dataloader, []
    assert len(loader) == 3
    for batch in loader:
        losses.append(engine.train_batch(iter([batch])).item())
        if len(losses) == 2:
            break
    losses += [engine.train_batch().item() for _ in range(2)]  # the last of this epoch, the first of the next
    losses += [engine.train_batch(iter([batch])).item() for batch in loader]
    assert len(losses) == 6
    other = make_engine(seeded(Stack), micro=12, training_data=data(3))
    assert [other.train_batch().item() for _ in range(6)] == losses
    third = make_engine(seeded(Stack), micro=12, training_data=data(3))
    endless = uni3d.RepeatingLoader(third.training_dataloader)
    assert [third.train_batch(endless).item() for _ in range(6)] == losses
    batches = takewhile(lambda _: third.global_steps < 8, endless)
    assert len([third.train_batch(iter([batch])) for batch in batches]) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_break_in_the_middle_of_a_step(alone: None, wrapped: bool) -> None:
    engine, other = (make_engine(seeded(Stack), training_data=data(3)) for _ in range(2))
    loader = engine.training_dataloader
    if wrapped:
        loader = uni3d.RepeatingLoader(loader)
    found = [x for stop in (2, 1, 4, 1) for x in one_epoch(engine, loader, stop)]
    assert engine.global_steps == 2, "of 4 micro batches each"
    assert torch.equal(torch.cat(found + one_epoch(engine, loader, 4)), torch.cat(one_epoch(other)))


def test_an_epochs_iterator_ends_with_a_hint(alone: None) -> None:
    engine = make_engine(seeded(Stack), micro=3, training_data=data(1))
    batches = iter(engine.training_dataloader)
    engine.train_batch(batches)
    with pytest.raises(StopIteration, match=r"ended after 0 of a step's 4 micro batches; .*RepeatingLoader"):
        engine.train_batch(batches)
    engine.train_batch()
    assert engine.global_steps == 2


# --- RepeatingLoader ---------------------------------------------------------------------------------------


def test_any_loader_is_repeated() -> None:
    endless = uni3d.RepeatingLoader(DataLoader(TensorDataset(torch.arange(5)), batch_size=2))
    found = [batch[0].tolist() for batch in islice(endless, 4)]
    assert found == [[0, 1], [2, 3], [4], [0, 1]]
    assert next(endless)[0].tolist() == [2, 3], "on from there"
    assert [batch[0].tolist() for batch in islice(endless, 1)] == [[4]], "and on in a new `for`"


def test_a_loader_that_cant_be_repeated_is_refused() -> None:
    def once() -> Iterator[int]:
        yield 1

    for loader, batches in ((once(), 1), ([], 0)):
        endless = uni3d.RepeatingLoader(loader)
        assert len([next(endless) for _ in range(batches)]) == batches
        with pytest.raises(ValueError, match="has no batches, or iter\\(\\) doesn't begin it anew"):
            next(endless)


def test_a_repeated_loader_is_stale_after_a_load(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack), training_data=data(4))
    endless = uni3d.RepeatingLoader(engine.training_dataloader)
    engine.save_checkpoint(tmp_path)
    losses = [engine.train_batch(endless).item() for _ in range(5)]
    engine.load_checkpoint(tmp_path)
    with pytest.raises(RuntimeError, match="made before a checkpoint was loaded"):
        engine.train_batch(endless)
    assert [engine.train_batch(iter(endless)).item() for _ in range(5)] == losses, "which begins anew"


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).mean()


def test_validation_data_begins_anew_each_time(alone: None) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "parallel": {"device": "cpu"},
    }
    engine = uni3d.initialize(model=Sum(), config=config)[0]
    loader = engine.loader(torch.arange(6.0))  # type: ignore[arg-type]
    assert [len(batch) for batch in islice(uni3d.RepeatingLoader(loader), 7)] == [2] * 7
    endless = uni3d.RepeatingLoader(loader)
    batches = [batch for _ in range(3) for batch in islice(endless, 1)]
    assert sorted(torch.cat(batches).tolist()) == list(range(6)), "on from there, as of any other loader"
    for _ in range(2):
        losses = [engine.eval_batch(iter([batch])).item() for batch in loader]
        assert len(losses) == 3
        assert sum(losses) / 3 == pytest.approx(2.5), "each sample once"
