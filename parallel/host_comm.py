"""Small collectives in host memory, for planning and checks."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._C._distributed_c10d as distributed
import torch.distributed as dist
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

TIMEOUT = timedelta(minutes=30)
"""Longest wait for the other ranks, which includes the slowest rank's write of a checkpoint."""

SLOT_BYTES = 1 << 10
"""Size of a value that is sent along with its length."""


class HostComm:
    """Collectives of Python values and bytes between the CPUs of all ranks.

    It has connections of its own, so it can be used from any thread without disturbing training's
    collectives. It outlives `destroy_process_group`, so that background work can finish.
    """

    def __init__(self) -> None:
        """Connect the ranks. Collective."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        nth = store.add(f"uni3d/host_comm/{self.rank}", 1)  # ranks create them in the same order
        own = distributed.PrefixStore(f"uni3d/host_comm/{nth}", store)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = TIMEOUT
        # Ranks connect when they first talk: a rank has a few connections, not one to each of thousands.
        options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=True)]
        self._group: Any = dist.ProcessGroupGloo(own, self.rank, self.size, options)
        # Now, while all are alive: one that has died since is noticed at once, but not while connecting.
        self.broadcast(self.all_gather(None))

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        return self._collect(value, on_all=True)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on rank 0; an empty list on the others."""
        return self._collect(value, on_all=False)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        data = pickle.dumps(value) if self.rank == 0 else b""
        head = self._broadcast(len(data).to_bytes(8, "little") + data[:SLOT_BYTES], 8 + SLOT_BYTES)
        length, found = int.from_bytes(head[:8], "little"), head[8:]
        if length > SLOT_BYTES:
            found = self._broadcast(data, length)
        return pickle.loads(found[:length])  # bytes of our own ranks, never of a file

    def exchange(self, outgoing: list[Bytes], incoming_sizes: list[int]) -> list[Bytes]:
        """Send `outgoing[r]` to rank r; return the bytes that each rank sent here, of the announced sizes."""
        sent = torch.from_numpy(np.concatenate(outgoing))
        received = torch.empty(sum(incoming_sizes), dtype=torch.uint8)
        sizes = [part.nbytes for part in outgoing]
        self._group.alltoall_base(received, sent, incoming_sizes, sizes).wait()
        ends = np.cumsum(incoming_sizes)[:-1]
        return np.split(received.numpy(), ends)

    def _broadcast(self, data: bytes, size: int) -> bytes:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        memory = _padded(data, size)
        self._group.broadcast([memory], options).wait()
        return memory.numpy().tobytes()

    def _collect(self, value: Any, *, on_all: bool) -> list[Any]:
        data = pickle.dumps(value)
        # One collective carries every rank's length and, if all are short, which is usual, the values.
        slots = self._all_gather(len(data).to_bytes(8, "little") + data[:SLOT_BYTES], 8 + SLOT_BYTES)
        lengths = [int.from_bytes(slot[:8], "little") for slot in slots]
        if max(lengths) <= SLOT_BYTES:
            parts = [slot[8:] for slot in slots] if on_all or self.rank == 0 else []
        elif on_all:
            parts = self._all_gather(data, max(lengths))
        else:
            parts = self._gather(data, slots, lengths)
        values = zip(parts, lengths, strict=False)
        return [
            pickle.loads(part[:length]) for part, length in values
        ]  # bytes of our own ranks, never of a file

    def _all_gather(self, data: bytes, size: int) -> list[bytes]:
        everyone = [torch.empty(size, dtype=torch.uint8) for _ in range(self.size)]
        self._group.allgather([everyone], [_padded(data, size)]).wait()
        return [part.numpy().tobytes() for part in everyone]

    def _gather(self, data: bytes, slots: list[bytes], lengths: list[int]) -> list[bytes]:
        """Bring the long values to rank 0 along a binary tree, so that no rank has more than a few peers."""
        long = [n if n > SLOT_BYTES else 0 for n in lengths]
        held = [data] if long[self.rank] else []
        step = 1
        while step < self.size and self.rank % (2 * step) == 0:
            nbytes = sum(long[self.rank + step : self.rank + 2 * step])
            if nbytes:
                memory = torch.empty(nbytes, dtype=torch.uint8)
                self._group.recv([memory], self.rank + step, 0).wait()
                held.append(memory.numpy().tobytes())
            step *= 2
        bundle = b"".join(held)
        if self.rank != 0:
            if bundle:
                self._group.send([_padded(bundle, len(bundle))], self.rank - step, 0).wait()
            return []
        ends = np.cumsum(long)
        found = [bundle[end - n : end] for end, n in zip(ends, long, strict=True)]
        return [part or slot[8:] for part, slot in zip(found, slots, strict=True)]


def _padded(data: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
