"""Optimizers and learning-rate schedules by their names and parameters in DeepSpeed's config."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # the config is read by commands that answer without torch
    import torch

Ratio = Callable[[int], float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamParams(_Strict):
    lr: float = Field(default=1e-3, ge=0)
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), strict=False)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class PlainAdamParams(AdamParams):
    adam_w_mode: bool = True
    """As in DeepSpeed, "Adam" decays weights as AdamW does unless this is false."""


class AdamWConfig(_Strict):
    type: Literal["AdamW"]
    params: AdamParams = AdamParams()


class AdamConfig(_Strict):
    type: Literal["Adam"]
    params: PlainAdamParams = PlainAdamParams()


class SGDParams(_Strict):
    lr: float = Field(default=1e-3, ge=0)
    momentum: float = Field(default=0.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    nesterov: bool = False


class SGDConfig(_Strict):
    type: Literal["SGD"]
    params: SGDParams = SGDParams()


OptimizerConfig = Annotated[AdamWConfig | AdamConfig | SGDConfig, Field(discriminator="type")]


class _Warmup(_Strict):
    warmup_num_steps: int = Field(default=1000, gt=0)
    """Steps in which the rate rises; at least 2 are taken, as in DeepSpeed."""
    warmup_type: Literal["log", "linear"] = "log"

    def rise(self, iteration: int) -> float | None:
        """Progress of the warmup in [0, 1); None when it is over."""
        steps = max(2, self.warmup_num_steps)
        if iteration >= steps:
            return None
        if self.warmup_type == "log":
            return math.log(iteration + 1) / math.log(steps)
        return iteration / steps


class WarmupLRParams(_Warmup):
    warmup_min_lr: float = Field(default=0.0, ge=0)
    warmup_max_lr: float | None = Field(default=None, gt=0)
    """None takes each parameter group's own rate."""


class WarmupDecayLRParams(_Warmup):
    total_num_steps: int = Field(gt=0)
    warmup_min_lr: float = Field(default=0.0, ge=0)
    warmup_max_lr: float = Field(default=1e-3, gt=0)


class WarmupCosineLRParams(_Warmup):
    total_num_steps: int = Field(gt=0)
    warmup_min_ratio: float = Field(default=0.0, ge=0, le=1)
    cos_min_ratio: float = Field(default=1e-4, ge=0, le=1)


class WarmupLRConfig(_Strict):
    type: Literal["WarmupLR"]
    params: WarmupLRParams = WarmupLRParams()


class WarmupDecayLRConfig(_Strict):
    type: Literal["WarmupDecayLR"]
    params: WarmupDecayLRParams


class WarmupCosineLRConfig(_Strict):
    type: Literal["WarmupCosineLR"]
    params: WarmupCosineLRParams


SchedulerConfig = Annotated[
    WarmupLRConfig | WarmupDecayLRConfig | WarmupCosineLRConfig, Field(discriminator="type")
]


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of the config over parameter groups; a group's own hyperparameters come first."""
    import torch

    params = config.params.model_dump()
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(groups, **params)
    decoupled = params.pop("adam_w_mode", True)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=True, **params)  # one pass over memory instead of one for each operation


def make_scheduler(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of the config, with DeepSpeed's formulas and timing.

    As there, an optimizer's first step is taken at iteration -1: before the schedule has begun.
    """
    import torch

    params = config.params
    if isinstance(params, WarmupLRParams | WarmupDecayLRParams) and params.warmup_max_lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = params.warmup_max_lr
    ratios = [_ratio(config, float(group["lr"])) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, ratios)


def _ratio(config: SchedulerConfig, lr: float) -> Ratio:
    """Share of `lr` at torch's epoch n, which is DeepSpeed's iteration n - 1."""
    if isinstance(config, WarmupCosineLRConfig):
        cosine = config.params
        return lambda epoch: _cosine(cosine, epoch - 1)
    params = config.params
    floor = params.warmup_min_lr / lr if lr else 0.0
    total = params.total_num_steps if isinstance(params, WarmupDecayLRParams) else None
    return lambda epoch: floor + (1 - floor) * _linear(params, total, epoch - 1)


def _linear(params: _Warmup, total: int | None, iteration: int) -> float:
    if iteration < 0:
        return 0.0
    rising = params.rise(iteration)
    if rising is not None:
        return rising
    if total is None:
        return 1.0
    return max(0.0, (total - iteration) / max(1.0, total - max(2, params.warmup_num_steps)))


def _cosine(params: WarmupCosineLRParams, iteration: int) -> float:
    if iteration < 0:
        return 0.0
    rising = params.rise(iteration)
    if rising is not None:
        return params.warmup_min_ratio + rising * (1 - params.warmup_min_ratio)
    warmup = max(2, params.warmup_num_steps)
    progress = min(1.0, (iteration - warmup + 1) / max(1, params.total_num_steps - warmup))
    return params.cos_min_ratio + (1 - params.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2
