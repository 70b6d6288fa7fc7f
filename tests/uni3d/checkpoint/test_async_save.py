"""Asynchronous saves: the training they delay, the values they write, and their errors."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from marks import matrix
from models import OwnLoss, Stack, global_batches, make_engine, save_and_wait, seeded, train, whole
from ranks import Ranks

import ckpt
from uni3d.checkpoint import background
from uni3d.checkpoint.background import Snapshot
from uni3d.checkpoint.save import Saver

REPOSITORY = Path(__file__).resolve().parents[3]


@contextmanager
def held_up() -> Iterator[threading.Event]:
    """Block background saves until the event is set."""
    go, write = threading.Event(), Saver._write

    def slow(self: Saver, *args: Any) -> Any:
        assert go.wait(60)
        return write(self, *args)

    with mock.patch.object(Saver, "_write", slow):
        yield go
        go.set()


@contextmanager
def full_disk(on: bool) -> Iterator[None]:
    """Make writes of chunks fail on the ranks where it is `on`."""
    from ckpt.write import Writer

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with mock.patch.object(Writer, "_write", fail) if on else nullcontext():
        yield


def overlap_case(run: str, zero: int) -> Any:
    """Train on while a save is blocked; it must write the values from before."""
    engine = make_engine(seeded(OwnLoss), zero=zero)
    batches = global_batches(6)
    train(engine, batches[:2])
    early = whole(engine.module)
    with held_up() as go:
        engine.save_checkpoint(run, client_state={"at": 2})
        nothing_yet = [*Path(run).glob("[!.]*")]  # `ckpt` would wait for the save
        losses = train(engine, batches[2:])
        late = whole(engine.module)
        go.set()
        engine.wait_for_checkpoint()
    resumed = make_engine(seeded(OwnLoss), zero=zero)
    assert resumed.resume(run) == {"at": 2}
    assert resumed.global_steps == 2
    loaded = whole(resumed.module)
    return nothing_yet, early, late, loaded, losses, train(resumed, batches[2:]), engine.last_save.tag


@pytest.mark.parametrize("zero", [0, 3], ids="zero{}".format)
def test_what_is_saved_is_what_was_there_when_asked_for(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    for nothing_yet, early, late, loaded, losses, again, tag in ranks.run(
        2, overlap_case, str(tmp_path), zero
    ):
        assert nothing_yet == []
        assert tag == "global_step2"
        assert any(not torch.equal(early[n], late[n]) for n in early)
        assert all(torch.equal(early[n], loaded[n]) for n in early)
        assert again == losses, "the same steps, bit for bit"


def failing_case(run: str) -> Any:
    """Train around a save that fails on rank 1 only."""
    engine = make_engine(seeded(Stack), zero=1)
    batches = global_batches(8)
    losses, errors = train(engine, batches[:1]), []
    with full_disk(dist.get_rank() == 1):
        engine.save_checkpoint(run)
        for i in range(1, 8):
            while True:
                try:
                    losses += train(engine, batches[i : i + 1])
                    break
                except ckpt.CheckpointError as error:
                    errors.append((str(error), type(error).__name__))
            if i == 1:  # give the thread its time; the ranks learn of it in the step after
                engine._saver._background._thread.join()
    save_and_wait(engine, run, tag="next")
    return losses, errors, whole(engine.module)


def test_an_error_is_raised_on_all_ranks_and_training_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(2, uninterrupted_case)
    for (losses, errors, tensors), (plain, plain_tensors) in zip(
        ranks.run(2, failing_case, str(tmp_path)), expected, strict=True
    ):
        assert errors == [("OSError: [Errno 28] No space left on device (rank 1)", "CheckpointError")]
        assert losses == plain
        assert all(torch.equal(tensors[n], plain_tensors[n]) for n in plain_tensors)
    assert ckpt.committed_tags(tmp_path) == ["next"]
    assert not [*tmp_path.glob(".saving*")]


def uninterrupted_case() -> Any:
    engine = make_engine(seeded(Stack), zero=1)
    return train(engine, global_batches(8)), whole(engine.module)


def waiting_case(run: str, how: str) -> Any:
    """Return the error of a failed save from the first call that raises it."""
    engine = make_engine(seeded(Stack))
    calls = {
        "wait": engine.wait_for_checkpoint,
        "save": lambda: engine.save_checkpoint(run, tag="other"),
        "load": lambda: engine.load_checkpoint(run),
        "resume": lambda: engine.resume(run),
    }
    with full_disk(dist.get_rank() == 0):
        engine.save_checkpoint(run)
        with pytest.raises(ckpt.CheckpointError, match="No space left on device") as caught:
            calls[how]()
    engine.wait_for_checkpoint()  # it is raised once
    return str(caught.value)


@pytest.mark.parametrize("how", ["wait", "save", "load", "resume"])
def test_every_call_that_needs_the_save_done_raises_its_error(ranks: Ranks, tmp_path: Path, how: str) -> None:
    first, second = ranks.run(2, waiting_case, str(tmp_path), how)
    assert first == second


def test_the_second_save_allocates_nothing(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss))
    train(engine, global_batches(1))
    places = []
    for i in range(3):
        save_and_wait(engine, tmp_path, tag=f"t{i}")
        places.append([copy.data_ptr() for copy in engine._saver._snapshot._copies])
    assert places[0] == places[1] == places[2]


def test_a_copy_of_a_parameter_has_no_graph() -> None:
    """A graph would grow with each save."""
    snapshot = Snapshot(torch.device("cpu"))
    (copy,) = snapshot.take([torch.nn.Parameter(torch.ones(3))])
    assert not copy.requires_grad


def test_memory_comes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PIECE", 1024)
    tensors = [torch.full((n,), float(n)) for n in (128, 100, 32, 1, 1000, 8)]
    snapshot = Snapshot(torch.device("cpu"))
    copies = snapshot.take(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    sizes: dict[int, list[int]] = {}
    for copy in copies:
        sizes.setdefault(copy.untyped_storage().data_ptr(), []).append(len(copy))
    assert [*sizes.values()] == [[128, 100], [32, 1], [1000], [8]]


def test_tensors_that_were_replaced_between_saves(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss))
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path, tag="before")
    engine.model.zero.reshard()  # the optimizer has the sharded parameters
    parameter = engine.module.get_parameter("out.weight")
    state = engine.optimizer.state[parameter]
    state["exp_avg"] = state["exp_avg"] + 1
    engine.module.calls = torch.tensor(7)
    engine.module.register_buffer("late", torch.arange(3))
    save_and_wait(engine, tmp_path, tag="after")
    checkpoint = ckpt.open_checkpoint(tmp_path)
    expected = state["exp_avg"].full_tensor().numpy()
    assert (checkpoint.read("out.weight", "exp_avg") == expected).all()
    assert checkpoint.read("calls", "value") == 7
    assert checkpoint.read("late", "value").tolist() == [0, 1, 2]


def test_frozen_parameters_are_linked_and_outlive_the_old_tag(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss), config={"checkpoint": {"keep_last": 1}})
    frozen, trained = "atoms/fixed.weight/fp32/c.0.0", "atoms/encode.weight/fp32/c.0.0"
    inodes = []
    for batch in global_batches(2):
        train(engine, [batch])
        save_and_wait(engine, tmp_path)
        folder = tmp_path / f"global_step{engine.global_steps}"
        inodes.append([(folder / path).stat().st_ino for path in (frozen, trained)])
    assert inodes[0][0] == inodes[1][0]
    assert inodes[0][1] != inodes[1][1]
    fixed = whole(engine.module)["fixed.weight"].numpy()
    assert engine.last_save.bytes_linked >= fixed.nbytes
    assert ckpt.committed_tags(tmp_path) == ["global_step2"]
    assert (ckpt.open_checkpoint(tmp_path).read("fixed.weight") == fixed).all()


class Listing(torch.optim.lr_scheduler.LambdaLR):
    """Scheduler with a growing list of its rates in its state."""

    def __init__(self, optimizer: Any) -> None:
        self.given: list[float] = []
        super().__init__(optimizer, lambda epoch: 1.0)

    def step(self, epoch: Any = None) -> None:
        super().step()
        self.given.append(self.get_last_lr()[0])


def test_what_the_script_changes_while_it_is_written(alone: None, tmp_path: Path, monkeypatch: Any) -> None:
    engine = make_engine(seeded(OwnLoss), lr_scheduler=Listing)
    batches = global_batches(4)
    train(engine, batches[:2])
    monkeypatch.chdir(tmp_path)
    client_state = {"seen": [1]}
    with held_up() as go:
        engine.save_checkpoint("run", client_state=client_state)
        client_state["seen"].append(2)
        engine.optimizer.param_groups[0]["lr"] = 9.0
        train(engine, batches[2:])
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        go.set()
        engine.wait_for_checkpoint()
    manifest = ckpt.open_checkpoint(tmp_path / "run").manifest
    assert manifest["client_state"] == {"seen": [1]}
    assert len(manifest["scheduler"]["given"]) == len(engine.lr_scheduler.given) - 2
    assert manifest["optimizer"]["groups"][0]["lr"] == 0.02
    assert manifest["step"] == 2


def test_a_run_in_a_store_that_is_no_folder(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    batches = global_batches(4)
    train(engine, batches[:2])
    engine.save_checkpoint("memory://a-run-of-this-test", client_state={"at": 2})
    losses = train(engine, batches[2:])
    resumed = make_engine(seeded(OwnLoss))
    assert resumed.resume("memory://a-run-of-this-test") == {"at": 2}
    assert train(resumed, batches[2:]) == losses
    folder, _ = resumed.load_checkpoint("memory://a-run-of-this-test", tag="global_step2")
    assert folder == "memory://a-run-of-this-test/global_step2"


def test_synchronous_when_asked(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss), config={"checkpoint": {"async_save": False, "durable": False}})
    train(engine, global_batches(1))
    with mock.patch("ckpt.stores.files.sync_tree") as sync:
        engine.save_checkpoint(tmp_path)
        assert ckpt.read_latest(tmp_path) == "global_step1"
    assert not sync.called


def test_retention_of_the_config(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss), config={"checkpoint": {"keep_last": 2, "keep_every": 3}})
    for batch in global_batches(7):
        train(engine, [batch])
        engine.save_checkpoint(tmp_path)
    engine.wait_for_checkpoint()
    assert ckpt.committed_tags(tmp_path) == [f"global_step{n}" for n in (3, 6, 7)]
    assert engine.last_save.pruned == ("global_step5",)


SCRIPT = """
import sys, torch
sys.path[:0] = {paths!r}
from unittest import mock
from models import OwnLoss, global_batches, make_engine, seeded, train

torch.manual_seed(0)
engine = make_engine(seeded(OwnLoss))
train(engine, global_batches(2))
if {fail}:
    from ckpt.write import Writer
    mock.patch.object(Writer, "_write", side_effect=OSError(28, "No space left on device")).start()
import time, ckpt
save = ckpt.save
ckpt.save = lambda *a, **k: (time.sleep(1.5), save(*a, **k))[1]  # the script ends long before the save does
engine.save_checkpoint({run!r})
torch.distributed.destroy_process_group()
print("end of the script", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fail", [matrix(False), True], ids=["whole", "failing"])
def test_the_process_ends_only_when_the_save_has(tmp_path: Path, fail: bool) -> None:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]
    script = SCRIPT.format(paths=paths, fail=fail, run=str(tmp_path / "run"))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment
    )
    assert "end of the script" in done.stdout, done.stderr
    if fail:
        assert done.returncode == 1
        assert (
            "uni3d's last save_checkpoint failed: OSError: [Errno 28] No space left on device" in done.stderr
        )
        assert ckpt.committed_tags(tmp_path / "run") == []
    else:
        assert done.returncode == 0, done.stderr
        assert ckpt.read_latest(tmp_path / "run") == "global_step2"
