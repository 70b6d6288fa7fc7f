"""The config's `scheduler`: DeepSpeed's schedules with DeepSpeed's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, SerializeAsAny

from uni3d.config.strict import ConfigError, Strict, named_section, unknown, validate

if TYPE_CHECKING:  # as they are once `of_group` has chosen
    Rates = float
    Peaks = float
    Momenta = float
else:
    _Rate = Annotated[float, Field(ge=0)]
    _Peak = Annotated[float, Field(gt=0)]
    _Momentum = Annotated[float, Field(ge=0, lt=1)]
    _LIST = Field(strict=False, min_length=1)  # a list of JSON becomes a tuple
    Rates = _Rate | Annotated[tuple[_Rate, ...], _LIST]
    Peaks = _Peak | Annotated[tuple[_Peak, ...], _LIST]
    Momenta = _Momentum | Annotated[tuple[_Momentum, ...], _LIST]
    """A number, or a list with one for each parameter group."""


class ScheduleParams(Strict):
    last_batch_iteration: Literal[-1] = -1
    """First iteration of the schedule; a resumed run continues from its checkpoint."""

    def of_group(self, index: int, groups: int) -> Self:
        """Return the parameters of one of the optimizer's groups, with its number in place of each list.

        Raises:
            ValueError: a list has another length than there are groups.
        """
        lists = {name: value for name, value in self if isinstance(value, tuple)}
        for name, value in lists.items():
            if len(value) != groups:
                raise ValueError(
                    f"scheduler.params.{name} has {len(value)} numbers, but there are {groups} parameter "
                    "groups; give one number, or one for each group"
                )
        return self.model_copy(update={name: value[index] for name, value in lists.items()})


class _Warmup(ScheduleParams):
    warmup_num_steps: int = Field(default=1000, gt=0)
    """Steps of the warmup; at least 2, as in DeepSpeed."""
    warmup_type: Literal["log", "linear"] = "log"


class WarmupLRParams(_Warmup):
    warmup_min_lr: Rates = 0.0
    warmup_max_lr: Peaks | None = None
    """null is each parameter group's own rate."""


class WarmupDecayLRParams(_Warmup):
    total_num_steps: int = Field(gt=0)
    warmup_min_lr: Rates = 0.0
    warmup_max_lr: Peaks = 1e-3


class WarmupCosineLRParams(_Warmup):
    total_num_steps: int = Field(gt=0)
    warmup_min_ratio: float = Field(default=0.0, ge=0, le=1)
    cos_min_ratio: float = Field(default=1e-4, ge=0, le=1)


class OneCycleParams(ScheduleParams):
    """Rates rise and fall once, then decay; momentum does the opposite (Smith 2018, arXiv 1803.09820)."""

    cycle_min_lr: Rates
    cycle_max_lr: Peaks
    decay_lr_rate: float = Field(default=0.0, ge=0)
    """n steps after the cycle the rate is `cycle_min_lr / (1 + decay_lr_rate * n / decay_step_size)`."""
    cycle_first_step_size: int = Field(default=2000, gt=0)
    """Steps in which the rate rises."""
    cycle_second_step_size: int | None = Field(default=None, ge=0)
    """Steps in which the rate falls; as many as it rises in by default."""
    cycle_first_stair_count: int = Field(default=0, ge=0)
    """Number of stairs in which it rises; 0 rises smoothly."""
    cycle_second_stair_count: int | None = Field(default=None, ge=0)
    """Number of stairs in which it falls; as many as it rises in by default."""
    decay_step_size: int = Field(default=0, ge=0)
    """Steps per decay; 0 disables it."""
    cycle_momentum: bool = True
    """Also cycle the optimizer's first beta. As in DeepSpeed, this sets the second to 0.99."""
    cycle_min_mom: Momenta = 0.8
    cycle_max_mom: Momenta = 0.9
    decay_mom_rate: float = Field(default=0.0, ge=0)
    """n steps after the cycle momentum is `cycle_max_mom * (1 + decay_mom_rate * n / decay_step_size)`, but
    at most 0.999."""


class LRRangeTestParams(ScheduleParams):
    """Range test: the rate grows until training diverges, which shows its maximum (Smith 2018)."""

    lr_range_test_min_lr: Peaks = 1e-3
    lr_range_test_step_size: int = Field(default=2000, gt=0)
    """Steps in which the rate grows by `lr_range_test_min_lr * lr_range_test_step_rate`."""
    lr_range_test_step_rate: float = Field(default=1.0, ge=0)
    lr_range_test_staircase: bool = False
    """Grow the rate once at the end of these steps, not a little in each."""


SCHEDULES: dict[str, type[ScheduleParams]] = {
    "WarmupLR": WarmupLRParams,
    "WarmupDecayLR": WarmupDecayLRParams,
    "WarmupCosineLR": WarmupCosineLRParams,
    "OneCycle": OneCycleParams,
    "LRRangeTest": LRRangeTestParams,
}


class SchedulerConfig(Strict):
    """A schedule with all its parameters."""

    type: str
    params: SerializeAsAny[ScheduleParams]


def read_scheduler(section: object) -> SchedulerConfig | None:
    """Read the config's `scheduler`.

    Raises:
        ConfigError: the schedule or one of its parameters doesn't exist.
    """
    values = named_section("scheduler", section, "WarmupLR")
    if values is None:
        return None
    kind = values["type"]
    if kind not in SCHEDULES:
        raise ConfigError(
            [
                f"scheduler.type: {unknown('schedule', kind, SCHEDULES)} (pass a schedule of torch's to "
                "initialize, as lr_scheduler)"
            ]
        )
    values["params"] = validate(SCHEDULES[kind], values["params"], "scheduler.params")
    return validate(SchedulerConfig, values, "scheduler")
