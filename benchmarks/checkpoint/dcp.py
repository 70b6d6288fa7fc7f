"""The peer: torch's distributed checkpoint (DCP) over FSDP2, with the same model and AdamW states."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.checkpoint import subject
from benchmarks.checkpoint.ranks import Rank

THREADS = 4
"""Threads that each rank writes with; the fastest of 1, 2 and 4 on two cores."""


def prepare(rank: Rank, options: dict[str, Any]) -> None:
    """Collective: make a state dict of the model and its moments, filled with random numbers."""
    mesh = init_device_mesh("cpu", (rank.world,))
    model = subject.unfilled_model(options)
    for module in [*model.layers, model]:
        fully_shard(module, mesh=mesh)
    model.to_empty(device="cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
        for tensor in (parameter.detach(), *moments.values()):
            _local(tensor).uniform_()
    weights, moments_by_name = get_state_dict(model, optimizer)
    rank.kept.update(model=model, optimizer=optimizer)
    rank.kept["dcp state"] = {"model": weights, "optimizer": moments_by_name}
    # The background thread's collectives must not meet those of the main one.
    rank.kept["dcp group"] = dist.new_group(backend="gloo")


def save(rank: Rank, folder: Path, *, durable: bool) -> None:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(rank.kept["dcp state"], storage_writer=_writer(folder, durable=durable))


def save_weights(rank: Rank, folder: Path) -> None:
    """Save the model alone."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save(rank.kept["dcp state"]["model"], storage_writer=_writer(folder, durable=False))


def load(rank: Rank, folder: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        dcp.load(rank.kept["dcp state"], storage_reader=dcp.FileSystemReader(folder))


def begin_save(rank: Rank, folder: Path, *, kept_stager: bool) -> None:
    """Start an asynchronous save; return when training may go on.

    By default staging allocates its buffers each time, as in DCP's documentation. With `kept_stager`, one
    stager serves all saves and keeps its buffers.
    """
    stager = _stager(rank) if kept_stager else None
    with warnings.catch_warnings(action="ignore"):
        rank.kept["dcp future"] = dcp.async_save(
            rank.kept["dcp state"],
            storage_writer=_writer(folder, durable=True),
            process_group=rank.kept["dcp group"],
            async_stager=stager,
        )


def wait(rank: Rank) -> None:
    """Wait until the asynchronous save is on the disk."""
    rank.kept.pop("dcp future").result()


def _writer(folder: Path, *, durable: bool) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, sync_files=durable, thread_count=THREADS)


def _stager(rank: Rank) -> DefaultStager:
    if "dcp stager" not in rank.kept:  # everything that it can do without a GPU
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        rank.kept["dcp stager"] = DefaultStager(options)
    return rank.kept["dcp stager"]  # type: ignore[no-any-return]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
