"""Weights of a live model as plain tensors: a `state_dict`, or a file of it in the compute type."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ckpt
from ckpt.stores import files
from parallel import HostComm, ParallelModel
from parallel.tensors import named_parameters, persistent_buffers, whole_tensors
from parallel.ties import tied_names
from uni3d.checkpoint.extra_state import modules_with_extra


def state_dict_of(model: ParallelModel, *, frozen: bool = True) -> dict[str, Any]:
    """Return this stage's part of the whole model's `state_dict`. Collective over the stage's ranks.

    Tensors are copies, whole, in fp32, on the CPU, under the unsplit model's names; tied parameters have each
    of their names in this stage. Modules' extra states are in it as in torch's. Without `frozen`, parameters
    that don't require a gradient are left out.
    """
    model.zero.carry_writes()
    wanted = _wanted(model, frozen=frozen)
    tensors: dict[str, Any] = {}
    for name, tensor in whole_tensors(model.module):
        if name in wanted:
            # Gathered from one rank, it is still the memory that training changes.
            tensors[name] = tensor.clone()
    for name, first in tied_names(model.module).items():
        if first in tensors:
            tensors[name] = tensors[first]
    extra = modules_with_extra(model.module)
    return tensors | {name: copy.deepcopy(module.get_extra_state()) for name, module in extra.items()}


def whole_on_first_rank(
    model: ParallelModel, comm: HostComm, dtype: torch.dtype, *, frozen: bool
) -> dict[str, Tensor]:
    """Return the model's whole `state_dict` on rank 0, parameters as `dtype`; {} elsewhere. Collective.

    One tensor of each stage at a time is gathered and sent.
    """
    model.zero.carry_writes()
    wanted = {n: cast for n, cast in _wanted(model, frozen=frozen).items() if n not in model.tied.copies}
    mine = (
        (name, tensor.to(dtype) if wanted[name] else tensor)
        for name, tensor in whole_tensors(model.module)
        if name in wanted
    )
    speaks = model.topology.speaks_for_stage
    whole: dict[str, Tensor] = {}
    for _ in range(comm.all_reduce(len(wanted), max)):
        name, tensor = next(mine, ("", None))
        data = None if tensor is None or not speaks else tensor.contiguous().reshape(-1).view(torch.uint8)
        head = () if tensor is None or data is None else (name, tensor.dtype, tuple(tensor.shape))
        received = comm.exchange({} if data is None else {0: data.numpy()})
        # A stage's speaker describes what it sent; the ranks' order is that of the stages.
        heads = comm.all_reduce([head] if head else [], lambda lists: [h for heads in lists for h in heads])
        for (name, dtype, shape), arrived in zip(heads, received.values(), strict=False):
            whole[name] = torch.from_numpy(arrived.copy()).view(dtype).reshape(shape)
    return whole | {alias: whole[first] for alias, first in model.ties.items() if first in whole}


def save_16bit(
    model: ParallelModel, comm: HostComm, folder: str | Path, filename: str, *, frozen: bool
) -> None:
    """Write the unsplit model's `state_dict` with `torch.save`, in the compute type. Collective.

    Raises:
        CheckpointError: the file can't be written; the same on all ranks.
    """
    if "://" in str(folder):
        raise ckpt.CheckpointError(f"save_16bit_model writes to local folders, not to {folder}")
    path = ckpt.agreed(comm, lambda: Path(ckpt.check_run(folder))) / filename
    weights = whole_on_first_rank(model, comm, model.zero.compute_dtype, frozen=frozen)
    ckpt.agreed(comm, lambda: write(path, weights) if comm.rank == 0 else None)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file with `torch.save`; it gets its name when it is complete and on disk.

    Raises:
        OSError: the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(path, durable=True) as fd, os.fdopen(fd, "wb", closefd=False) as file:
        torch.save(tensors, file)


def _wanted(model: ParallelModel, *, frozen: bool) -> dict[str, bool]:
    """Return the tensors' names, each with True if it is a parameter, which is cast."""
    parameters = {n: True for n, p in named_parameters(model.module) if frozen or p.requires_grad}
    return parameters | {name: False for name, _ in persistent_buffers(model.module)}
