"""Parameters that FullyShardedDataParallel (FSDP1) keeps as slices of flat tensors, and their parts by rows.

A unit of FSDP1 lays its parameters end to end, with padding, and each rank has one slice of the whole: of
most parameters everything or nothing, of some a run of elements that begins and ends in the middle of a row.
For a save, a unit is gathered, and each rank keeps an even part of each parameter's rows. A load needs no
other rank: it reads all rows that a slice meets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from parallel.dtensor_layout import Place
from parallel.tensors import modules


class FlatSlice(NamedTuple):
    """Run of elements of a parameter, in the order of its rows, that this rank has."""

    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    length: int

    @property
    def rows(self) -> Place:
        """Offset and shape of the rows that the run meets."""
        rest = self.shape[1:]
        row = prod(rest)
        if not self.length:
            return (0,) * len(self.shape), (0, *rest)
        begin, end = self.start // row, -(-(self.start + self.length) // row)
        return (begin, *(0,) * len(rest)), (end - begin, *rest)

    def of(self, rows: Tensor) -> Tensor:
        """Return the run as a view of the rows that it meets."""
        skipped = self.start - self.rows[0][0] * prod(self.shape[1:]) if self.length else 0
        return rows.view(-1)[skipped : skipped + self.length]


class FlatUnit:
    """Parameters that one module of FSDP1 lays end to end."""

    def __init__(self, module: FullyShardedDataParallel) -> None:
        handle: Any = module._handle
        self._handle = handle
        self._flat = handle.flat_param
        self._group, self._device = handle.process_group, handle.device
        ranks = dist.get_process_group_ranks(self._group)
        # Never communicates: what a save writes is in host memory.
        self._mesh = DeviceMesh("cpu", ranks, _init_backend=False, _rank=dist.get_rank())
        self._rank, self._ranks = ranks.index(dist.get_rank()), len(ranks)
        self.parameters: list[nn.Parameter] = list(self._flat._params)
        self.shapes = [tuple(shape) for shape in self._flat._shapes]

    def slice_of(self, index: int) -> FlatSlice:
        """Return the place of this rank's slice of a parameter."""
        info = self._flat._shard_param_infos[index]
        if not info.in_shard:
            return FlatSlice(self.shapes[index], 0, 0)
        return FlatSlice(self.shapes[index], info.intra_param_start_idx, info.numel_in_shard)

    def forget_whole(self) -> None:
        """Free what FSDP1 keeps gathered after an evaluation: it wouldn't see what was loaded."""
        if hasattr(self._flat, "_local_shard"):  # it has run
            self._handle.reshard(True)
            self._handle.post_reshard()

    def by_rows(self, index: int, dtype: torch.dtype, whole: Tensor | None = None) -> Tensor:
        """Return a parameter, or a state of it, as a DTensor of rows; without numbers if `whole` is None."""
        shape = self.shapes[index]
        if whole is None:
            parts = torch.empty(shape, dtype=dtype, device="meta").chunk(self._ranks)
        else:
            parts = whole.view(shape).chunk(self._ranks)
        mine = parts[self._rank] if self._rank < len(parts) else parts[0][:0]
        local = mine if whole is None else mine.to("cpu", copy=True)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
        )

    def gathered(
        self, slices: Mapping[int, Tensor], wanted: list[int], dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """Gather a parameter's slices, or those of one of its states, for each of `wanted`. Collective.

        Returns this rank's rows of each, in host memory.
        """
        mine = torch.zeros(self._flat._sharded_size.numel(), dtype=dtype, device=self._device)
        for index, tensor in slices.items():
            info = self._flat._shard_param_infos[index]
            if info.in_shard:
                mine[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard].copy_(tensor)
        whole = torch.empty(len(mine) * self._ranks, dtype=dtype, device=self._device)
        dist.all_gather(list(whole.chunk(self._ranks)), mine, group=self._group)
        places, at = [], 0
        for length, padding in zip(self._flat._numels_with_padding, self._flat._is_padding_mask, strict=True):
            if not padding:
                places.append(whole[at : at + length])
            at += length
        return {index: self.by_rows(index, dtype, places[index]) for index in wanted}


class FlatParameters:
    """All flat parameters of a model."""

    def __init__(self, module: nn.Module) -> None:
        self.units = [
            FlatUnit(part)
            for _, part in modules(module)
            if isinstance(part, FullyShardedDataParallel)
            and part._handle is not None
            and part._handle.uses_sharded_strategy  # else its parameters are whole
        ]
        self._placed = {
            id(parameter): unit.by_rows(index, parameter.dtype)
            for unit in self.units
            for index, parameter in enumerate(unit.parameters)
        }

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._placed

    def placed(self, parameter: Tensor) -> Tensor:
        """Return a tensor of the parameter's whole shape that says which rows a save writes where.

        It has no numbers. Of a parameter that isn't flat, it is the parameter.
        """
        return self._placed.get(id(parameter), parameter)

    def slices(self) -> Iterator[tuple[nn.Parameter, FlatSlice]]:
        """Yield each flat parameter with the place of this rank's slice."""
        for unit in self.units:
            for index, parameter in enumerate(unit.parameters):
                yield parameter, unit.slice_of(index)


def flat_problem(prefix: str, module: FullyShardedDataParallel) -> str:
    """Return why the parameters of a unit of FSDP1 can't be told apart; "" if they can."""
    handle: Any = module._handle
    if handle is None:
        return ""
    name = prefix.rstrip(".") or "the model"
    flat = handle.flat_param
    if not handle._use_orig_params:
        return (
            f"{name} is wrapped in FullyShardedDataParallel with use_orig_params=False, so that optimizers "
            "see flat tensors instead of parameters; pass use_orig_params=True, or use fully_shard (FSDP2)"
        )
    if any(extension is not None for extension in flat._param_extensions):
        return (
            f"{name} is wrapped in FullyShardedDataParallel and split by tensor parallelism: its slices are "
            "those of parts; use fully_shard (FSDP2)"
        )
    strange = [fqn for fqn, is_plain in zip(flat._fqns, flat._contiguities, strict=True) if not is_plain]
    if strange:
        return (
            f"{prefix}{strange[0]} isn't contiguous, and FullyShardedDataParallel keeps its elements in an "
            "order of their own; call .contiguous() before you wrap it, or use fully_shard (FSDP2)"
        )
    return ""


def gathered_problem(prefix: str, module: FullyShardedDataParallel) -> str:
    """Return why a unit doesn't show its slices now; "" if it does."""
    handle: Any = module._handle
    if handle is None or not handle.uses_sharded_strategy:
        return ""
    flat = handle.flat_param
    shown = [info.module._parameters.get(info.param_name) for info in flat._param_infos]
    if handle.is_sharded(flat) and all(p is q for p, q in zip(shown, flat._params, strict=True)):
        return ""
    return (
        f"{prefix.rstrip('.') or 'the model'} has gathered its parameters for a backward pass; save and load "
        "before the forward pass or after the backward one, and evaluate under torch.no_grad()"
    )
