"""Parts of a tensor that this rank and others hold, computed from its placements without communication."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)

from parallel.topology import Topology

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a part, in elements of the whole tensor."""


class LocalPart(NamedTuple):
    """This rank's part of a logical tensor, with its offset in elements."""

    data: Tensor
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]


def local_part(tensor: Tensor) -> LocalPart:
    """Return the part of `tensor` on this rank, the whole of a plain tensor.

    The data is the live memory, not a copy. Exact for uneven shards, and where tensor parallelism and
    ZeRO cut the same dim.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return LocalPart(tensor, tuple(tensor.shape), (0,) * tensor.ndim)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    data = tensor.to_local()
    assert tuple(data.shape) == tuple(shape), f"local tensor {tuple(data.shape)}, computed {tuple(shape)}"
    if data.numel() == 0:  # an empty shard's offset may lie beyond the end
        offset = (0,) * len(shape)
    return LocalPart(data, tuple(tensor.shape), tuple(offset))


class StageLayout:
    """Parts of a tensor on each rank that has the same pipeline stages as this one.

    These ranks have the same modules, cut by their places on the mesh, so each can compute the parts of the
    others. Ranks at other places on the pipeline axis hold other tensors.
    """

    def __init__(self, topology: Topology) -> None:
        stage = topology.mesh.mesh[topology.pp_rank]  # ranks by (replicate, shard, tp)
        self.rank = topology.rank
        self._places = {
            int(stage[i, j, k]): {"replicate": i, "shard": j, "tp": k}
            for i in range(stage.shape[0])
            for j in range(stage.shape[1])
            for k in range(stage.shape[2])
        }
        self.ranks = tuple(sorted(self._places))
        self._known: dict[object, dict[int, Place]] = {}

    def places(self, tensor: Tensor) -> dict[int, Place]:
        """Return the place of each rank's part; every rank holds the whole of a plain tensor.

        The result is the same object for tensors that are cut alike.
        """
        if not isinstance(tensor, DTensor):
            return {rank: ((0,) * tensor.ndim, tuple(tensor.shape)) for rank in self._places}
        mesh, shape = tensor.device_mesh, tuple(tensor.shape)
        names = mesh.mesh_dim_names
        key = (shape, names, tensor.placements)
        if key not in self._known:
            assert names is not None, "the topology names its axes"
            self._known[key] = {
                rank: place_of(shape, tuple(mesh.shape), [place[n] for n in names], tensor.placements)
                for rank, place in self._places.items()
            }
        return self._known[key]


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of `tensor`: the live memory, the same object while `tensor` keeps it."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def place_of(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: list[int],
    placements: tuple[Placement, ...],
) -> Place:
    """Return the part that a rank at a coordinate of a mesh holds of a tensor of this shape."""
    local, offset = _compute_local_shape_and_global_offset(shape, mesh_shape, coordinate, placements)
    if 0 in local:  # an empty part's offset may lie beyond the end
        offset = (0,) * len(shape)
    return tuple(offset), tuple(local)


def narrow_to(full: Tensor, part: LocalPart) -> Tensor:
    """Return the view of a whole tensor that corresponds to `part`."""
    for dim, (start, length) in enumerate(zip(part.offset, part.data.shape, strict=True)):
        full = full.narrow(dim, start, length)
    return full


@torch.no_grad()
def copy_from_full(tensor: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` into `tensor`."""
    part = local_part(tensor)
    part.data.copy_(narrow_to(full, part))
