"""State of a run: everything that training changes and a checkpoint keeps."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from parallel import ParallelModel
from uni3d.config.scheduler import SchedulerConfig
from uni3d.config.sections import CheckpointConfig
from uni3d.optim.loss_scale import LossScale
from uni3d.stored_model import StoredModel


@dataclass(kw_only=True)
class Progress:
    """Counters of a run over all ranks, continued by a resume."""

    train_batch: int
    """Samples per step; 0 if only the script knows, and then `global_samples` isn't counted."""
    global_steps: int = 0
    """Steps, including those skipped for an overflow."""
    global_samples: int = 0
    skipped_steps: int = 0
    """Steps skipped because a gradient overflowed in fp16."""
    dataset_length: int = 0
    """Samples in the engine's own training data; 0 if the script brings its batches."""
    epoch_length: int = 0
    """Samples that an epoch of it is trained on (`uni3d.config.data.epoch_length`)."""
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Name of the run in its checkpoints; rank 0's counts."""

    def count_step(self) -> None:
        """Count one step and its samples."""
        self.global_steps += 1
        self.global_samples += self.train_batch


class DataState(Protocol):
    """A loader that the script brings, and where it stands."""

    kind: str
    problem: str | None
    resumes: bool

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands; needs `resumes`."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where it stood."""
        ...

    def begin_anew(self) -> None:
        """Begin with an epoch."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that a checkpoint keeps of a run on this rank."""

    model: StoredModel
    optimizer: Optimizer | None
    lr_scheduler: LRScheduler | None
    scaler: LossScale | None = None
    """None unless training is in fp16."""
    progress: Progress
    data: DataState | None = None
    """The script's own loader of training data, if it brings one."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Further objects of the script's with a state, by name."""
    settings: CheckpointConfig
    seed: int | None = None
    """Seed of the order of samples; None if the script orders them."""
    schedule: SchedulerConfig | None = None
    """The schedule that the config describes; None if the script makes it."""


@dataclass(frozen=True, kw_only=True)
class TrainState(RunState):
    """All that training changes, of a run of the engine."""

    model: ParallelModel

    @property
    def rate(self) -> float:
        """Learning rate of the first parameter group; 0 if the optimizer has none."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0].get("lr", 0.0))
