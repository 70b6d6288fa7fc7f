"""Readers in a process that is saving: they see what was saved last, or raise the save's error."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from marks import matrix, slow
from models import OwnLoss, Stack, global_batches, make_engine, seeded, train, whole
from ranks import Ranks

import ckpt
import uni3d
from uni3d.checkpoint.save import Saver


@contextmanager
def slow_saves() -> Iterator[None]:
    """Make each background save take longer than any reader would."""
    write = Saver._write

    def slow(self: Saver, *args: Any) -> Any:
        time.sleep(0.5)
        return write(self, *args)

    with mock.patch.object(Saver, "_write", slow):
        yield


def command(*words: str) -> str:
    """Run `uni3d` in this process; return its output."""
    from uni3d.cli import app

    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        app(list(words))
    return out.getvalue()


def fp32(run: Path) -> Any:
    return uni3d.get_fp32_state_dict_from_zero_checkpoint(run)["out.weight"]


def converted(run: Path) -> Any:
    uni3d.convert_zero_checkpoint_to_fp32_state_dict(run, run.parent / "out")
    return torch.load(run.parent / "out" / "pytorch_model.bin", weights_only=True)["out.weight"]


def filled(run: Path) -> Any:
    return uni3d.load_state_dict_from_zero_checkpoint(OwnLoss(), run).get_parameter("out.weight")


def resumed(run: Path) -> Any:
    other = make_engine(seeded(OwnLoss))
    other.resume(run)
    return whole(other.module)["out.weight"]


NEWEST = "global_step2"
WEIGHTS: list[Callable[[Path], Any]] = [fp32, converted, filled, resumed]
OTHERS: dict[str, Callable[[Path], Any]] = {
    "latest": ckpt.read_latest,
    "tags": lambda run: ckpt.committed_tags(run)[-1],
    "open": lambda run: ckpt.open_checkpoint(run).tag,
    "doctor": lambda run: NEWEST if NEWEST in command("doctor", str(run), "--world-size", "1") else "older",
    "inspect": lambda run: NEWEST if NEWEST in command("inspect", str(run)) else "older",
}


def saved_twice(run: Path, zero: int) -> Any:
    """Train and save two steps; return the engine, whose second save goes on."""
    engine = make_engine(seeded(OwnLoss), zero=zero)
    for batch in global_batches(2):
        train(engine, [batch])
        engine.save_checkpoint(run)
    return engine


@pytest.mark.parametrize("zero", [matrix(0), matrix(1), matrix(2), slow(3)])
def test_weights_read_right_after_a_save(alone: None, tmp_path: Path, zero: int) -> None:
    with slow_saves():
        for i, reader in enumerate(WEIGHTS):
            engine = saved_twice(tmp_path / str(i) / "run", zero)
            found = reader(tmp_path / str(i) / "run")
            assert torch.equal(found, whole(engine.module)["out.weight"]), reader.__name__
            engine.wait_for_checkpoint()


@pytest.mark.parametrize("reader", ["latest", "tags", slow("open"), slow("doctor"), slow("inspect")])
def test_what_is_listed_right_after_a_save(alone: None, tmp_path: Path, reader: str) -> None:
    with slow_saves():
        saved_twice(tmp_path, 0)
        assert OTHERS[reader](tmp_path) == NEWEST


def failing_case(run: Path) -> Any:
    """Return what readers say after a save that failed and that nobody has waited for."""
    engine = make_engine(seeded(OwnLoss), zero=1)
    train(engine, global_batches(1))
    engine.save_checkpoint(run)
    engine.wait_for_checkpoint()
    with mock.patch("ckpt.write.Writer._write", side_effect=OSError(28, "No space left on device")):
        train(engine, global_batches(1))
        engine.save_checkpoint(run)
        errors = []
        for reader in (fp32, resumed, ckpt.read_latest):
            with pytest.raises(ckpt.CheckpointError) as caught:
                reader(run / ".." / run.name)
            errors.append(str(caught.value))
    older = uni3d.get_fp32_state_dict_from_zero_checkpoint(run, "global_step1")
    make_engine(seeded(OwnLoss), zero=1).load_checkpoint(run, tag="global_step1")
    with pytest.raises(ckpt.CheckpointError, match="No space left"):
        engine.wait_for_checkpoint()
    assert ckpt.read_latest(run) == "global_step1", "the owner has been told"
    return errors, sorted(older)


@pytest.mark.slow
def test_after_a_failed_save_nobody_reads_an_older_one_by_mistake(ranks: Ranks, tmp_path: Path) -> None:
    for errors, _ in ranks.run(2, failing_case, tmp_path):
        for error in errors:
            assert "the last save into" in error
            assert "No space left on device" in error
            assert "name the tag of an older checkpoint" in error


# --- two engines, one folder -----------------------------------------------------------------------------


def two_engines_case(run: Path, zero: int) -> list[str]:
    """Return the errors of a second engine that saves under a tag of the first."""
    first = make_engine(seeded(Stack), zero=zero)
    train(first, global_batches(1))
    first.save_checkpoint(run)
    first.wait_for_checkpoint()
    other = make_engine(seeded(Stack), zero=zero)
    train(other, global_batches(1))
    errors = []
    for tag in (None, "global_step1"):
        with pytest.raises(ckpt.CheckpointError) as caught:
            other.save_checkpoint(run, tag)
        errors.append(str(caught.value))
    other.save_checkpoint(run, "of-the-other")
    other.wait_for_checkpoint()
    ids = [ckpt.open_checkpoint(run, tag).manifest["run_id"] for tag in ("global_step1", "of-the-other")]
    assert len(set(ids)) == 2
    first.save_checkpoint(run)  # its own tag again
    first.wait_for_checkpoint()
    other.load_checkpoint(run, "global_step1", load_module_only=True)
    with pytest.raises(ckpt.CheckpointError, match="was saved by another run"):
        other.save_checkpoint(run)
    other.load_checkpoint(run, "global_step1")
    other.save_checkpoint(run)  # a run that goes on from it is that run
    other.wait_for_checkpoint()
    assert ckpt.open_checkpoint(run, "global_step1").manifest["run_id"] == ids[0]
    return [*errors, ids[0]]


@pytest.mark.parametrize("zero", [0, 3])
def test_a_tag_of_another_run_is_not_replaced(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    one, other = ranks.run(2, two_engines_case, tmp_path, zero)
    assert one == other
    for error in one[:2]:
        assert error.startswith(f"{tmp_path}/global_step1 was saved by another run ({one[2]}; this one is ")


def test_the_write_itself_refuses_too(alone: None, tmp_path: Path) -> None:
    """Check the refusal of a tag that another run commits between a save's call and its commit."""
    first, other = make_engine(seeded(Stack)), make_engine(seeded(Stack))
    with mock.patch.object(Saver, "_place", lambda self, run, tag: (run, tag)):
        first.save_checkpoint(tmp_path, "t")
        other.save_checkpoint(tmp_path, "t")
        with pytest.raises(ckpt.CheckpointError, match="was saved by another run"):
            other.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path, "t").manifest["run_id"] == first._progress.run_id


def test_a_checkpoint_that_names_no_run_may_be_replaced(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack))
    engine._progress.run_id = None  # type: ignore[assignment]
    engine.save_checkpoint(tmp_path, "t")
    engine.wait_for_checkpoint()
    assert "run_id" not in ckpt.open_checkpoint(tmp_path, "t").manifest
    other = make_engine(seeded(Stack))
    other.load_checkpoint(tmp_path, "t")
    other.save_checkpoint(tmp_path, "t")
    other.wait_for_checkpoint()
    assert ckpt.open_checkpoint(tmp_path, "t").manifest["run_id"] == other._progress.run_id


def test_retention_leaves_the_checkpoints_of_other_runs(alone: None, tmp_path: Path) -> None:
    config = {"checkpoint": {"keep_last": 1}}
    engines = {"a": make_engine(seeded(Stack), config=config), "b": make_engine(seeded(Stack), config=config)}
    for i in range(2):
        for name, engine in engines.items():
            engine.save_checkpoint(tmp_path, f"{name}{i}")
            engine.wait_for_checkpoint()
    assert ckpt.committed_tags(tmp_path) == ["a1", "b1"]
