"""DeepSpeed's flat partitions: the parameters that one model-parallel rank's optimizer files hold.

ZeRO-1 and 2 lay the parameters of a group end to end, and cut that into a partition for each data-parallel
rank; ZeRO-3 cuts each parameter, and lays end to end what a rank has of a group (Rajbhandari et al. 2020; the
layouts are those that `deepspeed/utils/zero_to_fp32.py` undoes). What lies where follows from `param_shapes`
in the model file. The optimizer files' own `param_slice_mappings` aren't used: with `round_robin_gradients`
DeepSpeed 0.19 writes them in another order than the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.pickles import StandIn
from uni3d.importers.source import PARAMETER
from uni3d.importers.torch_tensors import StoredTensor

Array = npt.NDArray[Any]
Read = Callable[[], Array]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ParameterPart:
    """What one model-parallel rank has of a parameter: all of it, unless tensor parallelism cuts it."""

    shape: tuple[int, ...]
    origin: str
    states: dict[str, Read]
    """`fp32`, and the optimizer's."""
    group: int | None = None
    """The optimizer's parameter group; None for a frozen one."""
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RankFiles:
    """The files of one model-parallel rank, as they were unpickled."""

    where: str
    models: list[Mapping[str, Any]]
    """`*_model_states.pt`; under ZeRO-3 one for each data-parallel rank."""
    optimizers: list[Mapping[str, Any]]
    """`optimizer_state_dict` of `*_optim_states.pt`, one for each data-parallel rank; none without ZeRO."""
    module: Mapping[str, Any]
    """The model's own state_dict, as this tensor-parallel rank has it; of all pipeline stages."""
    verify: bool
    """Whether masters are compared with the weights in the model file."""


def zero_stage(optimizer: Mapping[str, Any]) -> int:
    """Of one optimizer file."""
    stage = optimizer.get("zero_stage", 1)  # its BF16_Optimizer, which is laid out like stage 1, has none
    return int(stage.args[0] if isinstance(stage, StandIn) else stage)


def groups_of(rank: RankFiles) -> list[dict[str, Any]]:
    """The hyperparameters of each parameter group, as DeepSpeed's optimizer has them."""
    inner = _inner(rank.optimizers[0])
    if isinstance(inner, list | tuple):
        raise CheckpointError(
            f"{rank.where} was saved with elastic_checkpoint, which isn't read; save it without"
        )
    return [dict(group) for group in inner["param_groups"]]


def parts(rank: RankFiles) -> dict[str, ParameterPart]:
    """The trained parameters of a model-parallel rank, by name.

    Raises:
        CheckpointError: the files don't fit together.
    """
    groups_of(rank)
    stage = zero_stage(rank.optimizers[0])
    shapes = rank.models[0].get("param_shapes")
    if not shapes:
        raise CheckpointError(f"{rank.where} has no param_shapes; load and save it by a newer DeepSpeed")
    counts = rank.optimizers[0].get("partition_count", len(rank.optimizers))
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count != len(rank.optimizers):
            raise CheckpointError(
                f"{rank.where} was written by {count} data-parallel ranks, and has {len(rank.optimizers)} "
                "files *_optim_states.pt; all must be there (experts' groups, which have others, aren't read)"
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
    """ZeRO-1 and 2: a group's parameters end to end, cut in equal partitions."""
    states = _states(rank, group, [o["single_partition_of_fp32_groups"][group] for o in rank.optimizers])
    gaps = (rank.optimizers[0].get("param_alignment_paddings") or {group: [0] * len(shapes)})[group]
    total = sum(prod(shape) for shape in shapes.values()) + sum(gaps)
    sizes = [flat.size for flat in states[PARAMETER]]
    size = sizes[0]  # only what lies behind the last parameter may have been cut off
    full = total // size if size else 0  # partitions without padding
    if len(gaps) != len(shapes) or sizes[:full] != [size] * full or size * len(sizes) < total:
        raise CheckpointError(
            f"{rank.where}: group {group} has {total} elements by param_shapes, but partitions of {sizes}"
        )
    offset = 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        pieces = _intervals(offset, prod(shape), size)
        reads = {
            state: _Pieces(flats, pieces, shape, f"{rank.where}: {name}/{state}")
            for state, flats in states.items()
        }
        offset += prod(shape) + gap
        yield name, _part(rank, name, shape, group, group, reads)


def _sharded(rank: RankFiles, sub_group: int, shapes: Shapes) -> Iterator[tuple[str, ParameterPart]]:
    """ZeRO-3: of each parameter `ceil(n / ranks)` elements on each rank, end to end."""
    states = _states(rank, sub_group, [o["fp32_flat_groups"][sub_group] for o in rank.optimizers])
    groups = _inner(rank.optimizers[0])["param_groups"]
    homes = [i for i, group in enumerate(groups) if sub_group in group["params"]]
    offset = 0
    for name, shape in shapes.items():
        share = -(-prod(shape) // len(rank.optimizers))
        pieces = [
            (i, offset, min(share, max(0, prod(shape) - i * share))) for i in range(len(rank.optimizers))
        ]
        reads = {
            state: _Pieces(flats, pieces, shape, f"{rank.where}: {name}/{state}")
            for state, flats in states.items()
        }
        offset += share
        yield name, _part(rank, name, shape, sub_group, homes[0] if homes else None, reads)


def _part(
    rank: RankFiles,
    name: str,
    shape: tuple[int, ...],
    index: int,
    group: int | None,
    reads: dict[str, _Pieces],
) -> ParameterPart:
    states: dict[str, Read] = dict(reads)
    weights = rank.module.get(name)
    if rank.verify and isinstance(weights, StoredTensor) and weights.shape == shape:  # ZeRO-3 has none there
        states[PARAMETER] = Checked(reads[PARAMETER], weights, f"{rank.where}: {name}")
    return ParameterPart(
        shape=shape,
        origin=rank.where,
        states=states,
        group=group,
        scalars=_scalars(rank, index, reads.keys()),
    )


class _Pieces:
    """A parameter's state, put together from the ranks' flat partitions."""

    def __init__(
        self,
        flats: Sequence[StoredTensor],
        pieces: Sequence[tuple[int, int, int]],
        shape: tuple[int, ...],
        origin: str,
    ) -> None:
        """`pieces` are the data-parallel rank, the first element and the number of elements of each."""
        self._flats, self._shape = flats, shape
        self._pieces = [piece for piece in pieces if piece[2]]
        for index, start, length in self._pieces:
            if start + length > flats[index].size:
                raise CheckpointError(
                    f"{origin} should reach to element {start + length} of a partition that has "
                    f"{flats[index].size}; the files don't fit together"
                )

    def __call__(self) -> Array:
        parts = [self._flats[i].read().reshape(-1)[start : start + n] for i, start, n in self._pieces]
        if len(parts) == 1:
            return parts[0].reshape(self._shape)
        dtype = numpy_dtype(self._flats[0].dtype)
        return np.concatenate(parts or [np.empty(0, dtype)]).reshape(self._shape)


class Checked:
    """Masters, compared with the weights that were made of them: they must be the same, rounded."""

    def __init__(self, read: Read, weights: StoredTensor, origin: str) -> None:
        self._read, self._weights, self._origin = read, weights, origin

    def __call__(self) -> Array:
        masters, weights = self._read(), self._weights.read()
        with np.errstate(over="ignore"):
            rounded = masters.astype(weights.dtype)
        if not ((rounded == weights) | (np.isnan(rounded) & np.isnan(weights))).all():
            raise CheckpointError(
                f"{self._origin}: the fp32 master isn't that of the weights in the model file; the files are "
                "not of the same save, or were put together wrongly (docs/importing.md says how that can be; "
                "--no-checksums takes the master all the same)"
            )
        return masters


def _states(rank: RankFiles, index: int, masters: list[StoredTensor]) -> dict[str, list[StoredTensor]]:
    """The flat partitions of a group: the masters and the optimizer's states, by data-parallel rank."""
    found: dict[str, list[StoredTensor]] = {PARAMETER: masters}
    everyone = [_state(optimizer, index) for optimizer in rank.optimizers]
    for name, value in everyone[0].items():
        if isinstance(value, StoredTensor) and value.shape:
            try:
                found[str(name)] = [state[name] for state in everyone]
            except KeyError:
                raise CheckpointError(f"{rank.where}: only some ranks have the state {name}") from None
    return found


def _scalars(rank: RankFiles, index: int, arrays: Any) -> dict[str, float]:
    """The states of a group that are one number, which all ranks have alike."""
    found: dict[str, float] = {}
    for optimizer in rank.optimizers:
        state = _state(optimizer, index)
        for name, value in state.items():
            if name in arrays:
                continue
            number = float(value.read()) if isinstance(value, StoredTensor) else float(value)
            if found.setdefault(str(name), number) != number:
                raise CheckpointError(f"{rank.where}: the ranks have other values of {name} of group {index}")
    return found


def _inner(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state_dict of the optimizer that DeepSpeed wraps."""
    found: Mapping[str, Any] = (
        optimizer["optimizer_state_dict"] if zero_stage(optimizer) == 3 else optimizer["base_optimizer_state"]
    )
    return found


def _state(optimizer: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    return dict(_inner(optimizer)["state"].get(index, {}))


def _intervals(offset: int, length: int, size: int) -> list[tuple[int, int, int]]:
    """Which elements of which partitions of `size` are those from `offset` on."""
    pieces = []
    for index in range(offset // size, -(-(offset + length) // size)) if length else ():
        start, end = max(offset, index * size), min(offset + length, (index + 1) * size)
        pieces.append((index, start - index * size, end - start))
    return pieces
