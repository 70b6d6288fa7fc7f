"""One change in a checkpoint's documents under right checksums: each reader copes, or tells file and key.

No reader may show an error of Python's own, hang, or take weights that weren't saved.
"""

import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from budget import seeds
from commands import run as command
from figures import Campaign
from forged import forge
from torch import Tensor, nn

import ckpt
import uni3d
from uni3d import zero_to_fp32
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.manifest import RunManifest

TAG = "global_step2"
SECONDS = 20
"""Longest time of one reader; an honest one takes a twentieth of a second."""


class Net(nn.Module):
    """A model with a buffer, a tied weight and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.second(self.norm(self.first(x))))  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": 1, "tensor": torch.ones(2)}

    def set_extra_state(self, state: Any) -> None:
        pass


class Note:
    """An object with a state of the script's own."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"list": [1, 2.5, "word", None], "tensor": torch.arange(3)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Trainer:
    """A model with all that a checkpoint of it holds."""

    def __init__(self, run: Path) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.checkpoints = uni3d.Checkpointer(
            run,
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            objects={"note": Note()},
            async_save=False,
            durable=False,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.arange(20.0).reshape(5, 4)).square().mean().backward()
        self.optimizer.step()
        self.schedule.step()

    @property
    def weights(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run with two checkpoints, and the weights in the later."""
    run = tmp_path_factory.mktemp("forged") / "run"
    trainer = Trainer(run)
    for step in (1, 2):
        trainer.step()
        trainer.checkpoints.save(step, client_state={"epoch": step, "more": [1, {"x": None}]})
    return run, trainer.weights


def readers(run: Path, out: Path, weights: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield everything that reads a checkpoint, by name."""

    def opened() -> ckpt.Checkpoint:
        return ckpt.open_checkpoint(run, TAG)

    yield "read", lambda: [opened().read(*key) for key in opened().arrays]
    yield "verify", lambda: ckpt.verify(opened())
    yield "absent", lambda: ckpt.absent(opened())
    yield "manifest", lambda: RunManifest.of(opened())
    yield "export", lambda: ckpt.export_safetensors(opened(), out / "weights.safetensors")
    yield "weights", lambda: dict(StoredWeights(opened()))
    yield "recovery", lambda: uni3d.get_fp32_state_dict_from_zero_checkpoint(run, TAG)

    def script() -> None:
        with suppress(zero_to_fp32.UnreadableError, OSError):
            zero_to_fp32.convert(run / TAG, out / "script", safe_serialization=True)

    yield "script", script

    def load() -> None:
        trainer = Trainer(run)
        trainer.checkpoints.load(TAG)
        found = trainer.weights
        assert all(torch.equal(found[name], weights[name]) for name in weights), "other weights were loaded"
        with suppress(RuntimeError):  # a hyperparameter of the right kind, with which torch can't compute
            trainer.step()

    yield "load", load

    def save() -> None:
        trainer = Trainer(run)
        trainer.checkpoints.save(3)
        again = Trainer(run)
        again.step()
        again.checkpoints.load("global_step3")
        assert all(
            torch.equal(a, b) for a, b in zip(trainer.weights.values(), again.weights.values(), strict=True)
        )

    yield "save after it", save
    for words in (
        ["inspect", run],
        ["inspect", run, "--atoms", "--stats", "--tag", TAG],
        ["verify", run, "--tag", TAG],
        ["doctor", run, "--tag", TAG, "--world-size", "2"],
        ["diff", run / "global_step1", run / TAG],
        ["export", run, out / "dcp", "--format", "dcp", "--optimizer", "--tag", TAG],
        ["export", run, out / "torch.pt", "--format", "torch", "--tag", TAG],
    ):
        yield f"uni3d {words[0]}", lambda words=words: told(run, *words)  # type: ignore[misc]


def told(run: Path, *words: object) -> None:
    """Run a command; what it says of an error must name the file."""
    done = command(*words)
    text = done.stdout + done.stderr
    if done.returncode and str(run) not in text and "arrays differ" not in text:
        raise AssertionError(text[:500])


def late(*_: Any) -> None:
    raise TimeoutError(f"it took more than {SECONDS} s")


FAILED_ONCE = (18, 287)
"""Seeds that showed a fault, tried in each run."""


def test_each_reader_copes_or_tells(saved: tuple[Path, dict[str, Tensor]], memory_path: Path) -> None:
    run, weights = saved
    place, chosen = memory_path / "forged", [*FAILED_ONCE, *seeds(sample=4, everything=300)]
    by_name = [name for name, _ in readers(run, place, weights)]
    campaign = Campaign("change in a document, each reader", len(chosen) * len(by_name))
    old = signal.signal(signal.SIGALRM, late)
    try:
        for seed in chosen:
            for name in by_name:
                shutil.copytree(run, place / "run")
                change = forge(place / "run" / TAG, Random(seed))
                why = failure(dict(readers(place / "run", place, weights))[name], str(place / "run"))
                kind = "wrong" if why and "other weights" in why else "other"
                campaign.point(seed, f"{name}, {change}", [(kind, why)] if why else [])
                shutil.rmtree(place)
    finally:
        signal.signal(signal.SIGALRM, old)
    campaign.end()


def failure(read: Callable[[], Any], folder: str) -> str | None:
    """Return what is wrong with how a reader ended, or None."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            read()
    except ckpt.CheckpointError as error:
        return None if folder in str(error) else f"it names no file: {error}"
    except Exception as error:
        return f"{error!r:.500}"
    finally:
        signal.alarm(0)
    return None
