"""Loops over Hugging Face's Accelerator take uni3d for DeepSpeed, with the steps of plain PyTorch."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from marks import matrix
from models import WIDTH, Net, seeded
from ranks import Ranks
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import uni3d.deepspeed

pytestmark = pytest.mark.slow

GLOBAL_BATCH, SAMPLES, CLIP = 12, 30, 0.5
RATE, EPS, DECAY = 0.01, 1e-3, 0.01
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "eps": EPS}}
RATES = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
SCHEDULER = {"type": "WarmupLR", "params": RATES | {"warmup_type": "linear"}}


def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(0))
    return inputs, inputs.square().mean(1, keepdim=True)


def halving(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def warmup(optimizer: Any) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, max(0, step - 1) / 2))


class Alone:
    """Plain PyTorch: each epoch ends with a step of half as many samples, which count half as much."""

    def __init__(self, schedule: Callable[[Any], LambdaLR] | None) -> None:
        self.model = seeded(Net)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, eps=EPS, weight_decay=DECAY)
        self.scheduler = schedule(self.optimizer) if schedule else None

    def epoch(self) -> list[float]:
        inputs, targets = data()
        norms = []
        for start in range(0, SAMPLES, GLOBAL_BATCH):
            x, y = inputs[start : start + GLOBAL_BATCH], targets[start : start + GLOBAL_BATCH]
            (F.mse_loss(self.model(x), y) * len(x) / GLOBAL_BATCH).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler:
                self.scheduler.step()
        return norms


def accelerator(zero: int, accumulation: int, sections: dict[str, Any] | None, *, cpu: bool = True) -> Any:
    """Return an Accelerator, of a plugin's arguments if there are no `sections` of a config."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    given: dict[str, Any] = {"gradient_clipping": CLIP, "gradient_accumulation_steps": accumulation}
    if sections is None:
        plugin = DeepSpeedPlugin(zero_stage=zero, **given)
    else:
        sizes = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
        plugin = DeepSpeedPlugin({"zero_optimization": {"stage": zero}} | sizes | given | sections)
    if cpu:
        PartialState(cpu=True)  # as an Accelerator with DeepSpeed looks for GPUs alone
    return Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=accumulation)


def accelerate_case(
    zero: int, sections: dict[str, Any] | None, folder: str, resume: bool
) -> tuple[list[float], dict[str, Tensor] | None, str]:
    uni3d.deepspeed.install()
    from accelerate.utils import DummyOptim, DummyScheduler

    warnings.filterwarnings("ignore", "keys of the config that have no effect")
    accel = accelerator(zero, GLOBAL_BATCH // dist.get_world_size(), sections)
    model: Any = seeded(Net)
    loader = DataLoader(TensorDataset(*data()), batch_size=1)
    if sections and "optimizer" in sections:
        optimizer: Any = DummyOptim(model.parameters(), lr=RATE, weight_decay=DECAY)
        own = None if "scheduler" in sections else halving
        scheduler = DummyScheduler(optimizer, warmup_num_steps=2, lr_scheduler_callable=own)
        model, optimizer, loader, scheduler = accel.prepare(model, optimizer, loader, scheduler)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, eps=EPS, weight_decay=DECAY)
        model, optimizer, loader = accel.prepare(model, optimizer, loader)
        scheduler = None
    if resume:
        accel.load_state(folder)
    norms = []
    for x, y in loader:
        with accel.accumulate(model):
            accel.backward(F.mse_loss(model(x), y))
            if accel.sync_gradients:
                norms.append(accel.clip_grad_norm_(model.parameters(), CLIP))
            optimizer.step()
            if scheduler:
                scheduler.step()
            optimizer.zero_grad()
    if not resume:
        accel.save_state(folder)
    accel.wait_for_everyone()
    whole = accel.get_state_dict(model)
    return norms, whole, type(accel.unwrap_model(model)).__name__


CASES: dict[int, tuple[dict[str, Any] | None, Callable[[Any], LambdaLR] | None]] = {
    0: ({}, None),
    1: ({"optimizer": OPTIMIZER}, halving),
    2: (None, None),
    3: ({"optimizer": OPTIMIZER, "scheduler": SCHEDULER}, warmup),
}
"""Sections of the config for each ZeRO stage, None for a plugin without one; the schedule in PyTorch."""


@pytest.mark.parametrize("zero", [matrix(0), 1, matrix(2), 3])
def test_the_steps_are_those_of_plain_pytorch(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    sections, schedule = CASES[zero]
    alone, folder = Alone(schedule), str(tmp_path / "state")
    for world_size, resume in ((2, False), (3, True)):
        expected = alone.epoch()
        results = ranks.run(world_size, accelerate_case, zero, sections, folder, resume)
        for norms, _, name in results:
            assert norms == pytest.approx(expected, rel=1e-5)
            assert name == "Net"
        weights = results[0][1]
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6, msg=name)


def forgetful_case() -> None:
    uni3d.deepspeed.install()
    accel = accelerator(2, 1, {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}}, cpu=False)
    with pytest.raises(ValueError, match="accelerate counts 1 of 2 processes; on CPUs, set Training"):
        accel.prepare(seeded(Net))


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate counts GPUs")
def test_an_accelerator_that_takes_each_process_for_the_only_one(ranks: Ranks) -> None:
    ranks.run(2, forgetful_case)
