"""An optimizer's record in a checkpoint, as the `state_dict` of torch's optimizer of that class has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ckpt
from ckpt.parts import ArrayInfo
from uni3d.manifest import OptimizerRecord, RunManifest, is_extra

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_BY_PARAMETER_NO = ("LBFGS", "SparseAdam")
"""Classes of torch whose states aren't dense tensors of each parameter's."""


class TorchOptimizer(NamedTuple):
    """Groups and states by parameter name."""

    groups: list[dict[str, Any]]
    """Hyperparameters, all that the class has, and names under `params`."""
    states: dict[str, dict[str, Any]]
    """Parameter -> state -> the stored array, or the value: a tensor where torch has one."""


def read_optimizer(checkpoint: ckpt.Checkpoint) -> TorchOptimizer:
    """Return the optimizer of a checkpoint. Its arrays aren't read.

    Raises:
        ValueError: it has none, or one that isn't torch's, or states that torch's class doesn't have.
    """
    manifest = RunManifest.of(checkpoint)
    record = manifest.optimizer
    if record is None:
        raise ValueError(f"{checkpoint.url} has no optimizer; export its weights alone")
    if any((record.extra_state or {}).values()):
        raise ValueError(f"{checkpoint.url}: {record.type} has states of its own beside those of parameters")
    arrays: dict[str, dict[str, ArrayInfo]] = {}
    for key, info in checkpoint.arrays.items():
        if key.state not in ("fp32", "value") and not is_extra(key.state):
            arrays.setdefault(key.atom, {})[key.state] = info
    groups, states = [], dict[str, dict[str, Any]]()
    for values in record.groups:
        group, like = _made(record, values)
        groups.append(group | {"params": values["params"]})
        for name in values["params"]:
            found = {**arrays.get(name, {}), **record.scalars.get(name, {})}
            if not found and like and manifest.model.trains(name):
                raise ValueError(
                    f"{checkpoint.url}: {record.type} has no state for {name}, which hasn't been trained "
                    "yet; export another tag, or the weights alone"
                )
            if found:
                states[name] = {key: _like(like, key, value, record) for key, value in found.items()}
    return TorchOptimizer(groups, states)


def adam_step(checkpoint: ckpt.Checkpoint, optimizer: TorchOptimizer, form: str) -> float:
    """Return Adam's one step count, for the format `form`, which holds only that.

    Raises:
        ValueError: the states aren't those of Adam without `amsgrad`, or parameters have different counts.
    """
    record = RunManifest.of(checkpoint).optimizer
    kind = record.type if record else None
    if kind not in ("Adam", "AdamW"):
        raise ValueError(f"{form} holds the states of Adam and AdamW, not of {kind}")
    steps: dict[float, str] = {}
    for name, state in optimizer.states.items():
        if state.keys() != {*ADAM_MOMENTS, "step"}:
            raise ValueError(
                f"{checkpoint.url}: {name} has the states {', '.join(sorted(state))}; {form} holds "
                f"{', '.join(ADAM_MOMENTS)} and step"
            )
        steps.setdefault(float(state["step"]), name)
    if len(steps) != 1:
        counts = " and ".join(f"{name} has taken {step:g}" for step, name in list(steps.items())[:2])
        raise ValueError(
            f"{checkpoint.url}: {counts or 'no parameter has taken'} steps; {form} has one count"
        )
    return next(iter(steps))


def _made(record: OptimizerRecord, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a group as torch's class makes it of these hyperparameters, and the states after a step."""
    kind = getattr(torch.optim, record.type, None)
    if not isinstance(kind, type) or record.type in _BY_PARAMETER_NO:
        raise ValueError(
            f"the optimizer {record.type} isn't one of torch.optim's with states by parameter, so its states "
            "can't be loaded by torch; export the weights alone"
        )
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = kind([parameter])
    group = optimizer.param_groups[0]
    given = {key: value for key, value in values.items() if key != "params"}
    group.update({key: _as_given(group.get(key), value) for key, value in given.items()})
    made = {key: value for key, value in group.items() if key != "params"}
    parameter.grad = torch.zeros(2, 2)
    optimizer.step()
    return made, dict(optimizer.state[parameter])


def _as_given(default: Any, value: Any) -> Any:
    return tuple(value) if isinstance(default, tuple) else value


def _like(like: Mapping[str, Any], key: str, value: Any, record: OptimizerRecord) -> Any:
    """Return a state in the form that it has in torch; JSON doesn't tell tensors from numbers."""
    if isinstance(value, ArrayInfo):
        return value
    if key not in like:
        raise ValueError(f"torch's {record.type} has no state {key!r}; export the weights alone")
    example = like[key]
    return torch.tensor(value, dtype=example.dtype) if isinstance(example, Tensor) else value
