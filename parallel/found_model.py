"""A model that another trainer has wrapped and sharded: names, places and meshes, read off its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from parallel.degrees import Ranks
from parallel.dtensor_layout import Place, place_of
from parallel.flat_parameters import FlatParameters, flat_problem
from parallel.host_comm import HostComm
from parallel.tensors import Parts, modules, named_parameters, persistent_buffers

Names = Callable[[str], str] | Mapping[str, str]
"""Function from a stage's names to those of the whole model, or a mapping of those that differ."""

TENSOR_AXES = ("tp", "model", "tensor", "tensor_parallel")
"""Names of mesh axes along which libraries split tensors of a layer."""

_Mesh = tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]
"""Axes, shape and ranks of a mesh."""


@dataclass(frozen=True)
class _Stage:
    """One pipeline stage: ranks with the same tensors, cut alike."""

    ranks: tuple[int, ...]
    meshes: list[set[_Mesh]]
    """For each mesh of a rank, in the order in which its tensors show them: those of all ranks."""


class FoundLayout:
    """Parts of a tensor on each rank that has the same parameters as this one."""

    def __init__(self, rank: int, stage: _Stage, mine: Sequence[_Mesh]) -> None:
        self.rank, self.ranks, self._stage = rank, stage.ranks, stage
        self._nth = {mesh: i for i, mesh in enumerate(mine)}
        self._known: dict[object, dict[int, Place]] = {}

    def places(self, tensor: Tensor) -> dict[int, Place]:
        """Return the place of each rank's part; every rank holds the whole of a plain tensor.

        The result is the same object for tensors that are cut alike.

        Raises:
            ValueError: it is on a mesh that no parameter was on when the model was looked at.
        """
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            key: object = shape
            if key not in self._known:
                self._known[key] = dict.fromkeys(self.ranks, ((0,) * tensor.ndim, shape))
            return self._known[key]
        mesh = _record(tensor.device_mesh)
        if mesh not in self._nth:
            raise ValueError(
                f"a tensor of shape {list(shape)} is on the mesh {tensor.device_mesh}, on which no parameter "
                "is; shard the model before you make the Checkpointer, or make a new one"
            )
        key = (shape, self._nth[mesh], tensor.placements)
        if key not in self._known:
            found: dict[int, Place] = {}
            for _, sizes, ranks in sorted(self._stage.meshes[self._nth[mesh]]):
                places = torch.tensor(ranks).view(sizes)
                for rank in ranks:
                    coordinate = (places == rank).nonzero()[0].tolist()
                    found[rank] = place_of(shape, sizes, coordinate, tensor.placements)
            self._known[key] = found
        return self._known[key]


class FoundModel:
    """A torch model in any state of distribution, as checkpoints see it.

    Names are those of the unwrapped model, without the segments that DistributedDataParallel,
    `torch.compile` and activation checkpointing add.
    """

    def __init__(
        self, model: nn.Module | Sequence[nn.Module], comm: HostComm, names: Names | None = None
    ) -> None:
        """Collective. `model` is this rank's stages, if there are several; `names` maps their names.

        Raises:
            TypeError: `model` is no module.
            ValueError: a tensor doesn't say which part of a whole it is, or two stages have the same name;
                the same on all ranks.
        """
        self.module: nn.Module = Parts(parts_of(model))
        self._names, self._comm = names, comm
        self.ties: dict[str, str] = {}
        self.flat: FlatParameters | None = None
        self.reshard()
        self.copies: frozenset[str] = frozenset()
        self.rowwise: frozenset[str] = frozenset()
        self.layers: list[list[str]] | None = None
        self.stage, self._stages, mine = self._find_stages()
        self.layout = FoundLayout(comm.rank, self._stages[self.stage], mine)
        self.speaks_for_stage = comm.rank == self.layout.ranks[0]
        self.data_part = (comm.rank, comm.size)
        first = next((t for _, t in named_parameters(self.module)), torch.empty(0))
        self.device = first.device

    def first_name(self, name: str) -> str:
        """Return the name of one of this rank's tensors in the whole model."""
        mapped = self._named(name)
        return self.ties.get(mapped, mapped)

    def reshard(self) -> None:
        """Let modules of `fully_shard` show their sharded parameters, and see which are tied by now."""
        for _, part in modules(self.module):
            if isinstance(part, FSDPModule):
                part.reshard()
        self.ties = {self._named(name): self._named(first) for name, first in _ties(self.module)}

    carry_writes = reshard

    @property
    def ranks(self) -> Ranks:
        """All ranks in numbers; tensor parallelism is an axis of a mesh with a name of `TENSOR_AXES`."""
        tp, sharded = 1, False
        for parameter in self._placed():
            if not isinstance(parameter, DTensor):
                continue
            axes = zip(_axes(parameter.device_mesh), parameter.placements, strict=True)
            for i, (axis, placement) in enumerate(axes):
                if axis in TENSOR_AXES:
                    tp = max(tp, parameter.device_mesh.size(i))
                else:
                    sharded |= not placement.is_replicate()
        ranks, stages = len(self.layout.ranks), len(self._stages)
        if ranks * stages != self._comm.size or ranks % tp:  # stages of unequal numbers of ranks
            ranks, stages, tp = self._comm.size, 1, 1
        return Ranks(pp=stages, dp=ranks // tp, tp=tp, zero=3 if sharded else 0)

    @property
    def shard_group(self) -> int:
        """Ranks over which the first sharded parameter is cut along axes that aren't tensor parallelism's."""
        for parameter in self._placed():
            if isinstance(parameter, DTensor):
                axes = list(zip(_axes(parameter.device_mesh), parameter.placements, strict=True))
                cut = [
                    parameter.device_mesh.size(i)
                    for i, (axis, placement) in enumerate(axes)
                    if axis not in TENSOR_AXES and not placement.is_replicate()
                ]
                if cut:
                    return cut[-1]
        return 1

    def _named(self, name: str) -> str:
        if self._names is None:
            return name
        return self._names(name) if callable(self._names) else self._names.get(name, name)

    def _other_names(self) -> str:
        """Return the problem with a mapping of names that the model doesn't have; "" if there is none."""
        if self._names is None or callable(self._names):
            return ""
        here = {name for name, _ in (*named_parameters(self.module), *persistent_buffers(self.module))}
        strangers = [name for name in self._names if name not in here and not name.endswith("_extra_state")]
        return f"names has {strangers[0]}, which this rank's model doesn't have" if strangers else ""

    def _placed(self) -> Iterator[Tensor]:
        """Yield the parameters, or what says which parts of them ranks save."""
        for _, parameter in named_parameters(self.module):
            yield parameter if self.flat is None else self.flat.placed(parameter)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for (name, _), tensor in zip(named_parameters(self.module), self._placed(), strict=True):
            yield self.first_name(name), tensor
        for name, buffer in persistent_buffers(self.module):
            yield self.first_name(name), buffer

    def _find_stages(self) -> tuple[int, list[_Stage], list[_Mesh]]:
        """Return this rank's stage, all stages by their first ranks, and this rank's meshes. Collective."""
        mine: list[_Mesh] = []
        problem = _problem(self.module) or self._other_names()
        if not problem and any(isinstance(m, FullyShardedDataParallel) for m in self.module.modules()):
            self.flat = FlatParameters(self.module)
        digest = blake2b(digest_size=16)
        for name, tensor in self._tensors():
            cut: Any = ""
            if isinstance(tensor, DTensor):
                if (mesh := _record(tensor.device_mesh)) not in mine:
                    mine.append(mesh)
                cut = (mine.index(mesh), mesh[:2], tensor.placements)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {cut}\n".encode())
        key = digest.digest()
        found = self._comm.all_reduce({key: [(self._comm.rank, tuple(mine), problem)]}, _joined)
        for rank, _, wrong in sorted(entry for entries in found.values() for entry in entries):
            if wrong:
                raise ValueError(f"{wrong} (rank {rank})")
        if len(found) > 1:
            self._check_names(found[key][0][0] == self._comm.rank)
        order = sorted(found, key=lambda digest: found[digest][0][0])
        return order.index(key), [_stage(found[digest]) for digest in order], mine

    def _check_names(self, first_of_stage: bool) -> None:
        """Check that no two stages have a name in common, given that they aren't alike. Collective."""
        here = {name: _shown(tensor) for name, tensor in self._tensors()} if first_of_stage else {}
        held = self._comm.all_reduce([(self._comm.rank, here)] if here else [], _concatenated)
        seen: dict[str, tuple[int, str]] = {}
        for rank, tensors in held:
            for name, shown in tensors.items():
                other, before = seen.setdefault(name, (rank, shown))
                if other == rank:
                    continue
                if before != shown:
                    raise ValueError(
                        f"{name} is {before} on rank {other}, but {shown} on rank {rank}: a tensor must be "
                        "whole on every rank, or a DTensor that says which part of it a rank has"
                    )
                raise ValueError(
                    f"ranks {other} and {rank} have different models, and both have {name}: pass names=, "
                    "which maps a stage's names to the whole model's"
                )


def parts_of(model: Any) -> list[nn.Module]:
    """Return the modules of a model, one or several stages; raises TypeError if it isn't made of modules."""
    parts = [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Sequence) else []
    if not parts or not all(isinstance(part, nn.Module) for part in parts):
        raise TypeError(f"model must be a torch.nn.Module, or a list of them; got {model!r}")
    return parts


def _stage(entries: list[tuple[int, tuple[_Mesh, ...], str]]) -> _Stage:
    count = len(entries[0][1])
    return _Stage(
        tuple(sorted(rank for rank, _, _ in entries)),
        [{meshes[i] for _, meshes, _ in entries} for i in range(count)],
    )


def _joined(parts: list[dict[bytes, list[Any]]]) -> dict[bytes, list[Any]]:
    found: dict[bytes, list[Any]] = {}
    for part in parts:
        for key, entries in part.items():
            found.setdefault(key, []).extend(entries)
    return found


def _concatenated(parts: list[list[Any]]) -> list[Any]:
    return [entry for part in parts for entry in part]


def _axes(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ("",) * mesh.ndim


def _record(mesh: DeviceMesh) -> _Mesh:
    return _axes(mesh), tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())


def _shown(tensor: Tensor) -> str:
    cut = f" cut {tensor.placements}" if isinstance(tensor, DTensor) else ""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{cut}"


def _ties(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the further names of parameters that have several, each with its first."""
    first: dict[int, str] = {}
    for prefix, owner in modules(module, once=False):
        for name, parameter in owner._parameters.items():
            if parameter is not None and first.setdefault(id(parameter), prefix + name) != prefix + name:
                yield prefix + name, first[id(parameter)]


def _problem(module: nn.Module) -> str:
    """Return why a model's tensors can't be told apart as parts of wholes; "" if they can."""
    for prefix, part in modules(module):
        if isinstance(part, FullyShardedDataParallel) and (problem := flat_problem(prefix, part)):
            return problem
    for name, parameter in named_parameters(module):
        if parameter.is_meta:
            return f"{name} is on the meta device: it has no values"
        if isinstance(parameter, nn.UninitializedParameter):
            return f"{name} isn't initialized yet: run the lazy module once"
    return ""
