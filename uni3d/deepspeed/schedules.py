"""`deepspeed.runtime.lr_schedules`: schedules as arguments of the command line."""

from __future__ import annotations

import argparse
from typing import Any

from uni3d.config.scheduler import SCHEDULES

VALID_LR_SCHEDULES = list(SCHEDULES)

_TUNING: dict[str, tuple[type, Any, str]] = {
    "lr_range_test_min_lr": (float, 0.001, "rate at which the range test begins"),
    "lr_range_test_step_rate": (float, 1.0, "growth of the rate in each interval of the range test"),
    "lr_range_test_step_size": (int, 1000, "steps in an interval of the range test"),
    "lr_range_test_staircase": (bool, False, "grow the rate once an interval"),
    "cycle_first_step_size": (int, 1000, "steps in which the rate of OneCycle rises"),
    "cycle_first_stair_count": (int, -1, "stairs in which it rises; -1 rises smoothly"),
    "cycle_second_step_size": (int, -1, "steps in which it falls; -1 is as many as it rises in"),
    "cycle_second_stair_count": (int, -1, "stairs in which it falls; -1 is as many as it rises in"),
    "decay_step_size": (int, 1000, "steps per decay after the cycle"),
    "cycle_min_lr": (float, 0.01, "rate at which OneCycle begins"),
    "cycle_max_lr": (float, 0.1, "highest rate of OneCycle"),
    "decay_lr_rate": (float, 0.0, "decay of the rate after the cycle"),
    "cycle_min_mom": (float, 0.8, "lowest momentum of OneCycle"),
    "cycle_max_mom": (float, 0.9, "highest momentum of OneCycle"),
    "decay_mom_rate": (float, 0.0, "growth of the momentum after the cycle"),
    "warmup_min_lr": (float, 0.0, "rate at which the warmup begins"),
    "warmup_max_lr": (float, 0.001, "rate after the warmup"),
    "warmup_num_steps": (int, 1000, "steps of the warmup"),
    "warmup_type": (str, "log", "rise of the rate in the warmup: log or linear"),
}
"""Options of `add_tuning_arguments`, with their types, defaults and help."""


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--lr_schedule` and the parameters of the schedules, for the script to read."""
    group = parser.add_argument_group("Schedule of the learning rate")
    group.add_argument("--lr_schedule", choices=VALID_LR_SCHEDULES, help="schedule")
    for name, (kind, default, text) in _TUNING.items():
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", help=text)
        else:
            group.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str]:
    """Return the config's section `scheduler` from parsed tuning arguments, or None and the reason."""
    kind = getattr(args, "lr_schedule", None)
    if kind not in SCHEDULES:
        return None, f"--lr_schedule is {kind!r}; expected one of {', '.join(SCHEDULES)}"
    known = [name for name in _TUNING if name in SCHEDULES[kind].model_fields and hasattr(args, name)]
    params = {name: getattr(args, name) for name in known}
    return {"type": kind, "params": {k: v for k, v in params.items() if v != -1}}, ""
