"""The config's `scheduler`, by DeepSpeed's names and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from uni3d.config.strict import ConfigError, Strict, unknown, validate


class ScheduleParams(Strict):
    last_batch_iteration: Literal[-1] = -1
    """Where a schedule begins; a checkpoint brings its own place."""


class _Warmup(ScheduleParams):
    warmup_num_steps: int = Field(default=1000, gt=0)
    """Steps in which the rate rises; at least 2 are taken, as in DeepSpeed."""
    warmup_type: Literal["log", "linear"] = "log"


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


class OneCycleParams(ScheduleParams):
    """Rates rise and fall once, then decay; momentum does the opposite (Smith 2018, arXiv 1803.09820)."""

    cycle_min_lr: float = Field(ge=0)
    cycle_max_lr: float = Field(gt=0)
    decay_lr_rate: float = Field(default=0.0, ge=0)
    """At step n after the cycle the rate is `cycle_min_lr / (1 + decay_lr_rate * n / decay_step_size)`."""
    cycle_first_step_size: int = Field(default=2000, gt=0)
    """Steps in which the rate rises."""
    cycle_second_step_size: int | None = Field(default=None, ge=0)
    """Steps in which it falls; by default as many."""
    cycle_first_stair_count: int = Field(default=0, ge=0)
    """In how many stairs it rises; 0 is without."""
    cycle_second_stair_count: int | None = Field(default=None, ge=0)
    """By default as many."""
    decay_step_size: int = Field(default=0, ge=0)
    """0 is no decay."""
    cycle_momentum: bool = True
    """Whether the first of an optimizer's betas is cycled too. As in DeepSpeed, the second then is 0.99."""
    cycle_min_mom: float = Field(default=0.8, ge=0, lt=1)
    cycle_max_mom: float = Field(default=0.9, ge=0, lt=1)
    decay_mom_rate: float = Field(default=0.0, ge=0)
    """At step n after the cycle momentum is `cycle_max_mom * (1 + decay_mom_rate * n / decay_step_size)`, but
    at most 0.999."""


class LRRangeTestParams(ScheduleParams):
    """The rate grows until training diverges, which tells how large it may be (Smith 2018)."""

    lr_range_test_min_lr: float = Field(default=1e-3, gt=0)
    lr_range_test_step_size: int = Field(default=2000, gt=0)
    """Steps in which the rate grows by `lr_range_test_min_lr * lr_range_test_step_rate`."""
    lr_range_test_step_rate: float = Field(default=1.0, ge=0)
    lr_range_test_staircase: bool = False
    """Whether it grows at once at the end of these steps, rather than a little in each."""


SCHEDULES: dict[str, type[ScheduleParams]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}


class SchedulerConfig(Strict):
    """A schedule by its name, with all its parameters."""

    type: str
    params: SerializeAsAny[ScheduleParams]


def read_scheduler(section: object) -> SchedulerConfig | None:
    """The config's `scheduler`.

    Raises:
        ConfigError: there is no such schedule, or it has no such parameters.
    """
    if section is None:
        return None
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ConfigError([f'scheduler is {section!r}: write {{"type": "WarmupLR", "params": {{}}}}'])
    kind = section["type"]
    if kind not in SCHEDULES:
        raise ConfigError([f"scheduler.type: {unknown('schedule', kind, SCHEDULES)}"])
    params: Any = section.get("params")
    checked = validate(SCHEDULES[kind], {} if params is None else params, "scheduler.params")
    return validate(SchedulerConfig, {**section, "params": checked}, "scheduler")
