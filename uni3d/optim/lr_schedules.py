"""Learning-rate schedules with DeepSpeed's formulas and timing.

DeepSpeed counts a schedule's iterations from 0 and creates it at iteration -1: the optimizer's first step is
taken before the schedule starts. torch's epoch n is DeepSpeed's iteration n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from uni3d.config.scheduler import (
    LRRangeTestParams,
    OneCycleParams,
    ScheduleParams,
    SchedulerConfig,
    WarmupCosineLRParams,
    WarmupDecayLRParams,
    WarmupLRParams,
)

Ratio = Callable[[int], float]

SECOND_BETA = 0.99
"""Second beta of the optimizer while the first is cycled, as in DeepSpeed."""

HIGHEST_MOMENTUM = 0.999
"""Upper bound of the momentum under `decay_mom_rate`."""


def begin(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer
) -> tuple[list[Ratio], list[OneCycleParams]]:
    """Set the optimizer's base rates; return each group's ratio to its rate, and the cycles of its momentum.

    There are no cycles if the schedule doesn't change the momentum.

    Raises:
        ValueError: `cycle_momentum` is set, but the optimizer has no betas; or a list has another length
            than there are parameter groups.
    """
    groups = optimizer.param_groups
    each = _of_groups(config, optimizer)
    for group, params in zip(groups, each, strict=True):
        if (peak := _peak(params)) is not None:
            _set_rate(group, peak)
    ratios = [_ratio(params, float(group["lr"])) for group, params in zip(groups, each, strict=True)]
    cycles = [params for params in each if isinstance(params, OneCycleParams) and params.cycle_momentum]
    return ratios, cycles if cycles and _has_betas(optimizer, cycles[0]) else []


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):  # which a compiled or captured step reads
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def go_on(scheduler: LambdaLR, config: SchedulerConfig, rates: list[float] | None = None) -> None:
    """Fit a config's schedule to its restored state.

    Its ratios are taken anew, for the restored base rates. With `rates`, the schedule has changed: these are
    its base rates instead, and the next step has the rate that the schedule gives it.
    """
    bases = [float(rate) for rate in scheduler.base_lrs] if rates is None else rates
    each = _of_groups(config, scheduler.optimizer)
    scheduler.lr_lambdas = [_ratio(params, base) for params, base in zip(each, bases, strict=True)]
    if rates is None:
        return
    scheduler.base_lrs, scheduler._last_lr = [*bases], []
    for group, base, ratio in zip(scheduler.optimizer.param_groups, bases, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = base, base * ratio(scheduler.last_epoch)
        scheduler._last_lr.append(group["lr"])
    if isinstance(scheduler, CycledMomentum):
        scheduler.set_betas()


def _of_groups(config: SchedulerConfig, optimizer: torch.optim.Optimizer) -> list[ScheduleParams]:
    """Return the schedule's parameters for each of the optimizer's groups."""
    groups = len(optimizer.param_groups)
    return [config.params.of_group(index, groups) for index in range(groups)]


class CycledMomentum(LambdaLR):
    """A schedule that also sets each group's first beta, if there are cycles of it."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, ratios: list[Ratio], cycles: list[OneCycleParams]
    ) -> None:
        self._momentum = cycles
        for group in optimizer.param_groups if cycles else ():
            group["initial_betas"] = group["betas"]  # marks them as moved by a schedule, as `initial_lr` does
        super().__init__(optimizer, ratios)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self.set_betas()

    def set_betas(self) -> None:
        """Set the betas of the current epoch."""
        for group, cycle in zip(self.optimizer.param_groups, self._momentum, strict=bool(self._momentum)):
            # DeepSpeed starts at the lowest momentum, though the rate is at its lowest too
            lowest = self.last_epoch == 0
            momentum = cycle.cycle_min_mom if lowest else _one_cycle_momentum(cycle, self.last_epoch)
            group["betas"] = (momentum, SECOND_BETA)

    def get_mom(self) -> list[Any] | None:
        """Return the betas at this point of each group's cycle, as DeepSpeed does; None without cycles.

        They are the optimizer's, but for the first step, which has the lowest momentum.
        """
        found = [(_one_cycle_momentum(cycle, self.last_epoch), SECOND_BETA) for cycle in self._momentum]
        return found or None

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_momentum"}


def _has_betas(optimizer: torch.optim.Optimizer, params: OneCycleParams) -> bool:
    if all("betas" in group for group in optimizer.param_groups):
        return True
    if "cycle_momentum" in params.model_fields_set:
        raise ValueError(
            f"scheduler.params.cycle_momentum is true, but {type(optimizer).__name__} has no betas to cycle; "
            "set it to false"
        )
    return False  # true by default, but not asked for


def _peak(params: Any) -> float | None:
    """Return the rate that the schedule's ratios multiply; None is each group's own."""
    if isinstance(params, WarmupLRParams | WarmupDecayLRParams):
        return params.warmup_max_lr
    if isinstance(params, OneCycleParams):
        return params.cycle_max_lr
    return params.lr_range_test_min_lr if isinstance(params, LRRangeTestParams) else None


def _ratio(params: Any, lr: float) -> Ratio:
    """Return the ratio to `lr` as a function of torch's epoch."""
    if isinstance(params, WarmupCosineLRParams):
        return lambda epoch: _cosine(params, epoch - 1)
    if isinstance(params, OneCycleParams):
        return lambda epoch: _one_cycle_lr(params, epoch) / lr
    if isinstance(params, LRRangeTestParams):
        return lambda epoch: _range_test(params, epoch)
    floor = params.warmup_min_lr / lr if lr else 0.0
    return lambda epoch: floor + (1 - floor) * _linear(params, epoch - 1)


def _rise(params: WarmupLRParams | WarmupDecayLRParams | WarmupCosineLRParams, at: int) -> float | None:
    """Return the progress of the warmup in [0, 1), or None after it."""
    steps = max(2, params.warmup_num_steps)
    if at >= steps:
        return None
    if params.warmup_type == "log":
        return math.log(at + 1) / math.log(steps)
    return at / steps


def _linear(params: WarmupLRParams | WarmupDecayLRParams, iteration: int) -> float:
    if iteration < 0:
        return 0.0
    if (rising := _rise(params, iteration)) is not None:
        return rising
    if isinstance(params, WarmupLRParams):
        return 1.0
    total = params.total_num_steps
    return max(0.0, (total - iteration) / max(1.0, total - max(2, params.warmup_num_steps)))


def _cosine(params: WarmupCosineLRParams, iteration: int) -> float:
    if iteration < 0:
        return 0.0
    if (rising := _rise(params, iteration)) is not None:
        return params.warmup_min_ratio + rising * (1 - params.warmup_min_ratio)
    warmup = max(2, params.warmup_num_steps)
    progress = min(1.0, (iteration - warmup + 1) / max(1, params.total_num_steps - warmup))
    return params.cos_min_ratio + (1 - params.cos_min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def _range_test(params: LRRangeTestParams, epoch: int) -> float:
    intervals = epoch / params.lr_range_test_step_size
    if params.lr_range_test_staircase:
        intervals = epoch // params.lr_range_test_step_size
    return 1 + params.lr_range_test_step_rate * intervals


def _cycle_sizes(params: OneCycleParams) -> tuple[int, int]:
    first, second = params.cycle_first_step_size, params.cycle_second_step_size
    return first, first if second is None else second


def _height(params: OneCycleParams, epoch: int) -> float:
    """Return the height of an epoch in the cycle, in [0, 1]."""
    first, second = _cycle_sizes(params)
    place = epoch % (first + second)
    rises = place <= first
    covered, size = (place, first) if rises else (first + second - place, second)
    stairs = params.cycle_first_stair_count
    if not rises and params.cycle_second_stair_count is not None:
        stairs = params.cycle_second_stair_count
    return (covered * stairs // size) / stairs if stairs else covered / size


def _decayed(params: OneCycleParams, epoch: int) -> float | None:
    """Return the steps since the end of the cycle, in units of the decay's step size; None within it."""
    after = epoch - sum(_cycle_sizes(params))
    if after <= 0:
        return None
    return after / params.decay_step_size if params.decay_step_size else 0.0


def _one_cycle_lr(params: OneCycleParams, epoch: int) -> float:
    if (decayed := _decayed(params, epoch)) is not None:
        return params.cycle_min_lr / (1 + params.decay_lr_rate * decayed)
    return params.cycle_min_lr + (params.cycle_max_lr - params.cycle_min_lr) * _height(params, epoch)


def _one_cycle_momentum(params: OneCycleParams, epoch: int) -> float:
    if (
        decayed := _decayed(params, epoch)
    ) is not None:  # bounded here: DeepSpeed's formula grows past 1, where it is no average
        grown = params.cycle_max_mom * (1 + params.decay_mom_rate * decayed)
        return min(grown, max(params.cycle_max_mom, HIGHEST_MOMENTUM))
    return params.cycle_max_mom - (params.cycle_max_mom - params.cycle_min_mom) * _height(params, epoch)
