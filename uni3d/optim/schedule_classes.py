"""DeepSpeed's learning-rate schedules as classes, which the config makes too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch

from uni3d.config.scheduler import ScheduleParams, SchedulerConfig, read_scheduler
from uni3d.optim.lr_schedules import CycledMomentum, begin

Rates = float | Sequence[float]

_OPTIONAL = {"warmup_max_lr", "cycle_second_step_size", "cycle_second_stair_count", "cycle_momentum"}
"""Parameters that may be None."""


class ClassicSchedule(CycledMomentum):
    """A schedule with DeepSpeed's numbers. `step()` is called after each optimizer step.

    Its parameters can be read as attributes of their names, such as `warmup_num_steps`.
    """

    _params: ScheduleParams

    def __init__(self, optimizer: Any, **params: Any) -> None:
        """Set the optimizer's initial rates.

        Raises:
            ConfigError: a parameter's value doesn't fit.
        """
        wrapped = getattr(optimizer, "optimizer", None)
        inner: torch.optim.Optimizer = (
            optimizer if isinstance(optimizer, torch.optim.Optimizer) or wrapped is None else wrapped
        )
        given = {key: value for key, value in params.items() if value is not None or key not in _OPTIONAL}
        config = read_scheduler({"type": type(self).__name__, "params": given})
        assert config is not None, "the section isn't empty"
        self._begin(config, inner)

    @classmethod
    def of_config(cls, config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> Self:
        """Return the config's schedule, which is of this class. Raises as `begin` does."""
        made = cls.__new__(cls)
        made._begin(config, optimizer)
        return made

    def _begin(self, config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> None:
        self._params = config.params
        CycledMomentum.__init__(self, optimizer, *begin(config, optimizer))

    def __getattr__(self, name: str) -> Any:
        """Return the parameter of that name. Called only for what there isn't otherwise."""
        params = vars(self).get("_params")
        if params is None or name not in type(params).model_fields:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(params, name)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_params"}

    @property
    def last_batch_iteration(self) -> int:
        """Number of the last optimizer step, from 0; -1 before the first."""
        return self.last_epoch - 1

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the rates of the next optimizer step, or those after the step of the given number."""
        if last_batch_iteration is not None:
            self.last_epoch = last_batch_iteration
        super().step()


class BoundedSchedule(ClassicSchedule):
    """A schedule between a lowest and a highest rate."""

    _lowest = "warmup_min_lr"
    """Name of the parameter of the lowest rate."""

    @property
    def min_lrs(self) -> list[float]:
        """Lowest rate of each parameter group."""
        groups = len(self.base_lrs)
        return [float(getattr(self._params.of_group(i, groups), self._lowest)) for i in range(groups)]

    @property
    def max_lrs(self) -> list[float]:
        """Highest rate of each parameter group."""
        return [float(rate) for rate in self.base_lrs]


class WarmupLR(BoundedSchedule):
    """Warmup from `warmup_min_lr` to `warmup_max_lr`, by default each group's own rate; then constant."""

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            warmup_min_lr=warmup_min_lr,
            warmup_max_lr=warmup_max_lr,
            warmup_num_steps=warmup_num_steps,
            warmup_type=warmup_type,
            last_batch_iteration=last_batch_iteration,
        )


class WarmupDecayLR(BoundedSchedule):
    """Warmup from `warmup_min_lr` to `warmup_max_lr`, then a line to 0 at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: Rates = 0.0,
        warmup_max_lr: Rates = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            total_num_steps=total_num_steps,
            warmup_min_lr=warmup_min_lr,
            warmup_max_lr=warmup_max_lr,
            warmup_num_steps=warmup_num_steps,
            warmup_type=warmup_type,
            last_batch_iteration=last_batch_iteration,
        )


class WarmupCosineLR(ClassicSchedule):
    """Warmup to each group's own rate, then a cosine down to `cos_min_ratio` of it."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            total_num_steps=total_num_steps,
            warmup_min_ratio=warmup_min_ratio,
            warmup_num_steps=warmup_num_steps,
            cos_min_ratio=cos_min_ratio,
            warmup_type=warmup_type,
            last_batch_iteration=last_batch_iteration,
        )

    def get_lr_ratio(self) -> float:
        """Return the ratio of the next step's rate to each group's own."""
        return float(self.lr_lambdas[0](self.last_epoch))


class OneCycle(BoundedSchedule):
    """Rates that rise and fall once, then decay; the momentum does the opposite."""

    _lowest = "cycle_min_lr"

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Rates,
        cycle_max_lr: Rates,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Rates = 0.8,
        cycle_max_mom: Rates = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            cycle_min_lr=cycle_min_lr,
            cycle_max_lr=cycle_max_lr,
            decay_lr_rate=decay_lr_rate,
            cycle_first_step_size=cycle_first_step_size,
            cycle_second_step_size=cycle_second_step_size,
            cycle_first_stair_count=cycle_first_stair_count,
            cycle_second_stair_count=cycle_second_stair_count,
            decay_step_size=decay_step_size,
            cycle_momentum=None if cycle_momentum else False,  # true by default, where there are betas
            cycle_min_mom=cycle_min_mom,
            cycle_max_mom=cycle_max_mom,
            decay_mom_rate=decay_mom_rate,
            last_batch_iteration=last_batch_iteration,
        )


class LRRangeTest(ClassicSchedule):
    """A rate that grows until training diverges, which shows the highest that works."""

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Rates = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            lr_range_test_min_lr=lr_range_test_min_lr,
            lr_range_test_step_size=lr_range_test_step_size,
            lr_range_test_step_rate=lr_range_test_step_rate,
            lr_range_test_staircase=lr_range_test_staircase,
            last_batch_iteration=last_batch_iteration,
        )


_CLASSES = {kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)}


def make_scheduler(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> ClassicSchedule:
    """Return the config's schedule over `optimizer`, and set the optimizer's initial rates.

    Raises:
        ValueError: `cycle_momentum` is set, but the optimizer has no betas; or a list has another length
            than there are parameter groups.
    """
    return _CLASSES[config.type].of_config(config, optimizer)
