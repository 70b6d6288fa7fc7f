"""Mistakes that would silently go wrong later are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stack, global_batches, make_engine, micro_batches, save_and_wait, seeded
from ranks import Ranks
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR

import ckpt


def test_a_scheduler_of_another_optimizer(alone: None) -> None:
    stray = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="over another optimizer"):
        make_engine(seeded(Stack), lr_scheduler=StepLR(stray, 1))


def test_a_scheduler_that_cannot_be_saved(alone: None) -> None:
    with pytest.raises(ValueError, match=r"MultiStepLR can't be saved: its state\['milestones'\]"):
        make_engine(seeded(Stack), lr_scheduler=lambda optimizer: MultiStepLR(optimizer, [2]))


def test_another_scheduler_than_was_saved(alone: None, tmp_path: Path) -> None:
    make_engine(seeded(Stack), lr_scheduler=lambda o: CosineAnnealingLR(o, 100)).save_checkpoint(tmp_path)
    other = make_engine(seeded(Stack), lr_scheduler=lambda o: StepLR(o, 1))
    with pytest.raises(ckpt.CheckpointError, match="the checkpoint's scheduler isn't this run's StepLR"):
        other.load_checkpoint(tmp_path)
    changed = make_engine(seeded(Stack), lr_scheduler=lambda o: CosineAnnealingLR(o, 5000))
    with pytest.warns(UserWarning, match="T_max is 5000 in this run, 100 in the checkpoint"):
        changed.load_checkpoint(tmp_path)


def test_a_whole_batch_between_micro_batches(alone: None) -> None:
    engine = make_engine(seeded(Stack))
    batches = micro_batches(global_batches(2), engine)
    inputs, _ = next(batches)
    engine.backward(engine(inputs).sum())
    with pytest.raises(RuntimeError, match=r"train_batch\(\) can't be called between .* call step\(\)"):
        engine.train_batch(batches)


class LocalMoments(torch.optim.SGD):
    """Optimizer with states as plain tensors of the local part, like some fused optimizers."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros_like(p.to_local())


def save_local_moments(folder: str) -> None:
    engine = make_engine(seeded(Stack), optimizer=lambda groups: LocalMoments(groups, lr=0.1), zero=1)
    engine.optimizer.step()
    with pytest.raises(ckpt.CheckpointError, match=r"'sum' of .* is a plain tensor"):
        engine.save_checkpoint(folder)


def test_states_that_do_not_say_their_part(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, save_local_moments, str(tmp_path))


def save_to_own_folder(folder: str) -> str:
    engine = make_engine(seeded(Stack), zero=1)
    own = f"{folder}/{engine.model.topology.rank}"  # as a node-local folder is
    engine.save_checkpoint(own)
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.wait_for_checkpoint()
    save_and_wait(engine, f"{folder}/shared")
    return str(caught.value)


def test_a_folder_that_is_not_shared(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_to_own_folder, str(tmp_path))
    assert first == second
    assert "is not the same folder as rank 0's; save to a shared file system (rank 1)" in first
    assert ckpt.committed_tags(tmp_path / "0") == ckpt.committed_tags(tmp_path / "1") == []
    assert ckpt.committed_tags(tmp_path / "shared") == ["global_step0"]
