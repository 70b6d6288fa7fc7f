"""Which part of a tensor this rank holds, read off the tensor itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class LocalPart(NamedTuple):
    """This rank's part of a logical tensor, as an offset and a shape in its elements."""

    data: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]


def local_part(tensor: Tensor) -> LocalPart:
    """The part of `tensor` on this rank; a plain tensor is held whole.

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


def narrow_to(full: Tensor, part: LocalPart) -> Tensor:
    """The view of a whole tensor that corresponds to `part`."""
    for dim, (start, length) in enumerate(zip(part.offset, part.data.shape, strict=True)):
        full = full.narrow(dim, start, length)
    return full


@torch.no_grad()
def copy_from_full(tensor: Tensor, full: Tensor) -> None:
    """Copy this rank's part of `full` into `tensor`."""
    part = local_part(tensor)
    part.data.copy_(narrow_to(full, part))
