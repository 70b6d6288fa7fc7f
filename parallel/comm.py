"""Small collectives on host memory, for those who plan and check things together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Bytes = npt.NDArray[np.uint8]


class HostComm:
    """All ranks of a job, exchanging Python values and bytes through their CPUs."""

    def __init__(self) -> None:
        """Collective: on GPUs, a group of its own is made, so that values need no trip to the device."""
        self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        """Send `outgoing[r]` to rank r; returns what each rank sent here, of the sizes announced."""
        sent = torch.from_numpy(np.concatenate(outgoing))
        received = torch.empty(sum(incoming_sizes), dtype=torch.uint8)
        sizes = [part.nbytes for part in outgoing]
        dist.all_to_all_single(received, sent, incoming_sizes, sizes, group=self._group)
        ends = np.cumsum(incoming_sizes)[:-1]
        return np.split(received.numpy(), ends)
