"""Training data from the script's own loader or stream: used as it is, and resumed where that can be."""

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from models import WIDTH, OwnLoss, Stack, make_engine, seeded
from ranks import Ranks
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import ckpt
import uni3d
from uni3d.engine.given_loader import GivenLoader

N = 24


def samples(n: int = N) -> TensorDataset:
    x = torch.arange(float(n)).unsqueeze(1).expand(n, WIDTH).contiguous()
    return TensorDataset(x, x[:, :1] / n)


def place() -> tuple[int, int]:
    """Return this rank's number and the number of ranks, all of them data-parallel."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Stream(IterableDataset[Any]):
    """Endless or finite samples of a data-parallel rank, without a state."""

    def __init__(self, n: int | None = N, part: tuple[int, int] | None = None) -> None:
        self.n, self.part = n, part

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = self.part or place()
        for i in range(rank, self.n or 10**9, size):
            yield torch.full((WIDTH,), float(i)), torch.full((1,), i / N)


class StatefulStream(Stream):
    """Stream that knows where it stands; its order is another in each epoch."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.epoch, self.taken, self.noise = 0, 0, torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self.taken, "buffers": [{"noise": self.noise}, None]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.taken, self.noise = state["epoch"], state["taken"], state["buffers"][0]["noise"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, size = self.part or place()
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(self.n or N, generator=generator).tolist()[rank::size]
        for i in order[self.taken :]:
            self.taken += 1
            self.noise = self.noise + i
            yield torch.full((WIDTH,), float(i)), self.noise[:1] / 100
        self.epoch, self.taken = self.epoch + 1, 0


class StatefulLoader:
    """Loader with the protocol of torchdata's, over tensors of an order of its own."""

    def __init__(self, micro: int = 3) -> None:
        self.stream, self.micro = StatefulStream(), micro

    def __iter__(self) -> Iterator[Any]:
        return iter(DataLoader(self.stream, batch_size=self.micro, drop_last=True))

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def distributed(shuffle: bool = True, **given: Any) -> DataLoader[Any]:
    rank, size = place()
    sampler = DistributedSampler(samples(), size, rank, shuffle=shuffle)  # type: ignore[var-annotated]
    return DataLoader(samples(), batch_size=3, sampler=sampler, **given)


def sequential() -> DataLoader[Any]:
    return DataLoader(samples(), batch_size=3)


KINDS: dict[str, Any] = {
    "stateful stream": StatefulStream,
    "stateful loader": StatefulLoader,
    "distributed sampler": distributed,
    "sequential": sequential,
}


def engine_with(data: Any, *, model: Any = Stack, **given: Any) -> uni3d.Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make_engine(seeded(model), training_data=data, **given)


def resume_case(kind: str, run: str, steps: list[int]) -> list[float]:
    """Train so many steps in each of several runs of one training; return the losses."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    losses: list[float] = []
    for count in steps:
        engine = engine_with(KINDS[kind]())
        engine.resume(run)
        losses += [engine.train_batch().item() for _ in range(count)]
        engine.save_checkpoint(run)
        engine.wait_for_checkpoint()
    return losses


@pytest.mark.parametrize(
    ("kind", "world"),
    [(k, w) if w == 2 else slow(k, w) for k in KINDS for w in (1, 2) if (k, w) != ("sequential", 2)],
)
def test_a_resume_goes_on_where_the_loader_stood(ranks: Ranks, tmp_path: Path, kind: str, world: int) -> None:
    """Resume in the middle of an epoch, at its end, and in a later one: an epoch has 2 steps."""
    expected = ranks.run(world, resume_case, kind, str(tmp_path / "whole"), [7])
    found = ranks.run(world, resume_case, kind, str(tmp_path / "parts"), [1, 1, 3, 2])
    assert found == expected
    assert len({*expected[0]}) > 5


def epochs_case(kind: str, run: str) -> list[list[list[int]]]:
    """Loop over epochs as scripts do, resuming in the middle of the second; return the samples."""
    found: list[list[list[int]]] = []

    def epoch(engine: uni3d.Engine, stop: int | None = None) -> None:
        found.append([])
        for x, y in islice(iter(engine.training_dataloader), stop):
            engine.backward(torch.nn.functional.mse_loss(engine(x), y))
            engine.step()
            found[-1].append(x[:, 0].int().tolist())

    engine = engine_with(KINDS[kind]())
    epoch(engine)
    epoch(engine, engine.gradient_accumulation_steps())
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    stale = iter(engine.training_dataloader)
    engine = engine_with(KINDS[kind]())
    engine.load_checkpoint(run)
    epoch(engine)
    epoch(engine)
    stale = iter(engine.training_dataloader)
    engine.load_checkpoint(run)
    with pytest.raises(RuntimeError, match="made before a checkpoint was loaded"):
        next(stale)
    epoch(engine)
    return found


@pytest.mark.parametrize("kind", ["stateful stream", "distributed sampler"])
@pytest.mark.parametrize("world", [1, slow(2)])
def test_epochs_of_a_loader(ranks: Ranks, tmp_path: Path, kind: str, world: int) -> None:
    for first, part, rest, third, again in ranks.run(world, epochs_case, kind, str(tmp_path)):
        assert again == rest
        every = [
            sorted(sample for batch in epoch for sample in batch) for epoch in (first, part + rest, third)
        ]
        assert every[0] == every[1] == every[2] or world > 1
        assert len(set(every[1])) == N // world, "each sample once"
        assert first != part + rest != third, "in another order"


def resized_case(kind: str, run: str) -> list[str]:
    """Resume on this number of ranks; return the refusal and the warning."""
    engine = engine_with(KINDS[kind]())
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.load_checkpoint(run)
    assert engine.global_steps == 0
    engine = engine_with(KINDS[kind](), config={"checkpoint": {"accept_changes": ["dataset"]}})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        engine.load_checkpoint(run)
    first = engine.train_batch().item()
    return [str(caught.value), *(str(w.message) for w in told), str(first)]


@pytest.mark.parametrize("kind", ["stateful stream", "distributed sampler"])
def test_another_number_of_ranks_is_an_error_unless_accepted(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    ranks.run(2, resume_case, kind, str(tmp_path), [1])
    refusal, warning, _ = ranks.run(1, resized_case, kind, str(tmp_path))[0]
    name = "StatefulStream" if kind == "stateful stream" else "DataLoader"
    expected = (
        f"training_data ({name}) has the states of 2 data-parallel ranks in the checkpoint, but this run has "
        "1 of these ranks: it would begin anew, and samples of its current epoch would come twice or not "
        "at all"
    )
    assert expected in refusal
    assert '{"accept_changes": ["dataset"]}' in refusal
    assert expected in warning


# --- without a state ---------------------------------------------------------------------------------------


def test_data_without_a_state_begins_anew_with_a_warning(alone: None, tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=3, sampler=RandomSampler(samples()))

    for name, data in (("Stream", lambda: Stream(None, (0, 1))), ("DataLoader", loader)):
        engine = engine_with(data())
        first = engine.train_batch().item()
        engine.save_checkpoint(tmp_path / name)
        engine = engine_with(data())
        with pytest.warns(UserWarning, match=f"training_data begins anew: {name} has no state_dict") as told:
            engine.resume(tmp_path / name)
        assert len(told) == 1
        assert engine.global_steps == 1
        assert engine.train_batch().item() != first, "of other weights"


def test_a_stream_that_is_over_begins_again(alone: None) -> None:
    engine = engine_with(Stream(N, (0, 1)))
    assert isinstance(engine.training_dataloader, GivenLoader)
    with pytest.raises(TypeError):
        len(engine.training_dataloader)
    losses = [engine.train_batch().item() for _ in range(4)]
    other = make_engine(seeded(Stack))
    endless = uni3d.RepeatingLoader(DataLoader(samples(), batch_size=3))
    assert [other.train_batch(endless).item() for _ in range(4)] == pytest.approx(losses)
    third = engine_with(Stream(N, (0, 1)))
    endless = uni3d.RepeatingLoader(third.training_dataloader)  # type: ignore[arg-type]
    assert [third.train_batch(endless).item() for _ in range(4)] == losses


def test_a_short_batch_is_an_error_where_it_would_count_as_a_whole_one(alone: None) -> None:
    engine = engine_with(Stream(14, (0, 1)), model=OwnLoss)
    engine.train_batch()
    with pytest.raises(ValueError, match=r"micro batches of \[2, 3, 3, 3\] samples; expected"):
        engine.train_batch()
    engine = engine_with(Stream(14, (0, 1)), model=OwnLoss, config={"dataloader_drop_last": True})
    for _ in range(3):
        engine.train_batch()


# --- refusals ----------------------------------------------------------------------------------------------


def refused(data: Any, **given: Any) -> str:
    with pytest.raises(ValueError, match="training_data") as caught:
        make_engine(seeded(Stack), training_data=data, **given)
    return str(caught.value)


class Unsaved(StatefulStream):
    def state_dict(self) -> dict[str, Any]:
        return {"place": {1: 2}, "file": object()}


def test_what_does_not_fit_is_refused(alone: None, tmp_path: Path) -> None:
    size = "training_data is a DataLoader of 4 samples a batch, but train_micro_batch_size_per_gpu is 3"
    assert refused(DataLoader(samples(), batch_size=4)).startswith(size)
    sampler = BatchSampler(RandomSampler(samples()), 4, drop_last=True)
    assert refused(DataLoader(samples(), batch_sampler=sampler)).startswith(size)
    assert "give collate_fn to it" in refused(sequential(), collate_fn=len)
    workers = refused(StatefulStream(part=(0, 1)), config={"num_local_io_workers": 1})
    assert "with a state, which num_local_io_workers(1) would keep to themselves" in workers
    model = seeded(Stack)
    with pytest.raises(ValueError, match=r"the data has 11 samples, fewer than train_batch_size\(12\), so"):
        make_engine(model, training_data=samples(11), config={"dataloader_drop_last": True})
    make_engine(model, training_data=samples(11))  # nothing was done to the model
    with pytest.raises(ValueError, match="the training data has no samples"):
        engine_with(samples(0))
    assert "has no batches" in refused_step(Stream(1, (1, 2)))
    engine = engine_with(Unsaved(part=(0, 1)))
    engine.train_batch()
    with pytest.raises(ckpt.CheckpointError, match=r"training_data \(Unsaved\): state/loader"):
        engine.save_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def refused_step(data: Any) -> str:
    engine = engine_with(data)
    with pytest.raises(ValueError, match="training_data") as caught:
        engine.train_batch()
    return str(caught.value)


def parts_case() -> list[str]:
    rank, _ = place()
    wrong = [
        sequential(),
        DataLoader(samples(), batch_size=3, shuffle=True),
        DataLoader(samples(), batch_size=3, sampler=DistributedSampler(samples(), 2, 0)),
        samples() if rank else Stream(),
    ]
    return [refused(data) for data in wrong]


def test_ranks_must_have_their_own_parts(ranks: Ranks) -> None:
    one, other = ranks.run(2, parts_case)
    assert one == other
    assert one[0].startswith(
        "training_data's SequentialSampler would give each of the 2 data-parallel ranks all"
    )
    assert one[1].startswith("training_data's RandomSampler would give each of the 2 data-parallel ranks all")
    assert one[2].startswith(
        "training_data's DistributedSampler is number 0 of 2, but this rank is number 1 of 2"
    )
    assert one[2].endswith("(rank 1)")
    assert one[3].startswith("training_data has 0 samples on rank 0, but 24 on rank 1")


def pipeline_case(run: str, differ: bool) -> str:
    part = (place()[0] if differ else 0, 2 if differ else 1)
    engine = engine_with(StatefulStream(part=part), pp=2)
    losses = [engine.train_batch().item() for _ in range(3)]
    try:
        engine.save_checkpoint(run)
        engine.wait_for_checkpoint()
    except ckpt.CheckpointError as error:
        return str(error)
    other = engine_with(StatefulStream(part=part), pp=2)
    other.load_checkpoint(run)
    assert other.train_batch().item() == engine.train_batch().item()
    return str(losses)


def test_stages_of_a_pipeline_have_one_state(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks.run(2, pipeline_case, str(tmp_path / "same"), False)
    assert one == other
    one, other = ranks.run(2, pipeline_case, str(tmp_path / "differ"), True)
    assert one == other
    assert "stands elsewhere on rank 1 than on rank 0, but both have the data-parallel index 0" in one


# --- torchdata ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_torchdatas_loader(alone: None, tmp_path: Path, workers: int) -> None:
    library = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        with warnings.catch_warnings(action="ignore"):  # it uses functions that torch deprecates
            return library.StatefulDataLoader(samples(), batch_size=3, shuffle=True, num_workers=workers)

    torch.manual_seed(0)
    engine = engine_with(loader())
    engine.train_batch()
    engine.save_checkpoint(tmp_path)
    rest = [x[:, 0].tolist() for x, _ in islice(engine.training_dataloader.all_epochs(), 4)]
    engine = engine_with(loader())
    engine.load_checkpoint(tmp_path)
    assert [x[:, 0].tolist() for x, _ in islice(engine.training_dataloader.all_epochs(), 4)] == rest
