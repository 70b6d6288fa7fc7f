"""The ranks and their places on one mesh, which is made once and passed on.

Ranks are numbered `arange(world).view(pp, replicate, shard, tp)`: tensor-parallel neighbours lie side by
side, pipeline stages farthest apart. The data-parallel axis is two mesh axes, `replicate x shard`, so
that every ZeRO stage is the same mechanism: stage 0 shards over one rank and replicates over dp, the
others shard over dp and replicate over one. With a shard group smaller than dp they do both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from parallel.degrees import Degrees, check_shard_group, resolve_degrees, shard_count
from parallel.gloo_calls import let_gloo_finish_at_exit
from parallel.host_comm import HostComm

AXES = ("pp", "replicate", "shard", "tp")


class Meeting(NamedTuple):
    """A `torch.distributed.Store` that all ranks share, before they have a process group or after."""

    store: Any
    rank: int
    size: int


def meet(device_type: str, timeout: timedelta | None = None) -> Meeting:
    """Meet the ranks of the process group or, before there is one, those that torchrun announces. Collective.

    Raises:
        torch.distributed.DistError: not all of them came within `timeout`.
    """
    if dist.is_initialized():
        return Meeting(distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size())
    if not _are_announced():
        return Meeting(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
    longest = timeout or distributed_c10d._get_default_timeout(dist.Backend(_backend(device_type)))
    store, rank, size = next(rendezvous("env://", timeout=longest))
    store.set_timeout(longest)
    return Meeting(store, rank, size)


def start_process_group(
    device_type: str, timeout: timedelta | None = None, meeting: Meeting | None = None
) -> None:
    """Join the process group that torchrun announces in the environment, or else make a group of one.

    `timeout` is that of its collectives, None for torch's own. On GPUs the group has NCCL alone. With gloo
    beside it, it and each axis of a mesh would connect every two of their ranks, and nothing here would use
    that: `HostComm` has connections of its own. `meeting` is one that the ranks have had already.
    """
    if dist.is_initialized():
        return
    device = None
    if device_type == "cuda":
        # With its device the group connects at once: a GPU that can't be reached is an error here.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = _backend(device_type)
    if meeting is None and _are_announced():
        dist.init_process_group(backend, timeout=timeout, device_id=device)
        return
    store, rank, size = meeting or meet(device_type)
    own = dist.PrefixStore("default_pg", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=size, device_id=device)


def _are_announced() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _backend(device_type: str) -> str:
    return "nccl" if device_type == "cuda" else "gloo"


class Topology:
    """The mesh, this rank's place on it, and its process groups.

    Attributes:
        degrees: pp, dp and tp.
        mesh: of shape (pp, replicate, shard, tp) with the axis names of `AXES`.
        device: the device on which this rank computes.
        pp_rank, tp_rank: this rank's place along these axes.
        dp_rank: index of this rank's part of the global batch.
        speaks_for_stage: True on the first of the ranks that share a place in the pipeline.
    """

    def __init__(
        self,
        degrees: Degrees,
        *,
        zero_stage: int,
        shard_group: int | None = None,
        device_type: str = "cpu",
        host: HostComm | None = None,
    ) -> None:
        """Collective. `degrees` must multiply to the number of ranks; `host` is theirs if they have one.

        ZeRO stages 1 to 3 shard over `shard_group` neighbouring data-parallel ranks and replicate over the
        groups (MiCS, Zhang et al. 2022; the `zero_hpz_partition_size` of ZeRO++). By default they shard over
        all.

        Raises:
            ValueError: the degrees don't multiply to the world size, or the shard group doesn't divide dp.
        """
        let_gloo_finish_at_exit()
        d = resolve_degrees(dist.get_world_size(), pp=degrees.pp, dp=degrees.dp, tp=degrees.tp)
        check_shard_group(d.dp, zero_stage, shard_group)
        shard = shard_count(d.dp, zero_stage, shard_group)
        shape = (d.pp, d.dp // shard, shard, d.tp)
        self.degrees = d
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        if host is not None:
            self.host = host
        with _timeout_of_the_default_group(device_type):
            self.mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        index = torch.cuda.current_device() if device_type == "cuda" else 0
        self.device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, index)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.pp_rank, replica, part, self.tp_rank = (self.mesh.get_local_rank(axis) for axis in AXES)
        self.dp_rank = replica * shard + part
        self.speaks_for_stage = self.dp_rank == 0 and self.tp_rank == 0

    @cached_property
    def host(self) -> HostComm:
        """Collectives in host memory, for the thread that trains. The first use is collective."""
        return HostComm()

    @property
    def zero_mesh(self) -> DeviceMesh:
        """The two data-parallel axes, `(replicate, shard)`."""
        return self.mesh["replicate", "shard"]

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self.mesh["tp"]

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """Ranks that hold the other pipeline stages for this rank's part of the batch."""
        return self.mesh.get_group("pp")

    def close(self) -> None:
        """Give up the mesh's process groups; torch keeps them otherwise, with threads and connections."""
        made = [*(self.mesh.get_group(axis) for axis in AXES), *self._groups.values()]
        for group in {id(group): group for group in made}.values():
            if dist.is_initialized() and group is not dist.group.WORLD:
                dist.destroy_process_group(group)

    def group(self, *axes: str) -> dist.ProcessGroup:
        """Return the ranks that differ from this one along `axes` alone.

        Collective if several of the axes have more than one rank and it wasn't asked for before.
        """
        long = [axis for axis in axes if self.mesh[axis].size() > 1]
        if len(long) <= 1:
            return self.mesh.get_group(long[0] if long else axes[0])
        if (key := tuple(long)) not in self._groups:
            with _timeout_of_the_default_group(self.device.type):
                self._groups[key] = self.mesh[key]._flatten().get_group()
        return self._groups[key]


def timeout_of_the_default_group(device_type: str) -> timedelta | None:
    """Return the timeout of the default group's collectives; None for a backend that doesn't tell."""
    backend = distributed_c10d._get_default_group()._get_backend(torch.device(device_type))
    options = getattr(backend, "options", None)  # gloo and NCCL have them
    return None if options is None else options._timeout


@contextmanager
def _timeout_of_the_default_group(device_type: str) -> Iterator[None]:
    """Let groups that are made in the block have the default group's timeout instead of torch's own.

    It counts from the group's making, as gloo's messages from rank to rank know no other.
    """
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    if (timeout := timeout_of_the_default_group(device_type)) is not None:
        vars(distributed_c10d).update(dict.fromkeys(names, timeout))
    try:
        yield
    finally:
        vars(distributed_c10d).update(before)
