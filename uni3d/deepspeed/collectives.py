"""Functions of `deepspeed.comm` that `torch.distributed` has under another name, or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from uni3d.deepspeed.devices import get_accelerator


def get_local_rank() -> int:
    """Return this process's number on its node, as torchrun counts."""
    return int(os.environ.get("LOCAL_RANK", "0"))


get_local_rank_from_launcher = get_local_rank


def get_world_rank_from_launcher() -> int:
    return int(os.environ.get("RANK", "0"))


def get_world_size_from_launcher() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def new_group(ranks: list[int] | None = None) -> Any:
    """Return a group of these ranks, which all processes must make."""
    return dist.new_group(ranks)


def get_world_group() -> Any:
    return dist.group.WORLD


def get_global_rank(group: Any = None, group_rank: int = 0) -> int:
    """Return the rank in the job of a group's rank."""
    return group_rank if group is None else dist.get_global_rank(group, group_rank)


def get_all_ranks_from_group(group: Any = None) -> list[int]:
    return list(range(dist.get_world_size())) if group is None else dist.get_process_group_ranks(group)


def all_gather_into_tensor(
    output_tensor: Tensor, tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """Gather the ranks' tensors into one. torch 2.13 calls it `all_gather_single`."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output_tensor, tensor, group=group, async_op=async_op)


allgather_fn = all_gather_into_tensor


def reduce_scatter_tensor(
    output_tensor: Tensor,
    tensor: Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """Reduce the ranks' tensors, and give each its part. torch 2.13 calls it `reduce_scatter_single`."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output_tensor, tensor, op=op, group=group, async_op=async_op)


reduce_scatter_fn = reduce_scatter_tensor


def inference_all_reduce(
    tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def has_all_gather_into_tensor() -> bool:
    return True


def has_reduce_scatter_tensor() -> bool:
    return True


def initialize_mesh_device(mesh_shape: tuple[int, ...], mesh_dim_names: tuple[str, ...]) -> DeviceMesh:
    """Return a torch mesh of all ranks. It is the script's own: an engine's is set by its config."""
    return init_device_mesh(get_accelerator().device_name(), mesh_shape, mesh_dim_names=mesh_dim_names)
