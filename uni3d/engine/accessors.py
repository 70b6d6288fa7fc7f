"""What an engine knows of itself, by DeepSpeed's names. All of it is local."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import nn

from parallel import ParallelModel
from uni3d.config import BatchTriad, Config
from uni3d.engine.loss_scale import LossScale
from uni3d.engine.step import Stepper


class Accessors:
    """Base of `Engine`: reads what that one sets."""

    config: Config
    triad: BatchTriad
    model: ParallelModel
    optimizer: torch.optim.Optimizer | None
    scaler: LossScale | None
    _stepper: Stepper

    @property
    def module(self) -> nn.Module:
        """This rank's part of the model."""
        return self.model.module

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.model.topology.device

    @property
    def global_rank(self) -> int:
        return self.model.topology.rank

    @property
    def local_rank(self) -> int:
        """This process's number on its machine, as torchrun counts; 0 without torchrun."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        return self.model.topology.world_size

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of this rank's part of the model, sharded."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of this rank's part of the model, under the names of the whole one."""
        return self.module.named_parameters()

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group, for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups] if self.optimizer else []

    def get_global_grad_norm(self) -> float | None:
        """Norm of all gradients of the last step, before clipping; None before the first."""
        return self._stepper.look().norm

    def get_loss_scale(self) -> float:
        """By how much losses are multiplied before the next backward pass; 1 but in fp16."""
        return 1.0 if self.scaler is None else self.scaler.scale

    def was_step_applied(self) -> bool:
        """Whether the last `step()` or `train_batch()` changed the parameters: it ended a global batch, and
        wasn't skipped for an overflow."""
        return self._stepper.look().applied

    def train_batch_size(self) -> int:
        """Samples of a step, over all ranks."""
        return self.triad.train_batch

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples that a data-parallel rank computes at once."""
        return self.triad.micro_batch

    def gradient_accumulation_steps(self) -> int:
        """Micro batches of a step on each data-parallel rank."""
        return self.triad.accumulation

    def zero_optimization_stage(self) -> int:
        return self.model.zero.stage
