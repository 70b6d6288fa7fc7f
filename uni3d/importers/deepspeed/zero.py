"""DeepSpeed's flat partitions in the optimizer files of one model-parallel rank.

ZeRO-1 and 2 flatten the parameters of a group end to end and split the result among the data-parallel ranks;
ZeRO-3 splits each parameter and flattens each rank's parts of a group (Rajbhandari et al. 2020; these are the
layouts that `deepspeed/utils/zero_to_fp32.py` undoes). Offsets follow from `param_shapes` in the model file.
The optimizer files' own `param_slice_mappings` aren't used: with `round_robin_gradients`, DeepSpeed 0.19
writes them in another order than the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import numpy as np

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.pickles import StandIn
from uni3d.importers.source import PARAMETER, Array, Read
from uni3d.importers.torch_tensors import StoredTensor, item

Shapes = Mapping[str, tuple[int, ...]]
Piece = tuple[int, int, int]
"""Data-parallel rank, first element in its partition, number of elements."""


@dataclass(frozen=True, kw_only=True)
class ParameterPart:
    """One model-parallel rank's part of a parameter: all of it, or its tensor-parallel shard."""

    shape: tuple[int, ...]
    origin: str
    states: dict[str, Read]
    """`fp32` and the optimizer's states."""
    group: int | None = None
    """The optimizer's parameter group; None if the parameter is frozen."""
    scalars: dict[str, float] = field(default_factory=dict)


Parts = Mapping[str, ParameterPart]
"""Parameters by name."""


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """Unpickled files of one model-parallel rank."""

    where: str
    models: list[Mapping[str, Any]]
    """Content of `*_model_states.pt`; with ZeRO-3 one for each data-parallel rank."""
    optimizers: list[Mapping[str, Any]]
    """`optimizer_state_dict` of `*_optim_states.pt`, one for each data-parallel rank; none without ZeRO."""
    module: Mapping[str, Any]
    """The state_dict of this tensor-parallel rank, of all pipeline stages."""
    verify: bool
    """True if masters are compared with the weights in the model file."""


def zero_stage(optimizer: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of an optimizer file."""
    stage = optimizer.get("zero_stage", 1)  # BF16_Optimizer has none, and the layout of stage 1
    return int(stage.args[0] if isinstance(stage, StandIn) else stage)


def groups_of(rank: RankFiles) -> list[dict[str, Any]]:
    """Return the parameter groups of DeepSpeed's optimizer."""
    inner = _inner(rank.optimizers[0])
    if isinstance(inner, list | tuple):
        raise CheckpointError(
            f"{rank.where} was saved with elastic_checkpoint, which isn't supported; save it without"
        )
    return [dict(group) for group in inner["param_groups"]]


def parts(rank: RankFiles) -> dict[str, ParameterPart]:
    """Return the trained parameters of a model-parallel rank, by name."""
    groups_of(rank)
    stage = zero_stage(rank.optimizers[0])
    shapes = rank.models[0].get("param_shapes")
    if not shapes:
        raise CheckpointError(f"{rank.where} has no param_shapes; load and save it with a newer DeepSpeed")
    counts = rank.optimizers[0].get("partition_count", len(rank.optimizers))
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count != len(rank.optimizers):
            raise CheckpointError(
                f"{rank.where} was written by {count} data-parallel ranks, but has {len(rank.optimizers)} "
                "files *_optim_states.pt; all must be present (expert parallelism isn't supported)"
            )
    make = _sharded if stage == 3 else _flat
    found: dict[str, ParameterPart] = {}
    for index, group in enumerate(shapes):
        for name, part in make(rank, index, {str(n): tuple(s) for n, s in group.items()}):
            if name in found:
                raise CheckpointError(f"{rank.where} has {name} in two parameter groups")
            found[name] = part
    return found


def _flat(rank: RankFiles, group: int, shapes: Shapes) -> Iterator[tuple[str, ParameterPart]]:
    """Yield the parameters of a ZeRO-1 or 2 group, flattened end to end and split in equal partitions."""
    states = _states(rank, group, [o["single_partition_of_fp32_groups"][group] for o in rank.optimizers])
    gaps = (rank.optimizers[0].get("param_alignment_paddings") or {group: [0] * len(shapes)})[group]
    total = sum(prod(shape) for shape in shapes.values()) + sum(gaps)
    sizes = [flat.size for flat in states[PARAMETER]]
    size = sizes[0]  # only padding behind the last parameter may be missing
    full = total // size if size else 0  # number of partitions without padding
    if len(gaps) != len(shapes) or sizes[:full] != [size] * full or size * len(sizes) < total:
        raise CheckpointError(f"{rank.where}: group {group} has partitions of {sizes}, expected {total}")
    offset = 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        pieces = _intervals(offset, prod(shape), size)
        offset += prod(shape) + gap
        yield name, _part(rank, name, shape, group, group, states, pieces)


def _sharded(rank: RankFiles, sub_group: int, shapes: Shapes) -> Iterator[tuple[str, ParameterPart]]:
    """Yield the parameters of a ZeRO-3 group: `ceil(n / ranks)` elements of each on every rank."""
    states = _states(rank, sub_group, [o["fp32_flat_groups"][sub_group] for o in rank.optimizers])
    groups = _inner(rank.optimizers[0])["param_groups"]
    homes = [i for i, group in enumerate(groups) if sub_group in group["params"]]
    offset = 0
    for name, shape in shapes.items():
        share = -(-prod(shape) // len(rank.optimizers))
        counts = [min(share, max(0, prod(shape) - i * share)) for i in range(len(rank.optimizers))]
        pieces = [(i, offset, n) for i, n in enumerate(counts)]
        offset += share
        yield name, _part(rank, name, shape, sub_group, homes[0] if homes else None, states, pieces)


def _part(
    rank: RankFiles,
    name: str,
    shape: tuple[int, ...],
    index: int,
    group: int | None,
    states: Mapping[str, Sequence[StoredTensor]],
    pieces: list[Piece],
) -> ParameterPart:
    """Return a parameter that lies in `pieces` of the flat group `index`."""
    reads = {
        state: _reader(flats, pieces, shape, f"{rank.where}: {name}/{state}")
        for state, flats in states.items()
    }
    weights = rank.module.get(name)  # with ZeRO-3 the model file has none
    if rank.verify and isinstance(weights, StoredTensor) and weights.shape == shape:
        reads[PARAMETER] = partial(checked, reads[PARAMETER], weights, f"{rank.where}: {name}")
    scalars = _scalars(rank, index, reads.keys())
    return ParameterPart(shape=shape, origin=rank.where, states=reads, group=group, scalars=scalars)


def _reader(flats: Sequence[StoredTensor], pieces: list[Piece], shape: tuple[int, ...], origin: str) -> Read:
    """Return the reader of a parameter's state, which lies in pieces in the ranks' flat partitions."""
    held = [piece for piece in pieces if piece[2]]
    for index, start, length in held:
        if start + length > flats[index].size:
            raise CheckpointError(
                f"{origin} ends at element {start + length} of a partition of {flats[index].size}; the "
                "files are inconsistent"
            )

    def read() -> Array:
        parts = [flats[i].read().reshape(-1)[start : start + n] for i, start, n in held]
        if len(parts) == 1:
            return parts[0].reshape(shape)
        return np.concatenate(parts or [np.empty(0, numpy_dtype(flats[0].dtype))]).reshape(shape)

    return read


def checked(read: Read, weights: StoredTensor, origin: str) -> Array:
    """Return the masters, compared with the half-precision weights: rounded, they must be equal."""
    masters, halves = read(), weights.read()
    with np.errstate(over="ignore"):
        rounded = masters.astype(halves.dtype)
    if not ((rounded == halves) | (np.isnan(rounded) & np.isnan(halves))).all():
        raise CheckpointError(
            f"{origin}: the fp32 master differs from the weights in the model file; files are from different "
            "saves, or were converted wrongly (docs/importing.md; --no-checksums takes the master anyway)"
        )
    return masters


def _states(rank: RankFiles, index: int, masters: list[StoredTensor]) -> dict[str, list[StoredTensor]]:
    """Return the masters and optimizer states of a flat group, by data-parallel rank."""
    found: dict[str, list[StoredTensor]] = {PARAMETER: masters}
    everyone = [_state(optimizer, index) for optimizer in rank.optimizers]
    for name, value in everyone[0].items():
        if isinstance(value, StoredTensor) and value.shape:
            try:
                found[str(name)] = [state[name] for state in everyone]
            except KeyError:
                raise CheckpointError(
                    f"{rank.where}: only some data-parallel ranks have optimizer state {name}"
                ) from None
    return found


def _scalars(rank: RankFiles, index: int, arrays: Any) -> dict[str, float]:
    """Return the scalar states of a group, which must be equal on all ranks."""
    found: dict[str, float] = {}
    for optimizer in rank.optimizers:
        state = _state(optimizer, index)
        for name, value in state.items():
            if name in arrays:
                continue
            scalar = float(item(value))
            if found.setdefault(str(name), scalar) != scalar:
                raise CheckpointError(f"{rank.where}: {name} of group {index} differs between ranks")
    return found


def _inner(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state_dict of the optimizer that DeepSpeed wraps."""
    found: Mapping[str, Any] = (
        optimizer["optimizer_state_dict"] if zero_stage(optimizer) == 3 else optimizer["base_optimizer_state"]
    )
    return found


def _state(optimizer: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    return dict(_inner(optimizer)["state"].get(index, {}))


def _intervals(offset: int, length: int, size: int) -> list[Piece]:
    """Return the pieces of `length` elements from `offset` on, in partitions of `size` elements."""
    pieces = []
    for index in range(offset // size, -(-(offset + length) // size)) if length else ():
        start, end = max(offset, index * size), min(offset + length, (index + 1) * size)
        pieces.append((index, start - index * size, end - start))
    return pieces
