"""The link between `parallel` and `ckpt`: a model and an optimizer as named shards, and back.

`parallel.dtensor_layout` computes each tensor's part on this rank and on the others that save it; `ckpt` gets
it as numpy memory with a box.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import ckpt
from ckpt import ArrayKey, ArrayLayout, Box, CheckpointError, Shard, ShardSpec, UnfilledShard
from ckpt.parts import ArrayInfo
from ckpt.read import BUFFER as BUFFER
from ckpt.read import PARAMETER as PARAMETER
from parallel.dtensor_layout import Place, copy_from_full, local_tensor
from parallel.flat_parameters import FlatSlice
from parallel.tensors import named_parameters, persistent_buffers
from parallel.tensors import sharded_shown as sharded_shown
from uni3d.stored_model import StoredModel

_NOBODY: Mapping[int, Place] = {}


class FlatView(NamedTuple):
    """Flat parameters of FSDP1 and their states by the parameters' ids, as a save writes them."""

    values: dict[int, Tensor]
    states: dict[int, dict[str, Any]]
    """Name -> rows of the state, or a value. Without the parameters that have no states."""


class Held(NamedTuple):
    """Part of an array on this rank."""

    spec: ShardSpec
    tensor: Tensor
    """Live memory of the part."""
    savers: Mapping[int, Place]
    """Ranks that save the array, with their parts. Empty for a copy that is loaded but not saved."""


class Inventory:
    """The arrays of a model and an optimizer on this rank.

    Training waits for it at every save, so the entry of a tensor is reused while its local tensor is the same
    object.
    """

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._stage = model.layout
        self._known: dict[tuple[str, str, bool], Held] = {}  # by name, state, and True if it is saved
        self._before: dict[tuple[str, str, bool], Held] = {}

    def arrays(
        self,
        optimizer: torch.optim.Optimizer | None,
        with_states: Collection[str] | None = None,
        *,
        frozen: bool = True,
        extra: Mapping[ArrayKey, Tensor] = MappingProxyType({}),
        flat: FlatView | None = None,
    ) -> list[Held]:
        """Return this rank's parts of all parameters, buffers and optimizer states, and `extra` tensors.

        `with_states` names the parameters whose optimizer states are included; None is all. With
        `frozen=False`, parameters that don't require a gradient are left out. Flat parameters come as `flat`
        has them; those that it lacks are left out.

        Raises:
            CheckpointError: a tensor has a dtype that can't be stored, or its place in the whole is unknown.
        """
        model = self._model
        model.carry_writes()
        self._before, self._known = self._known, {}  # entries not found again are dropped
        arrays = []
        for name, parameter in named_parameters(model.module):
            if not (frozen or parameter.requires_grad):
                continue
            first = model.first_name(name)
            savers = None if name not in model.copies else _NOBODY
            fine_dim = 1 if name in model.rowwise else None
            if model.flat is not None and parameter in model.flat:
                arrays += self._flat(first, parameter, flat)
                continue
            arrays.append(self._held(first, PARAMETER, parameter, savers, fine_dim))
            wanted = optimizer if with_states is None or first in with_states else None
            for key, value in ({} if wanted is None else wanted.state.get(parameter, {})).items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    if not isinstance(value, DTensor) and _is_cut(parameter):
                        raise CheckpointError(
                            f"the optimizer's {key!r} of {name} is a plain tensor, but the parameter is "
                            "sharded; use an optimizer that creates its states by zeros_like(parameter)"
                        )
                    fine = fine_dim if value.shape == parameter.shape else None
                    arrays.append(self._held(first, key, value, savers, fine))
        saver = self._stage.ranks[0]  # copies may differ between ranks: dp and tp rank 0 saves its own
        for name, buffer in persistent_buffers(model.module):
            savers = None  # one that is cut is saved by all
            if not _is_cut(buffer):
                savers = {saver: ((0,) * buffer.ndim, tuple(buffer.shape))}
            arrays.append(self._held(model.first_name(name), BUFFER, buffer, savers, None))
        for key, tensor in extra.items():  # plain, and the same on all ranks of the stage
            place = ((0,) * tensor.ndim, tuple(tensor.shape))
            arrays.append(self._held(key.atom, key.state, tensor, {saver: place}, None))
        return arrays

    def _flat(self, name: str, parameter: Tensor, flat: FlatView | None) -> list[Held]:
        if flat is None:
            raise CheckpointError(
                f"{name} is in a flat parameter of FullyShardedDataParallel (FSDP1), which this doesn't know"
            )
        tensors = dict(flat.states.get(id(parameter), {}))
        if id(parameter) in flat.values:
            tensors[PARAMETER] = flat.values[id(parameter)]
        return [
            self._held(name, key, value, None, None)
            for key, value in tensors.items()
            if isinstance(value, Tensor)
        ]

    def plan(self, arrays: Iterable[Held], files: ckpt.Files) -> ckpt.Plan:
        """Plan the saving of the arrays over the ranks that have the same stages."""
        boxes: dict[int, dict[int, Box]] = {}  # by identity: arrays that are cut alike share their `savers`
        layouts = []
        for spec, _, savers in arrays:
            if not savers:
                continue
            if id(savers) not in boxes:
                boxes[id(savers)] = {rank: Box(*place) for rank, place in savers.items()}
            layouts.append(ArrayLayout(spec.key, spec.dtype, spec.shape, boxes[id(savers)], spec.fine_dim))
        return ckpt.plan_arrays(layouts, self._stage.ranks, files=files)

    def _held(
        self, name: str, state: str, tensor: Tensor, savers: Mapping[int, Place] | None, fine_dim: int | None
    ) -> Held:
        """Return the entry of a tensor. `savers=None` is all ranks that have the same stages."""
        key = (name, state, savers is not _NOBODY)  # a rank may have a tied parameter and its copy
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        known = self._before.get(key)
        same = known is not None and known.tensor is local_tensor(tensor)
        if known is not None and same and (known.spec.dtype, known.spec.shape) == (dtype, shape):
            self._known[key] = known  # compared, as `model.half()` keeps the objects
            return known
        if dtype not in ckpt.DTYPES:
            raise CheckpointError(
                f"{name}/{state} has dtype {dtype}, which can't be stored; "
                f"use one of {', '.join(sorted(ckpt.DTYPES))}"
            )
        if isinstance(tensor, DTensor) and any(p.is_partial() for p in tensor.placements):
            raise CheckpointError(
                f"{name}/{state} is a partial sum ({tensor.placements}); reduce it before saving"
            )
        places = self._stage.places(tensor)
        part = local_tensor(tensor)
        box = Box(*places[self._stage.rank])
        assert box.shape == tuple(part.shape), f"{name}/{state}: {tuple(part.shape)} here, computed {box}"
        spec = ShardSpec(ArrayKey(name, state), dtype, shape, box, fine_dim)
        held = Held(spec, part, places if savers is None else savers)
        self._known[key] = held
        return held


def flat_part(name: str, state: str, rows: Tensor, place: FlatSlice) -> Held:
    """Return the entry of rows of a flat parameter, or of a state of it, that are loaded but not saved."""
    dtype = str(rows.dtype).removeprefix("torch.")
    return Held(ShardSpec(ArrayKey(name, state), dtype, place.shape, Box(*place.rows)), rows, _NOBODY)


def parts_to_save(arrays: Iterable[Held], parts: Mapping[ArrayKey, Box]) -> list[tuple[ShardSpec, Tensor]]:
    """Return the live memory of this rank's share of `parts`, which may be smaller than its arrays."""
    found = []
    for spec, tensor, savers in arrays:
        box = parts.get(spec.key) if savers else None
        if box is None:
            continue
        if box != spec.box:
            tensor = tensor[box.relative_to(spec.box).slices]
            spec = replace(spec, box=box)
        found.append((spec, tensor))
    return found


def on_host(spec: ShardSpec, tensor: Tensor) -> Shard:
    """Return the part for `ckpt`: the tensor's own memory, or a copy from the GPU."""
    return Shard(spec, to_numpy(tensor))


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Return an array of the tensor's own memory, or of a copy from the GPU."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # torch can't convert to the numpy type, which is ml_dtypes'
        return tensor.view(torch.int16).numpy().view(ckpt.numpy_dtype("bfloat16"))
    return tensor.numpy()


def array_key(atom: str, state: str) -> ArrayKey:
    """Return the name of an array that is none of a parameter or a buffer."""
    return ArrayKey(atom, state)


def whole_target(info: ArrayInfo) -> Shard:
    """Return new memory into which a whole array can be loaded."""
    spec = ShardSpec(info.key, info.dtype, info.shape, Box.whole(info.shape))
    return Shard(spec, np.empty(info.shape, ckpt.numpy_dtype(info.dtype)))


def finish_load(arrays: Iterable[Held], targets: Iterable[Shard | UnfilledShard]) -> None:
    """Copy loaded data to the tensors whose load went into a copy, as they aren't contiguous."""
    for array, target in zip(arrays, targets, strict=True):
        if isinstance(target, UnfilledShard):
            continue
        loaded = to_torch(target.data)
        if loaded.data_ptr() != array.tensor.data_ptr():
            with torch.no_grad():
                array.tensor.copy_(loaded)


def to_torch(array: npt.NDArray[Any]) -> Tensor:
    """Return a tensor that shares the array's memory."""
    if array.dtype == ckpt.numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's part of a whole tensor into `tensor`."""
    copy_from_full(tensor, whole)


def create_states(optimizer: torch.optim.Optimizer, lacking: Collection[Tensor] = ()) -> None:
    """Create an optimizer's states, as targets of a load: those of `lacking`, and all if it has none.

    It takes a step with zero gradients and zero rate. torch's `get_optimizer_state_dict` does the same, but
    not if there are states under other keys than parameters. No hook sees that step, nor does a scheduler,
    which counts the calls of the object's `step`, so the class's is called.
    """
    groups = optimizer.param_groups
    everyone = [p for group in groups for p in group["params"]]
    wanted = {id(p) for p in lacking}  # some may be frozen by now
    if not any(isinstance(key, Tensor) for key in optimizer.state):
        wanted |= {id(p) for p in everyone if p.requires_grad}
    rates = [(group, group["lr"]) for group in groups if "lr" in group]
    gradients = [p.grad for p in everyone]
    for parameter in everyone:
        parameter.grad = torch.zeros_like(parameter) if id(parameter) in wanted else None
    try:
        for group, rate in rates:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        with _without_hooks(optimizer):
            _step(optimizer)
    finally:
        for group, rate in rates:
            group["lr"] = rate
        for parameter, gradient in zip(everyone, gradients, strict=True):
            parameter.grad = gradient


def _step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step without a closure, which some optimizers of scripts require, and others don't know."""
    step: Callable[..., Any] = type(optimizer).step
    _, *arguments = inspect.signature(step).parameters.values()
    required = [
        one for one in arguments if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty
    ]
    step(optimizer, *(None for _ in required))


@contextmanager
def _without_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take away the hooks of an optimizer's steps, and those of all optimizers' steps, for a while."""
    registers: list[dict[Any, Any]] = [
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ]
    kept = [dict(register) for register in registers]
    for register in registers:
        register.clear()
    try:
        yield
    finally:
        for register, hooks in zip(registers, kept, strict=True):
            register.update(hooks)


def forget_states(model: StoredModel, optimizer: torch.optim.Optimizer, *, but: Collection[str]) -> None:
    """Drop the states of all parameters except `but`, as if they had never had a gradient."""
    for name, parameter in named_parameters(model.module):
        if model.first_name(name) not in but:
            optimizer.state.pop(parameter, None)


def _is_cut(parameter: Tensor) -> bool:
    """Return whether each rank holds only a part of the tensor."""
    return isinstance(parameter, DTensor) and any(
        not placement.is_replicate() and size > 1
        for placement, size in zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    )
