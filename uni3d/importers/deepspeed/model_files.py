"""What DeepSpeed's model files hold themselves: frozen parameters, buffers, and all of it without ZeRO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import CheckpointError
from uni3d.importers.deepspeed.zero import Checked, ParameterPart, RankFiles, Read
from uni3d.importers.source import PARAMETER, Options
from uni3d.importers.torch_tensors import StoredTensor

TIED = "tied_modules."
"""How the names of parameters begin that several layers of a pipeline share."""


def buffer_names(stages: Sequence[RankFiles]) -> set[str]:
    return {str(name) for rank in stages for name in rank.models[0].get("buffer_names") or []}


def buffers(stages: Sequence[RankFiles]) -> dict[str, StoredTensor]:
    """The persistent buffers of a tensor-parallel rank."""
    names = buffer_names(stages)
    return {n: t for n, t in stages[0].module.items() if n in names and isinstance(t, StoredTensor)}


def untrained(
    stages: Sequence[RankFiles],
    trained: Mapping[str, ParameterPart],
    aliases: dict[str, str],
    left_out: list[str],
) -> dict[str, ParameterPart]:
    """The frozen parameters of a tensor-parallel rank.

    Other names of tied weights that are found are added to `aliases`; copies of a pipeline's tied weights in
    the files of its layers, and what isn't a tensor, to `left_out`.
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
        elif tensor.dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise CheckpointError(
                f"{where}: {name} is neither a buffer nor a parameter, by its type {tensor.dtype}"
            )
        else:
            found[name] = ParameterPart(shape=tensor.shape, origin=where, states={PARAMETER: tensor.read})
            same[tensor.identity] = name
    return found


def _tied_copy(name: str, tensor: StoredTensor, trained: Mapping[str, ParameterPart]) -> str | None:
    """The tied parameter of a pipeline that a layer's file has too, under the layer's name."""
    layer, _, inner = name.partition(".")
    if not layer.isdigit():
        return None
    for tied, part in trained.items():
        if tied.startswith(TIED) and tied.split(".", 2)[2] == inner and part.shape == tensor.shape:
            with suppress(CheckpointError):  # it is another parameter that looks like it
                Checked(part.states[PARAMETER], tensor, name)()
                return tied
    return None


def _frozen(rank: RankFiles, name: str, shape: tuple[int, ...]) -> ParameterPart:
    """A frozen parameter as ZeRO-2 and 3 save it: whole, or in equal parts on the data-parallel ranks."""
    fragments: list[StoredTensor] = [model["frozen_param_fragments"][name] for model in rank.models]

    def read() -> npt.NDArray[Any]:
        flat = np.concatenate([fragment.read().reshape(-1) for fragment in fragments])
        return flat[: prod(shape)].reshape(shape)

    if sum(fragment.size for fragment in fragments) < prod(shape):
        raise CheckpointError(
            f"{rank.where}: the frozen {name} has too few elements for the shape {list(shape)}"
        )
    return ParameterPart(shape=shape, origin=rank.where, states={PARAMETER: read})


# --- without ZeRO -----------------------------------------------------------------------------------------


def numbered_parts(rank: RankFiles, left_out: list[str], options: Options) -> dict[str, ParameterPart]:
    """Without ZeRO: the parameters with the optimizer's states, which are only numbered.

    They are given to the parameters in the model's order, if that is asked for: each group has those of
    its parameters in this order, and which group is next follows from the shapes, if only one can be.

    Raises:
        CheckpointError: it doesn't come out even, or there is a choice.
    """
    wrapped = rank.models[0].get("optimizer")
    if not isinstance(wrapped, Mapping):
        return {}
    if not options.in_model_order:
        left_out.append(
            "the optimizer, and fp32 masters where it keeps them: without ZeRO they are only numbered; "
            "--in-model-order takes them in the order of the model's parameters"
        )
        return {}
    inner = wrapped.get("optimizer_state_dict", wrapped)  # as fp16 and bf16 keep it
    queues = [list(group["params"]) for group in inner["param_groups"]]
    masters = _masters(wrapped, inner)
    names = {
        name: tensor
        for name, tensor in _parameter_names(rank).items()
        if not any(fnmatchcase(name, pattern) for pattern in options.frozen)
    }
    _check_none_is_frozen(
        rank, names, [_shape(inner["state"], masters, n) for queue in queues for n in queue]
    )
    found: dict[str, ParameterPart] = {}
    for name, tensor in names.items():
        homes = [
            g
            for g, queue in enumerate(queues)
            if queue and _shape(inner["state"], masters, queue[0]) == tensor.shape
        ]
        if len(homes) > 1:
            raise CheckpointError(
                f"{rank.where}: by its shape, {name} may be the next of several parameter groups; without "
                "ZeRO DeepSpeed doesn't say which; import with --weights-only"
            )
        if homes:  # else it is frozen
            number = queues[homes[0]].pop(0)
            found[name] = _numbered(rank, name, tensor, inner["state"][number], masters.get(number), homes[0])
    if any(queues):
        raise CheckpointError(
            f"{rank.where}: {sum(map(len, queues))} of the optimizer's states are of no parameter in the "
            "model's order; import with --weights-only"
        )
    return found


def _check_none_is_frozen(
    rank: RankFiles, names: Mapping[str, StoredTensor], shapes: Sequence[tuple[int, ...] | None]
) -> None:
    """Refuse parameters without states that have the shape of others with them: nothing tells them apart."""
    parameters, states = Counter(tensor.shape for tensor in names.values()), Counter(shapes)
    for shape, number in states.items():
        if shape is not None and parameters[shape] > number:
            raise CheckpointError(
                f"{rank.where}: of {parameters[shape]} parameters of the shape {list(shape)} only {number} "
                "have states, and without ZeRO DeepSpeed doesn't say which; name the others by --frozen, or "
                "import with --weights-only"
            )


def _numbered(
    rank: RankFiles,
    name: str,
    tensor: StoredTensor,
    state: Mapping[str, Any],
    master: StoredTensor | None,
    group: int,
) -> ParameterPart:
    origin = f"{rank.where}: {name}"
    read: Read = tensor.read if master is None else Checked(master.read, tensor, origin)
    arrays = {str(k): v for k, v in state.items() if isinstance(v, StoredTensor) and v.shape}
    numbers = {str(k): v for k, v in state.items() if k not in arrays}
    return ParameterPart(
        shape=tensor.shape,
        origin=rank.where,
        states={PARAMETER: read, **{key: value.read for key, value in arrays.items()}},
        group=group,
        scalars={k: float(v.read()) if isinstance(v, StoredTensor) else float(v) for k, v in numbers.items()},
    )


def _masters(wrapped: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[int, StoredTensor]:
    """The fp32 copies that fp16 keeps, by the number of the parameter."""
    if "fp32_groups_flat" in wrapped:
        raise CheckpointError("the optimizer's states are of flat groups (FP16_Optimizer), which aren't read")
    groups = wrapped.get("fp32_groups") or []
    numbers = [group["params"] for group in inner["param_groups"]]
    return {n: t for ns, ts in zip(numbers, groups, strict=False) for n, t in zip(ns, ts, strict=True)}


def _shape(
    states: Mapping[Any, Any], masters: Mapping[int, StoredTensor], number: int
) -> tuple[int, ...] | None:
    if number in masters:
        return masters[number].shape
    state = states.get(number) or {}
    return next((t.shape for t in state.values() if isinstance(t, StoredTensor) and t.shape), None)


def _parameter_names(rank: RankFiles) -> dict[str, StoredTensor]:
    """The module's parameters in order, each tied one once."""
    names = set(rank.models[0].get("buffer_names") or [])
    seen: dict[Any, tuple[str, StoredTensor]] = {}
    for name, tensor in rank.module.items():
        if isinstance(tensor, StoredTensor) and name not in names:
            seen.setdefault(tensor.identity, (name, tensor))
    return dict(seen.values())
