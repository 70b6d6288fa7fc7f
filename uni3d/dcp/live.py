"""A state_dict that is being saved: a rank's own part, and the whole, described from all ranks' parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from ckpt import CheckpointError
from uni3d.dcp.values import Kinds, as_json, number_kind
from uni3d.importers.dcp import is_number
from uni3d.importers.dcp.names import Steps
from uni3d.importers.source import Array


class OwnPart(NamedTuple):
    """Part of the description that only this rank knows."""

    values: dict[str, Any]
    """Values as JSON, by flat name: those that aren't tensors, and tensors of one element."""
    kinds: dict[str, Kinds]
    """Their types."""
    sizes: dict[str, int]
    """Length of each value that is bytes."""
    same: list[tuple[str, ...]]
    """Names of tensors that are in the same memory here."""


def own_part(final: SavePlan, local: Sequence[WriteItem], planner: SavePlanner) -> OwnPart:
    """Return this rank's part, by its plan.

    Args:
        final: what this rank writes.
        local: what it has, with what other ranks write.

    Raises:
        CheckpointError: a value can be represented by neither JSON nor an array.
    """
    if not isinstance(planner, DefaultSavePlanner):
        raise CheckpointError(
            f"the planner is a {type(planner).__name__}; uni3d.dcp needs a DefaultSavePlanner, or a class "
            "derived from it, to look values up without pickling them"
        )
    if getattr(planner, "_enable_plan_caching", False):
        raise CheckpointError(
            "uni3d.dcp doesn't support enable_plan_caching=True; leave it out of the planner"
        )
    own = OwnPart({}, {}, {}, _same_memory(local, planner))
    numbers: dict[str, Tensor] = {}
    for item in final.items:
        key = item.index.fqn
        if item.type != WriteItemType.BYTE_IO:
            assert item.tensor_data is not None
            if is_number(tuple(item.tensor_data.size)):
                numbers[key] = _tensor(item, planner)
            continue
        value = planner.lookup_object(item.index)
        if type(value) is bytes:
            own.sizes[key] = len(value)
            continue
        try:
            own.values[key], own.kinds[key] = as_json(value)
        except TypeError as error:
            raise CheckpointError(
                f"{key} is {error}; uni3d.dcp saves tensors, bytes and values of JSON, and pickles nothing: "
                "save the numbers that it consists of, or leave it out of the state_dict"
            ) from None
    own.kinds.update({key: {"": number_kind(tensor)} for key, tensor in numbers.items()})
    own.values.update(_numbers(numbers))
    return own


def _tensor(item: WriteItem, planner: SavePlanner) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), f"{item.index.fqn} is a {type(tensor).__name__}"
    return tensor.detach()


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the tensors' numbers; those on a device come in one transfer per type."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = defaultdict(list)
    for key, tensor in tensors.items():
        if tensor.numel():
            alike[tensor.dtype, tensor.device].append(key)
    found: dict[str, Any] = {}
    for keys in alike.values():
        together = torch.stack([tensors[key].reshape(()) for key in keys]).tolist()
        found.update(zip(keys, together, strict=True))
    return found


def _same_memory(items: Iterable[WriteItem], planner: DefaultSavePlanner) -> list[tuple[str, ...]]:
    found: dict[Any, list[str]] = defaultdict(list)
    for item in items:
        if item.type != WriteItemType.BYTE_IO:
            tensor = planner.lookup_object(item.index)
            if tensor.numel():
                place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
                found[place].append(item.index.fqn)
    return [tuple(names) for names in found.values() if len(names) > 1]


class WholeTensor(NamedTuple):
    """Type and shape of a whole tensor."""

    dtype: str
    shape: tuple[int, ...]


class LiveStateDict:
    """A state_dict that is being saved, as the importer of DCP's folders reads one.

    Attributes:
        parts: flat name of each tensor -> rank -> the offset and the shape of what it writes.
        sizes: length of each value that is bytes, by flat name.
        writers: rank that writes each of them.
    """

    where = "the state_dict"
    without = ""

    def __init__(self, plans: Sequence[SavePlan], owns: Sequence[OwnPart]) -> None:
        """Describe the state_dict, given all ranks' final plans and their own parts, by rank."""
        self.tensors: dict[str, WholeTensor] = {}
        self.parts: dict[str, dict[int, tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(dict)
        self.sizes = {key: size for own in owns for key, size in own.sizes.items()}
        self.writers = {key: rank for rank, own in enumerate(owns) for key in own.sizes}
        self._values = {key: value for own in owns for key, value in own.values.items()}
        self.kinds = {key: kinds for own in owns for key, kinds in own.kinds.items()}
        self._same = {pair for own in owns for names in own.same for pair in _pairs(names)}
        for rank, plan in enumerate(plans):
            for item in plan.items:
                if item.tensor_data is not None:
                    self._take(rank, item)
        paths: dict[str, Steps] = {}
        for plan in plans:
            if isinstance(plan.planner_data, Mapping):
                paths.update({k: v for k, v in plan.planner_data.items() if k not in paths})
        names = {*self.tensors, *self._values, *self.sizes}
        order = [*(name for name in paths if name in names), *sorted(names - paths.keys())]
        self.steps = {name: tuple(paths.get(name, (name,))) for name in order}

    def _take(self, rank: int, item: WriteItem) -> None:
        key, data = item.index.fqn, item.tensor_data
        assert data is not None
        offset, shape = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        dtype = str(data.properties.dtype).removeprefix("torch.")
        self.tensors[key] = WholeTensor(dtype, tuple(data.size))
        parts = self.parts[key]
        if 0 in shape:
            parts.setdefault(rank, (offset, shape))
        elif rank in parts and 0 not in parts[rank][1]:
            raise CheckpointError(
                f"rank {rank} writes several parts of {key}; uni3d.dcp takes one box of a tensor from a "
                "rank, as fully_shard and DTensor cut it"
            )
        else:
            parts[rank] = (offset, shape)

    def read(self, name: str) -> Array:
        raise AssertionError(f"{name} is written where it lies")

    def read_part(self, name: str, part: tuple[slice, ...]) -> Array:
        raise AssertionError(f"{name} is written where it lies")

    def number(self, name: str) -> Any:
        """Return the number in a tensor of one element."""
        if name not in self._values:
            raise CheckpointError(
                f"{name} is a tensor of shape {list(self.tensors[name].shape)}; expected a number"
            )
        return self._values[name]

    def object(self, name: str) -> Any:
        """Return a value that isn't a tensor, as JSON."""
        if name in self.sizes:
            raise CheckpointError(f"{name} is bytes; expected a value of JSON")
        return self._values[name]

    def tied(self, name: str, owner: str) -> bool:
        """Return whether two tensors are in the same memory."""
        return (name, owner) in self._same

    def leave_out(self, name: str, reason: str) -> None:
        """Refuse an entry, as a save leaves out nothing."""
        raise CheckpointError(f"{name} can't be saved: {reason}; leave it out of the state_dict")

    def note(self, line: str) -> None:
        """Take a line; a save has nobody to tell."""


def _pairs(names: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    return ((one, other) for one in names for other in names if one != other)
