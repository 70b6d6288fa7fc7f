"""Reader of the optimizer state in torch's distributed checkpoint.

Its entries have parameter names, as from `get_state_dict`, in one of two forms:

    state.<parameter>.exp_avg, param_groups.0.lr, param_groups.0.params
    state.<parameter>.exp_avg, param_groups.<parameter>.lr      with `flatten_optimizer_state_dict`

In the second form each parameter has its own hyperparameters; those with equal ones become a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from ckpt import DTYPES, CheckpointError
from uni3d.importers.dcp.names import Content, Steps
from uni3d.importers.pickles import plain
from uni3d.importers.source import FLOATS, ForeignArray, OptimizerState
from uni3d.importers.torch_tensors import StoredTensor, item
from uni3d.resume_rules import IMPLEMENTATION_KEYS


def read_optimizer(
    content: Content, keys: Mapping[str, Steps], names: Mapping[str, Any]
) -> tuple[list[ForeignArray], OptimizerState]:
    """Read the optimizer's arrays, and its other state.

    Args:
        content: the state_dict; gets a note if it has no groups.
        keys: name of each entry in the checkpoint -> its path below the optimizer's key.
        names: names of the model's tensors.

    Raises:
        CheckpointError: an entry belongs to no known parameter.
    """
    arrays: list[ForeignArray] = []
    scalars: dict[str, dict[str, Any]] = {}
    listed: dict[int, dict[str, Any]] = {}  # group by its number
    own: dict[str, dict[str, Any]] = {}  # hyperparameters by parameter
    for key, path in keys.items():
        joined = ".".join(map(str, path))
        tensor = content.tensors.get(key)
        if joined.startswith("state.") and tensor is not None and tensor.shape:
            name, state = _split(content, key, joined.removeprefix("state."), names)
            arrays.append(moment(content, key, name, state))
            continue
        value = content.number(key) if tensor is not None else content.object(key)
        for steps, each in _leaves(path, value):
            text = ".".join(map(str, steps))
            kind, _, rest = text.partition(".")
            if kind == "state":
                name, state = _split(content, key, rest, names)
                scalars.setdefault(name, {})[state] = _number(content, key, each)
            elif kind == "param_groups" and len(steps) > 2 and isinstance(steps[1], int):
                listed.setdefault(steps[1], {})[".".join(map(str, steps[2:]))] = _number(content, key, each)
            elif kind == "param_groups" and rest:
                name, hyperparameter = _split(content, key, rest, names)
                own.setdefault(name, {})[hyperparameter] = _number(content, key, each)
            elif not (kind in ("state", "param_groups") and each in ({}, [])):
                raise CheckpointError(
                    f"{content.where}: {key} is neither optimizer state nor a hyperparameter"
                )
    groups = _listed_groups(content, listed, names) if listed else _equal_groups(own)
    grouped = {name for group in groups for name in group["params"]}
    for name in (*scalars, *(array.name for array in arrays)):
        if name not in grouped:
            raise CheckpointError(
                f"{content.where} has optimizer state of {name}, but {name} is in no parameter group; with "
                "pipeline stages, save with flatten_optimizer_state_dict=True"
            )
    if not listed:
        content.note(
            "division into parameter groups: not stored; parameters with equal hyperparameters form one "
            f"group, which makes {len(groups)}"
        )
    return arrays, OptimizerState(type=kind_of(groups), groups=groups, scalars=scalars)


def moment(content: Content, key: str, name: str, state: str) -> ForeignArray:
    """Return an optimizer state as an array; floats become float32, as in uni3d."""
    tensor = content.tensors[key]
    dtype = "float32" if tensor.dtype in FLOATS else tensor.dtype
    if dtype not in DTYPES:
        raise CheckpointError(f"{content.where}: {key} has type {dtype}, which can't be stored")
    return ForeignArray(
        name=name,
        state=state,
        dtype=dtype,
        shape=tensor.shape,
        read=partial(content.read, key),
        origin=key,
        own_dtype=tensor.dtype,
        read_part=partial(content.read_part, key),
    )


def kind_of(groups: list[dict[str, Any]]) -> str | None:
    """Return the optimizer's class if its hyperparameters show it: Adam and AdamW since torch 2.6."""
    decoupled = {group.get("decoupled_weight_decay") for group in groups if "amsgrad" in group}
    if decoupled == {True}:
        return "AdamW"
    return "Adam" if decoupled == {False} else None


def _leaves(steps: Steps, value: Any) -> Iterator[tuple[Steps, Any]]:
    """Yield the leaves of a dict, or list of groups, that was stored as one object, as by older torch."""
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _leaves((*steps, str(key)), each)
    elif isinstance(value, list | tuple) and value and steps == ("param_groups",):
        for i, each in enumerate(value):
            yield from _leaves((*steps, i), each)
    else:
        yield steps, value


def _split(content: Content, key: str, text: str, names: Mapping[str, Any]) -> tuple[str, str]:
    """Split `text` into a parameter's name and the rest."""
    name = text
    while name:
        name, _, _ = name.rpartition(".")
        if name in names:
            return name, text[len(name) + 1 :]
    head = text.partition(".")[0]
    why = f"{text.rpartition('.')[0]} isn't a tensor of the model"
    if head.isdecimal():
        why = (
            f"it has numbers ({head}) for parameters, as from Optimizer.state_dict(); save the result of "
            "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
        )
    raise CheckpointError(
        f"{content.where}: optimizer entry {key} belongs to no known parameter: {why}{content.without}"
    )


def _number(content: Content, key: str, value: Any) -> Any:
    try:
        return plain(item(value) if isinstance(value, StoredTensor) and value.size == 1 else value)
    except TypeError as error:
        raise CheckpointError(f"{content.where}: {key} is {error}, which can't be stored") from None


def _listed_groups(
    content: Content, listed: dict[int, dict[str, Any]], names: Mapping[str, Any]
) -> list[dict[str, Any]]:
    groups = []
    for i, group in sorted(listed.items()):
        params = group.get("params")
        unknown = [p for p in params if p not in names] if isinstance(params, list) else ["its parameters"]
        if unknown:
            raise CheckpointError(
                f"{content.where}: parameter group {i} has {unknown[0]!r}, which isn't a tensor of the "
                "model; save the result of torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
                f"{content.without}"
            )
        groups.append({"params": params, **clean(group)})
    return groups


def _equal_groups(own: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups of parameters with equal hyperparameters, in order of first appearance."""
    groups: dict[str, dict[str, Any]] = {}
    for name, values in own.items():
        values = clean(values)
        group = groups.setdefault(json.dumps(values, sort_keys=True), {"params": [], **values})
        group["params"].append(name)
    return list(groups.values())


def clean(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's hyperparameters."""
    return {key: value for key, value in group.items() if key not in IMPLEMENTATION_KEYS}
