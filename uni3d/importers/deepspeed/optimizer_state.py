"""State of a DeepSpeed checkpoint that isn't arrays: parameter groups, LR schedule, loss scale, counters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from uni3d.config.forms import as_boolean, as_integer
from uni3d.config.optimizer import read_optimizer
from uni3d.config.scheduler import read_scheduler
from uni3d.config.strict import ConfigError
from uni3d.importers.deepspeed.zero import ParameterPart
from uni3d.importers.pickles import StandIn, plain_entries
from uni3d.importers.source import PARAMETER, OptimizerState
from uni3d.resume_rules import IMPLEMENTATION_KEYS

_OWN_KEYS = frozenset(
    {
        *("module", "buffer_names", "param_shapes", "frozen_param_shapes", "frozen_param_fragments"),
        *("shared_params", "sparse_tensor_module_names", "optimizer", "lr_scheduler", "data_sampler"),
        *("global_samples", "global_steps", "skipped_steps", "random_ltd", "ds_config", "ds_version"),
        *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "autotp_size"),
        *("num_experts", "ds_autoep_layers", "universal_checkpoint_info"),
    }
)
"""DeepSpeed's own keys of a model file. The others are the script's `client_state`."""

_NOT_HYPERPARAMETERS = IMPLEMENTATION_KEYS | {"param_names", "step"}
"""Entries of a parameter group that aren't taken over."""


def optimizer_state(
    config: Mapping[str, Any],
    groups: list[dict[str, Any]],
    trained: Mapping[str, ParameterPart],
    left_out: list[str],
) -> OptimizerState:
    """Return the optimizer's state without arrays; unsupported hyperparameters are added to `left_out`."""
    cleaned = [hyperparameters(group, f"parameter group {i}", left_out) for i, group in enumerate(groups)]
    for name, part in trained.items():
        if part.group is not None:
            cleaned[part.group]["params"].append(name)
    for i, group in enumerate(cleaned):
        if not group["params"]:
            left_out.append(f"parameters of group {i}: all are frozen, and DeepSpeed doesn't name them")
    return OptimizerState(
        type=_class_of(config.get("optimizer"), groups, trained),
        groups=cleaned,
        scalars={name: dict(part.scalars) for name, part in trained.items() if part.scalars},
    )


def hyperparameters(group: Mapping[str, Any], where: str, left_out: list[str]) -> dict[str, Any]:
    """Return a group's hyperparameters in the manifest's form, with an empty list of parameters."""
    taken = {key: value for key, value in group.items() if key not in _NOT_HYPERPARAMETERS}
    if taken.get("bias_correction") is True:
        del taken["bias_correction"]  # torch's optimizers always correct the bias
    return {"params": [], **plain_entries(taken, f"{where}: ", left_out)}


def _class_of(section: Any, groups: list[dict[str, Any]], trained: Mapping[str, ParameterPart]) -> str | None:
    """Return the class of torch or uni3d that is this optimizer; None if it isn't known.

    A script may have used another optimizer than the config's, so groups and states count before the config.
    """
    decoupled = {group["decoupled_weight_decay"] for group in groups if "decoupled_weight_decay" in group}
    if len(decoupled) == 1:  # torch's Adam and AdamW record it
        return "AdamW" if decoupled.pop() else "Adam"
    try:
        config = read_optimizer(section)
    except ConfigError:
        return None
    if config is None:
        return None
    kind = config.implementation.rpartition(".")[2]
    states = {state for part in trained.values() for state in part.states} - {PARAMETER}
    adam = kind.startswith("Adam") and kind in ("Adam", "AdamW")
    return None if states and adam != ({"exp_avg", "exp_avg_sq"} <= states) else kind


def scheduler_state(
    config: Mapping[str, Any], saved: Any, groups: list[dict[str, Any]], left_out: list[str]
) -> dict[str, Any] | None:
    """Return the state of the config's LR schedule, in the form of uni3d's scheduler.

    Return None, with the reason in `left_out`, if the schedule isn't the config's or doesn't give the
    groups' rates; None alone if there was no schedule.
    """
    if saved is None:
        return None
    iteration = saved.get("last_batch_iteration") if isinstance(saved, Mapping) else None
    try:
        section = read_scheduler(config.get("scheduler"))
    except ConfigError as error:
        section, reason = None, str(error)
    else:
        reason = "the config has no scheduler; it was the script's own"
    if section is None or not isinstance(iteration, int):
        left_out.append(f"LR schedule: {reason}")
        return None
    wanted = [float(group["lr"]) for group in groups]
    params = (config.get("optimizer") or {}).get("params") or {}
    try:
        section.params.of_group(0, len(groups))
    except ValueError as error:
        left_out.append(f"LR schedule: {error}")
        return None
    for base in _possible_rates(section, iteration + 1, groups, params.get("lr")):
        schedule = _schedule_at(section, iteration + 1, base, groups)
        rates = [float(lr) for lr in schedule.get_last_lr()]
        if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-15) for a, b in zip(rates, wanted, strict=True)):
            state: dict[str, Any] = schedule.state_dict()
            return state
    left_out.append(
        f"LR schedule: {section.type} doesn't give the groups' learning rates {wanted} at iteration "
        f"{iteration}"
    )
    return None


def _possible_rates(
    section: Any, epoch: int, groups: list[dict[str, Any]], configured: Any
) -> Iterator[list[float]]:
    """Yield candidates for the groups' base learning rates, which aren't always stored."""
    now = [float(group["lr"]) for group in groups]
    if all("initial_lr" in group for group in groups):
        yield [float(group["initial_lr"]) for group in groups]
    if isinstance(configured, int | float) and configured > 0:
        yield [float(configured)] * len(groups)
    shares = _schedule_at(section, epoch, [1.0] * len(groups), groups).get_last_lr()
    if all(shares):
        yield [lr / share for lr, share in zip(now, shares, strict=True)]


def _schedule_at(section: Any, epoch: int, rates: list[float], groups: list[dict[str, Any]]) -> Any:
    """Return uni3d's scheduler over groups of these base rates, after `epoch` steps. Loads torch."""
    import torch

    from uni3d.optim.schedule_classes import make_scheduler

    optimizer = torch.optim.AdamW(
        [
            {"params": [torch.zeros(1)], "lr": lr, **({"betas": tuple(g["betas"])} if "betas" in g else {})}
            for lr, g in zip(rates, groups, strict=True)
        ]
    )
    schedule = make_scheduler(section, optimizer)
    if epoch > 0:
        optimizer.step()
        schedule.last_epoch, schedule._step_count = epoch - 1, epoch
        schedule.step()
    return schedule


def loss_scale(config: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return fp16's loss scale in the manifest's form; None without fp16."""
    section = config.get("fp16") or {}
    if as_boolean(section.get("enabled")) is not True:
        return None
    scaler = optimizer.get("loss_scaler")
    saved: Mapping[str, Any] = scaler.state if isinstance(scaler, StandIn) and scaler.state else optimizer
    begun = saved.get("cur_iter", 0) - saved.get("last_overflow_iter", -1) - 1
    return {
        "scale": float(saved.get("cur_scale", 1.0)),
        "terms": None,  # uni3d's own divisor, set by the first batch
        "hysteresis": int(saved.get("cur_hysteresis", as_integer(section.get("hysteresis", 2)))),
        "good_steps": int(begun),
    }


def client_state(model: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    """Return the script's own entries; those that JSON can't represent are added to `left_out`."""
    own = {key: value for key, value in model.items() if key not in _OWN_KEYS}
    found = plain_entries(own, "client_state ", left_out)
    for key in ("data_sampler", "random_ltd"):
        if model.get(key) is not None:
            left_out.append(f"{key}: not supported")
    return found


def batch_size(config: Mapping[str, Any], model: Mapping[str, Any]) -> int | None:
    """Return the number of samples in a global batch, from the config."""
    if isinstance(total := as_integer(config.get("train_batch_size")), int):
        return total
    micro, ranks = as_integer(config.get("train_micro_batch_size_per_gpu")), model.get("dp_world_size")
    if isinstance(micro, int) and isinstance(ranks, int):
        accumulation = as_integer(config.get("gradient_accumulation_steps", 1))
        return micro * ranks * (accumulation if isinstance(accumulation, int) else 1)
    return None
