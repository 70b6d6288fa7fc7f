"""Content of DeepSpeed's model files: frozen parameters, buffers, and without ZeRO the optimizer too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ckpt import CheckpointError
from uni3d.importers.deepspeed.zero import ParameterPart, Parts, RankFiles, checked
from uni3d.importers.source import FLOATS, PARAMETER, Array, Options, Read
from uni3d.importers.torch_tensors import StoredTensor, item

TIED = "tied_modules."
"""Prefix of parameters that several layers of a pipeline share."""


def buffer_names(stages: Sequence[RankFiles]) -> set[str]:
    return {str(name) for rank in stages for name in rank.models[0].get("buffer_names") or []}


def buffers(stages: Sequence[RankFiles]) -> dict[str, StoredTensor]:
    """Return the persistent buffers of a tensor-parallel rank."""
    names = buffer_names(stages)
    return {n: t for n, t in stages[0].module.items() if n in names and isinstance(t, StoredTensor)}


def untrained(
    stages: Sequence[RankFiles], trained: Parts, aliases: dict[str, str], left_out: list[str]
) -> dict[str, ParameterPart]:
    """Return the frozen parameters of a tensor-parallel rank.

    Names of tied weights that are found are added to `aliases`. Copies of a pipeline's tied weights in layer
    files, and entries that aren't tensors, are added to `left_out`.
    """
    found: dict[str, ParameterPart] = {}
    for rank in stages:
        for name, shape in (rank.models[0].get("frozen_param_shapes") or {}).items():
            found[str(name)] = _frozen(rank, str(name), tuple(shape))
    module, where = stages[0].module, stages[0].where
    known = {name: t for name, t in module.items() if isinstance(t, StoredTensor) and name in trained}
    same = {tensor.identity: name for name, tensor in known.items() if tensor.size}
    skip = {*trained, *found, *aliases, *buffers(stages)}
    for name, tensor in module.items():
        if name in skip:
            continue
        if not isinstance(tensor, StoredTensor):
            left_out.append(f"{name}: not a tensor")
        elif tensor.identity in same:
            aliases[name] = same[tensor.identity]
        elif copy := _tied_copy(name, tensor, trained):
            left_out.append(f"{name}: a copy of {copy}")
        elif tensor.dtype not in FLOATS:
            raise CheckpointError(
                f"{where}: {name} isn't listed as a buffer, but is no parameter: its type is {tensor.dtype}"
            )
        else:
            found[name] = ParameterPart(shape=tensor.shape, origin=where, states={PARAMETER: tensor.read})
            same[tensor.identity] = name
    return found


def _tied_copy(name: str, tensor: StoredTensor, trained: Parts) -> str | None:
    """Return the tied parameter of which a layer's file has a copy, under the layer's name."""
    layer, _, inner = name.partition(".")
    if not layer.isdigit():
        return None
    for tied, part in trained.items():
        if tied.startswith(TIED) and tied.split(".", 2)[2] == inner and part.shape == tensor.shape:
            with suppress(CheckpointError):  # another parameter of the same shape
                checked(part.states[PARAMETER], tensor, name)
                return tied
    return None


def _frozen(rank: RankFiles, name: str, shape: tuple[int, ...]) -> ParameterPart:
    """Return a frozen parameter, whole or in equal parts on the data-parallel ranks (ZeRO 2 and 3)."""
    fragments: list[StoredTensor] = [model["frozen_param_fragments"][name] for model in rank.models]

    def read() -> Array:
        flat = np.concatenate([fragment.read().reshape(-1) for fragment in fragments])
        return flat[: prod(shape)].reshape(shape)

    if sum(fragment.size for fragment in fragments) < prod(shape):
        raise CheckpointError(f"{rank.where}: frozen {name} has too few elements for shape {list(shape)}")
    return ParameterPart(shape=shape, origin=rank.where, states={PARAMETER: read})


# --- without ZeRO -----------------------------------------------------------------------------------------


def numbered_parts(rank: RankFiles, left_out: list[str], options: Options) -> dict[str, ParameterPart]:
    """Return a rank's parameters without ZeRO, where optimizer states have numbers instead of names.

    With `in_model_order` the states are matched to the parameters in the model's order. Each group keeps this
    order; the group of a parameter follows from the shapes if they allow only one.

    Raises:
        CheckpointError: the states don't match the parameters, or the match is ambiguous.
    """
    wrapped = rank.models[0].get("optimizer")
    if not isinstance(wrapped, Mapping):
        return {}
    if not options.in_model_order:
        left_out.append(
            "optimizer state, with its fp32 masters if any: without ZeRO they have numbers instead of names; "
            "--in-model-order matches them to the parameters in the model's order"
        )
        return {}
    inner = wrapped.get("optimizer_state_dict", wrapped)  # nested for fp16 and bf16
    states, queues = inner["state"], [list(group["params"]) for group in inner["param_groups"]]
    masters = _masters(wrapped, inner)
    names = {
        name: tensor
        for name, tensor in _parameter_names(rank).items()
        if not any(fnmatchcase(name, pattern) for pattern in options.frozen)
    }
    _check_none_is_frozen(rank, names, [_shape(states, masters, n) for queue in queues for n in queue])
    found: dict[str, ParameterPart] = {}
    for name, tensor in names.items():
        homes = [g for g, q in enumerate(queues) if q and _shape(states, masters, q[0]) == tensor.shape]
        if len(homes) > 1:
            raise CheckpointError(
                f"{rank.where}: {name} may belong to several parameter groups, judging by its shape, and "
                "without ZeRO DeepSpeed doesn't record which; import with --weights-only"
            )
        if homes:  # else it is frozen
            number = queues[homes[0]].pop(0)
            found[name] = _numbered(rank, name, tensor, states[number], masters.get(number), homes[0])
    if any(queues):
        raise CheckpointError(
            f"{rank.where}: {sum(map(len, queues))} optimizer states match no parameter in the model's "
            "order; import with --weights-only"
        )
    return found


def _check_none_is_frozen(
    rank: RankFiles, names: Mapping[str, StoredTensor], shapes: Sequence[tuple[int, ...] | None]
) -> None:
    """Refuse more parameters than states of one shape: the frozen ones can't be told apart."""
    parameters, states = Counter(tensor.shape for tensor in names.values()), Counter(shapes)
    for shape, number in states.items():
        if shape is not None and parameters[shape] > number:
            raise CheckpointError(
                f"{rank.where}: only {number} of {parameters[shape]} parameters of shape {list(shape)} have "
                "optimizer states, and without ZeRO DeepSpeed doesn't record which; name the others with "
                "--frozen, or import with --weights-only"
            )


def _numbered(
    rank: RankFiles,
    name: str,
    tensor: StoredTensor,
    state: Mapping[str, Any],
    master: StoredTensor | None,
    group: int,
) -> ParameterPart:
    read: Read = tensor.read
    if master is not None:
        read = partial(checked, master.read, tensor, f"{rank.where}: {name}")
    arrays = {str(k): v for k, v in state.items() if isinstance(v, StoredTensor) and v.shape}
    numbers = {str(k): v for k, v in state.items() if k not in arrays}
    return ParameterPart(
        shape=tensor.shape,
        origin=rank.where,
        states={PARAMETER: read, **{key: value.read for key, value in arrays.items()}},
        group=group,
        scalars={k: float(item(v)) for k, v in numbers.items()},
    )


def _masters(wrapped: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[int, StoredTensor]:
    """Return the fp32 masters of half-precision weights, by parameter number."""
    if "fp32_groups_flat" in wrapped:
        raise CheckpointError(
            "optimizer states in flat groups (FP16_Optimizer) aren't supported; import with --weights-only"
        )
    groups = wrapped.get("fp32_groups") or []
    numbers = [group["params"] for group in inner["param_groups"]]
    return {n: t for ns, ts in zip(numbers, groups, strict=False) for n, t in zip(ns, ts, strict=True)}


def _shape(states: Mapping[Any, Any], masters: Mapping[int, StoredTensor], n: int) -> tuple[int, ...] | None:
    if n in masters:
        return masters[n].shape
    state = states.get(n) or {}
    return next((t.shape for t in state.values() if isinstance(t, StoredTensor) and t.shape), None)


def _parameter_names(rank: RankFiles) -> dict[str, StoredTensor]:
    """Return the module's parameters in order, each tied one once."""
    names = set(rank.models[0].get("buffer_names") or [])
    seen: dict[Any, tuple[str, StoredTensor]] = {}
    for name, tensor in rank.module.items():
        if isinstance(tensor, StoredTensor) and name not in names:
            seen.setdefault(tensor.identity, (name, tensor))
    return dict(seen.values())
