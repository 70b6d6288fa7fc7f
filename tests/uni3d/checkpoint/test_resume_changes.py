"""Resumes with other data, another seed or another schedule: an error that names how to accept it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from marks import matrix, slow
from models import Stack, global_batches, make_engine, micro_batches, seeded, train
from ranks import Ranks
from torch import Tensor
from torch.utils.data import Dataset

import ckpt
from uni3d.cli import app
from uni3d.config import load_config
from uni3d.manifest import EngineRecord, RunManifest
from uni3d.optim.schedule_classes import make_scheduler

WARMUP: dict[str, Any] = {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_type": "linear"}}
COSINE = {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 3, "total_num_steps": 20}}


class Numbered(Dataset[Any]):
    """Dataset that notes which samples were drawn."""

    def __init__(self, length: int) -> None:
        x, y = (torch.cat(parts) for parts in zip(*global_batches(10), strict=True))
        self.samples = [*zip(x, y, strict=True)][:length]
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.drawn.append(index)
        return self.samples[index]


def engine_of(length: int | None, *, zero: int = 0, accept: str | None = None, **config: Any) -> Any:
    """Return an engine that trains on so many samples, with its dataset."""
    data = None if length is None else Numbered(length)
    if accept is not None:
        config["checkpoint"] = {"accept_changes": [accept]}
    return make_engine(seeded(Stack), zero=zero, config=config, training_data=data), data


def saved(run: Path, length: int | None, steps: int = 2, **given: Any) -> Any:
    """Train and save; return the dataset."""
    engine, data = engine_of(length, **given)
    for _ in range(steps):
        if length is None:
            train(engine, global_batches(1))
        else:
            engine.train_batch()
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    return data


CHANGES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dataset": (
        "dataset",
        {"length": 60},
        {"length": 72},
        "training_data has 72 samples in this run, 60 in the checkpoint: samples of the current epoch would "
        "come twice or not at all; go on nevertheless by",
    ),
    "shorter": ("dataset", {"length": 60}, {"length": 30}, "training_data has 30 samples in this run, 60 in"),
    "script": (
        "dataset",
        {"length": None},
        {"length": 60},
        "training_data gives the samples in this run, but the script gave the checkpoint's: those",
    ),
    "drop_last": (
        "dataset",
        {"length": 55},
        {"length": 55, "dataloader_drop_last": True},
        "an epoch has 48 of the 55 samples in this run, 55 in the checkpoint, by dataloader_drop_last and",
    ),
    "drop_batch": (
        "dataset",
        {"length": 55, "dataloader_drop_last": True},
        {
            "length": 55,
            "dataloader_drop_last": True,
            "train_batch_size": 10,
            "train_micro_batch_size_per_gpu": 5,
        },
        "an epoch has 50 of the 55 samples in this run, 48 in the checkpoint, by dataloader_drop_last and",
    ),
    "seed": (
        "seed",
        {"length": 60, "seed": 1},
        {"length": 60, "seed": 2},
        "seed is 2 in this run, 1 in the checkpoint: samples of the current epoch would come twice or not",
    ),
    "warmup": (
        "scheduler",
        {"length": None, "scheduler": WARMUP},
        {"length": None, "scheduler": {**WARMUP, "params": {**WARMUP["params"], "warmup_num_steps": 9}}},
        "the scheduler's warmup_num_steps is 9 in this run, 6 in the checkpoint: the learning rate would",
    ),
    "schedule": (
        "scheduler",
        {"length": None, "scheduler": WARMUP},
        {"length": None, "scheduler": COSINE},
        "the scheduler is WarmupCosineLR in this run, WarmupLR in the checkpoint: the learning rate would",
    ),
}


def changes_case(folder: Path, zero: int, names: list[str]) -> dict[str, str]:
    """Return the error of each change; check that nothing else stops it, and that it can be accepted."""
    errors = {}
    for name in names:
        accept, before, now, _ = CHANGES[name]
        run = folder / name
        saved(run, zero=zero, **before)
        engine, _ = engine_of(zero=zero, **now)
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.resume(run)
        errors[name] = str(caught.value)
        assert engine.global_steps == 0
        with warnings.catch_warnings(action="ignore"):
            engine.load_checkpoint(run, load_module_only=True)
            if accept == "scheduler":
                engine.load_checkpoint(run, load_lr_scheduler_states=False)
        other, _ = engine_of(zero=zero, accept=accept, **now)
        if torch.distributed.get_rank() == 0:
            with pytest.warns(UserWarning, match="in this run, "):
                other.resume(run)
        else:
            other.resume(run)
        assert other.global_steps == 2
        other.train_batch(micro_batches(global_batches(1, other.train_batch_size()), other))
    return errors


@pytest.mark.parametrize(
    ("zero", "names"),
    [
        (0, [*CHANGES]),
        *(matrix(zero, ["dataset", "warmup"]) for zero in (1, 2)),
        slow(3, ["dataset", "warmup"]),
    ],
)
def test_a_change_is_an_error_that_says_how_to_accept_it(
    ranks: Ranks, tmp_path: Path, zero: int, names: list[str]
) -> None:
    one, other = ranks.run(2, changes_case, tmp_path, zero, names)
    assert one == other
    for name in names:
        accept, *_, expected = CHANGES[name]
        assert expected in one[name], name
        assert f'by the config\'s "checkpoint": {{"accept_changes": ["{accept}"]}}' in one[name]


def test_another_batch_size_in_the_middle_of_an_epoch(alone: None, tmp_path: Path) -> None:
    """Check that each sample of the epoch comes once, whatever the batches."""
    first = saved(tmp_path, 60, steps=3)  # of 12
    engine, data = engine_of(60, train_batch_size=4, train_micro_batch_size_per_gpu=2)
    with pytest.warns(UserWarning, match="the order of samples stays, and goes on at sample 36"):
        engine.resume(tmp_path)
    for _ in range(6):
        engine.train_batch()
    assert sorted([*first.drawn[:36], *data.drawn[:24]]) == list(range(60))


def test_a_run_that_has_not_begun_may_change(alone: None, tmp_path: Path) -> None:
    saved(tmp_path, 60, steps=0)
    engine, _ = engine_of(30)
    engine.resume(tmp_path)
    assert engine.global_steps == 0


def test_a_run_without_training_data_resumes_as_it_likes(alone: None, tmp_path: Path) -> None:
    """Check that a script with its own iterators, or one that only evaluates, isn't bothered."""
    saved(tmp_path, 60)
    engine, _ = engine_of(None)
    engine.resume(tmp_path)
    engine.eval_batch(micro_batches(global_batches(1), engine))
    other, _ = engine_of(None, seed=7)
    with pytest.warns(
        UserWarning, match="seed is 7 in this run, 42 in the checkpoint: dropout draws other mas"
    ):
        other.resume(tmp_path)


OLDER = "the order of samples is version 1 in this release, an older one in the checkpoint"


def without(document: Callable[[Any], Any], *keys: str) -> Callable[[Any], Any]:
    return lambda self: {name: value for name, value in document(self).items() if name not in keys}


def test_checkpoints_that_do_not_know(alone: None, tmp_path: Path) -> None:
    """Check that those of older releases load, with what is known about the order of their samples."""
    older = without(EngineRecord.document, "dataset_length", "sample_order")
    with (
        mock.patch.object(EngineRecord, "document", older),
        mock.patch.object(RunManifest, "document", without(RunManifest.document, "schedule")),
    ):
        saved(tmp_path, 60, seed=1, scheduler=WARMUP)
    engine, _ = engine_of(30, seed=2, scheduler=COSINE)
    seed = "seed is 2 in this run, 1 in the checkpoint: the order of samples changes, and dropout draws"
    with pytest.warns(UserWarning, match=f"{seed} other masks; {OLDER}: from here on"):
        engine.resume(tmp_path)
    assert engine.global_steps == 2


@pytest.mark.parametrize("version", [None, slow(2)])
def test_another_order_in_the_middle_of_an_epoch(
    alone: None, tmp_path: Path, version: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the order's version counts as the seed does; a checkpoint without one has an older order."""
    older, run = without(EngineRecord.document, "sample_order"), tmp_path / "run"
    recorded = {} if version is None else {"sample_order": version}
    with mock.patch.object(EngineRecord, "document", lambda self: older(self) | recorded):
        saved(run, 60)
    found = OLDER if version is None else OLDER.replace("an older one", str(version))
    engine, _ = engine_of(60)
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.resume(run)
    effect = "samples of the current epoch would come twice or not at all"
    assert f": {found}: {effect}; go on nevertheless by" in str(caught.value)
    assert str(caught.value).endswith('"checkpoint": {"accept_changes": ["seed"]}')
    with pytest.raises(ckpt.CheckpointError, match=f"seed is 2 .*; {found}: {effect}"):
        engine_of(60, seed=2)[0].resume(run)
    accepting, _ = engine_of(60, accept="seed")
    with pytest.warns(UserWarning, match=f"{found}: {effect}"):
        accepting.resume(run)
    assert accepting.global_steps == 2
    engine_of(None)[0].resume(run)
    (reason,) = doctor(run, {}, capsys)["reasons"]
    assert str(caught.value) == f"{run}/global_step2: {reason}"


def test_another_order_between_two_epochs(alone: None, tmp_path: Path) -> None:
    with mock.patch.object(EngineRecord, "document", without(EngineRecord.document, "sample_order")):
        saved(tmp_path / "done", 24)
        saved(tmp_path / "new", 24, steps=0)
        saved(tmp_path / "script", None)
    engine, _ = engine_of(24, seed=2)
    order = f"the order of samples changes, .*; {OLDER}: from here on, samples come in another order"
    with pytest.warns(UserWarning, match=f"seed is 2 in this run, 42 in the checkpoint: {order}"):
        engine.resume(tmp_path / "done")
    engine_of(24)[0].resume(tmp_path / "new")
    engine_of(None)[0].resume(tmp_path / "script")


@pytest.mark.parametrize("kind", ["warmup", "peak", "cycle"])
def test_an_accepted_schedule_is_this_run_s(alone: None, tmp_path: Path, kind: str) -> None:
    now = {
        "warmup": {**WARMUP, "params": {"warmup_num_steps": 9, "warmup_min_lr": 0.01}},
        "peak": {"type": "WarmupLR", "params": {"warmup_num_steps": 6, "warmup_max_lr": 0.5}},
        "cycle": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.3}},
    }[kind]
    before = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}
    saved(tmp_path, None, steps=4, scheduler=before if kind == "cycle" else WARMUP)
    engine, _ = engine_of(None, accept="scheduler", scheduler=now)
    with pytest.warns(UserWarning, match="this run's schedule goes on"):
        engine.resume(tmp_path)
    plain = torch.optim.AdamW(Stack().parameters(), lr=0.02)
    read = load_config({"train_batch_size": 1, "scheduler": now}).scheduler
    assert read is not None
    expected = make_scheduler(read, plain)
    for step in range(8):
        if step >= 4:
            assert engine.get_lr() == pytest.approx([group["lr"] for group in plain.param_groups])
            if kind == "cycle":
                assert engine.optimizer.param_groups[0]["betas"] == plain.param_groups[0]["betas"]
            train(engine, global_batches(1))
        plain.step()
        expected.step()


def test_the_rates_that_are_kept_have_their_own_warm_up(alone: None, tmp_path: Path) -> None:
    """Check that a schedule starts at `warmup_min_lr` of the checkpoint's base rate, not of this run's."""
    schedule = {"type": "WarmupLR", "params": {**WARMUP["params"], "warmup_min_lr": 0.01}}
    first, _ = engine_of(None, scheduler=schedule)
    train(first, global_batches(1))
    first.save_checkpoint(tmp_path)
    other, _ = engine_of(
        None, scheduler=schedule, optimizer={"type": "AdamW", "params": {"lr": 0.04, "eps": 0.01}}
    )
    with pytest.warns(UserWarning, match="base_lrs"):
        other.resume(tmp_path)
    for _ in range(3):
        train(first, global_batches(1))
        train(other, global_batches(1))
        assert other.get_lr() == pytest.approx(first.get_lr())


def doctor(run: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    path = run.parent / "config.json"
    path.write_text(json.dumps({"train_batch_size": 12, "optimizer": {"type": "AdamW"}, **config}))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        app(["doctor", str(run), "--world-size", "1", "--config", str(path), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def test_the_doctor_says_the_same(alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    saved(run, 60, scheduler=WARMUP)
    changed = {**WARMUP, "params": {**WARMUP["params"], "warmup_num_steps": 9}}
    seed, schedule = doctor(run, {"scheduler": changed, "seed": 2}, capsys)["reasons"][::-1]
    assert seed.startswith(
        "seed is 2 in the config, 42 in the checkpoint: samples of the current epoch would"
    )
    assert schedule.startswith(
        "the scheduler's warmup_num_steps is 9 in the config, 6 in the checkpoint: the"
    )
    accepted = {"checkpoint": {"accept_changes": ["seed", "scheduler"]}}
    report = doctor(run, {"scheduler": changed, "seed": 2, **accepted}, capsys)
    assert report["would_resume"]
    assert any(warning.startswith("seed is 2 in the config") for warning in report["warnings"])
    assert doctor(run, {"scheduler": WARMUP}, capsys)["would_resume"]


def lengths_case() -> str:
    with pytest.raises(ValueError, match="training_data has") as caught:
        engine_of(60 - 12 * torch.distributed.get_rank())
    return str(caught.value)


def test_ranks_with_data_of_different_lengths(ranks: Ranks) -> None:
    one, other = ranks.run(2, lengths_case)
    assert one == other
    assert one.startswith("training_data has 60 samples on rank 0, but 48 on rank 1; pass the whole dataset")
