"""Tensors of a DCP plan as parts of arrays: the boxes that ranks write, and their data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

import ckpt
from ckpt import DTYPES, ArrayKey, ArrayLayout, Box, CheckpointError, Shard, ShardSpec, UnreadShard
from ckpt.parts import ArrayInfo
from ckpt.shards import Array
from uni3d.dcp.form import pointer
from uni3d.dcp.live import LiveStateDict
from uni3d.importers.source import ForeignArray
from uni3d.manifest import DCP_ATOM, EXTRA_STATE
from uni3d.state import to_numpy


class SavedArray(NamedTuple):
    """One array of the checkpoint, and the flat name of the tensor or the bytes that it holds."""

    name: str
    layout: ArrayLayout


def key_beside(path: Any) -> ArrayKey:
    """Return the name of the array of a tensor, or of bytes, beside model and optimizer."""
    return ArrayKey(DCP_ATOM, EXTRA_STATE + pointer(path))


def saved_arrays(
    live: LiveStateDict, arrays: Iterable[ForeignArray], beside: Iterable[str]
) -> list[SavedArray]:
    """Return the layout of every array.

    Args:
        live: the state_dict.
        arrays: what the model and the optimizer mean.
        beside: flat names of tensors and bytes beside them.

    Raises:
        CheckpointError: a tensor beside them has a type that can't be stored.
    """
    shared: dict[Any, dict[int, Box]] = {}  # planning is fast for arrays that have one mapping

    def boxes(name: str) -> dict[int, Box]:
        parts = live.parts[name]
        content = tuple(sorted(parts.items()))
        return shared.setdefault(content, {rank: Box(*part) for rank, part in parts.items()})

    found = [
        SavedArray(a.origin, ArrayLayout(ArrayKey(a.name, a.state), a.dtype, a.shape, boxes(a.origin)))
        for a in arrays
    ]
    for name in beside:
        key = key_beside(live.steps[name])
        if name in live.sizes:
            shape = (live.sizes[name],)
            found.append(
                SavedArray(name, ArrayLayout(key, "uint8", shape, {live.writers[name]: Box.whole(shape)}))
            )
            continue
        tensor = live.tensors[name]
        if tensor.dtype not in DTYPES:
            live.leave_out(name, f"its type {tensor.dtype} can't be stored")
        found.append(SavedArray(name, ArrayLayout(key, tensor.dtype, tensor.shape, boxes(name))))
    return found


def own_shards(
    arrays: Iterable[SavedArray], plan: SavePlan, planner: SavePlanner, wanted: Mapping[ArrayKey, Box]
) -> list[UnreadShard]:
    """Return this rank's parts of `arrays`, as far as they are in `wanted`."""
    items: dict[str, WriteItem] = {}
    for item in plan.items:
        data = item.tensor_data
        if data is None or 0 not in data.chunk.sizes or item.index.fqn not in items:
            items[item.index.fqn] = item
    shards = []
    for name, layout in arrays:
        if layout.key not in wanted:
            continue
        item = items[name]
        tensor = _data(item, planner)
        if item.tensor_data is None:
            box = Box.whole(layout.shape)
        else:
            box = Box(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))
        if tuple(tensor.shape) != box.shape:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} here, but the planner planned {list(box.shape)}"
            )
        spec = ShardSpec(layout.key, layout.dtype, layout.shape, box)
        shards.append(UnreadShard(spec, _Part(name, tensor, layout.dtype)))
    return shards


def _data(item: WriteItem, planner: SavePlanner) -> Tensor:
    if item.type == WriteItemType.BYTE_IO:
        content = planner.lookup_object(item.index)  # type: ignore[attr-defined]
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), f"{item.index.fqn} is a {type(tensor).__name__}"
    return tensor.detach()


class _Part:
    """A tensor's memory that `ckpt` reads part by part, in the stored type."""

    def __init__(self, name: str, tensor: Tensor, dtype: str) -> None:
        self._name, self._tensor = name, tensor
        self._stored: torch.dtype = getattr(torch, dtype)
        self.shape = tuple(tensor.shape)
        self.dtype = ckpt.numpy_dtype(dtype)

    def __getitem__(self, part: tuple[slice, ...]) -> Array:
        here = self._tensor[part].cpu()
        if here.dtype == self._stored:
            return to_numpy(here)
        values = here.to(self._stored)
        if here.dtype.itemsize >= self._stored.itemsize:  # narrower floats are always exact
            same = (values.to(here.dtype) == here) | here.isnan()
            if not same.all():
                raise CheckpointError(
                    f"{self._name} is {here.dtype} and has {here[~same][0].item()!r}, which {self._stored} "
                    "can't represent; uni3d stores parameters and their states in float32: round it first"
                )
        return to_numpy(values)


def target_of(info: ArrayInfo, offset: tuple[int, ...], tensor: Tensor) -> Shard:
    """Return memory into which a part of an array can be loaded: the tensor's own, if it has its type."""
    spec = ShardSpec(info.key, info.dtype, info.shape, Box(offset, tuple(tensor.shape)))
    if tensor.is_cpu and tensor.dtype == getattr(torch, info.dtype):
        return Shard(spec, to_numpy(tensor))
    return Shard(spec, np.empty(spec.box.shape, ckpt.numpy_dtype(info.dtype)))
