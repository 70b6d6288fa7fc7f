"""The ranks and their places: one mesh, made once and handed on.

Ranks are numbered `arange(world).view(pp, replicate, shard, tp)`: tensor-parallel neighbours lie side by
side, pipeline stages farthest apart. The data-parallel axis is two mesh axes, `replicate x shard`, so
that every ZeRO stage is the same mechanism: stage 0 shards over one rank and replicates over dp, the
others shard over dp and replicate over one, or, with a shard group smaller than dp, do both.
"""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Degree = int | Literal["auto"]
AXES = ("pp", "replicate", "shard", "tp")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ways the work is split: pipeline stages, data-parallel copies, tensor-parallel parts."""

    pp: int
    dp: int
    tp: int

    def __str__(self) -> str:
        return f"(pp, dp, tp) = ({self.pp}, {self.dp}, {self.tp})"


def resolve_degrees(world_size: int, *, pp: Degree = 1, dp: Degree = "auto", tp: Degree = 1) -> Degrees:
    """Fill in the one degree that is `"auto"` and check the equation.

    Raises:
        ValueError: two are "auto", one isn't positive, or they don't multiply to `world_size`.
    """
    given: dict[str, Degree] = {"pp": pp, "dp": dp, "tp": tp}
    auto = [axis for axis, degree in given.items() if degree == "auto"]
    known = {axis: degree for axis, degree in given.items() if isinstance(degree, int)}
    if len(auto) > 1:
        raise ValueError(f"{' and '.join(auto)} are both 'auto'; give at least two of pp, dp, tp as numbers")
    for axis, degree in known.items():
        if degree < 1:
            raise ValueError(f"{axis}({degree}) must be at least 1")
    product = 1
    for degree in known.values():
        product *= degree
    equation = " * ".join(f"{axis}({degree})" for axis, degree in given.items())
    if auto:
        if world_size % product:
            raise ValueError(
                f"{equation} can't be {world_size}: {world_size} processes were started, "
                f"which {product} doesn't divide"
            )
        known[auto[0]] = world_size // product
    elif product != world_size:
        raise ValueError(f"{equation} = {product}, but {world_size} processes were started")
    return Degrees(**known)


def check_shard_group(dp: int, zero_stage: int, shard_group: int | None) -> None:
    """Check that `dp` data-parallel ranks can shard in groups of `shard_group`; None is all of them.

    Raises:
        ValueError: the group doesn't divide dp, or nothing is sharded at this stage.
    """
    if shard_group is None:
        return
    if zero_stage == 0:
        raise ValueError(
            f"a shard group of {shard_group} needs ZeRO stage 1, 2 or 3: stage 0 shards nothing; "
            "choose another stage, or give no shard group"
        )
    if shard_group < 1 or dp % shard_group:
        raise ValueError(
            f"dp({dp}) = groups * shard_group({shard_group}) has no solution; "
            "choose a shard group that divides dp"
        )


def start_process_group(device_type: str) -> None:
    """Join the group that torchrun announces in the environment; without torchrun, be a group of one."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


@cache
def _let_gloo_finish_at_exit() -> None:
    """Have the interpreter pause before it ends, so that a run that succeeded doesn't end with SIGABRT.

    Gloo's threads let go of the last collective's tensors after it is over, for which they need the GIL, and
    a thread that asks for the GIL of an interpreter that has begun to end aborts the process
    (pytorch/pytorch#190489). In the pause, they can have it.
    """
    atexit.register(time.sleep, 0.1)


class Topology:
    """The mesh, this rank's place on it, and the groups to talk to.

    Attributes:
        degrees: pp, dp and tp.
        mesh: of shape (pp, replicate, shard, tp) with the axis names of `AXES`.
        device: where this rank computes.
        pp_rank, tp_rank: this rank's place along these axes.
        dp_rank: which part of the global batch is this rank's.
        speaks_for_stage: whether this is the first of the ranks that share a place in the pipeline.
    """

    def __init__(
        self, degrees: Degrees, *, zero_stage: int, shard_group: int | None = None, device_type: str = "cpu"
    ) -> None:
        """Collective. `degrees` must multiply to the number of ranks.

        ZeRO stages 1 to 3 shard over `shard_group` neighbouring data-parallel ranks and replicate over the
        groups (MiCS, Zhang et al. 2022; the `zero_hpz_partition_size` of ZeRO++); by default over all.

        Raises:
            ValueError: they don't, or there can be no such shard group.
        """
        _let_gloo_finish_at_exit()
        d = resolve_degrees(dist.get_world_size(), pp=degrees.pp, dp=degrees.dp, tp=degrees.tp)
        check_shard_group(d.dp, zero_stage, shard_group)
        shard = 1 if zero_stage == 0 else shard_group or d.dp
        shape = (d.pp, d.dp // shard, shard, d.tp)
        self.degrees = d
        self.mesh: DeviceMesh = init_device_mesh(device_type, shape, mesh_dim_names=AXES)
        index = torch.cuda.current_device() if device_type == "cuda" else 0
        self.device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, index)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.pp_rank, replica, part, self.tp_rank = (self.mesh.get_local_rank(axis) for axis in AXES)
        self.dp_rank = replica * shard + part
        self.speaks_for_stage = self.dp_rank == 0 and self.tp_rank == 0

    @property
    def zero_mesh(self) -> DeviceMesh:
        """The two data-parallel axes, `(replicate, shard)`."""
        return self.mesh["replicate", "shard"]

    @property
    def tp_mesh(self) -> DeviceMesh:
        return self.mesh["tp"]

    @property
    def pp_group(self) -> dist.ProcessGroup:
        """The ranks that hold the other pipeline stages of this rank's part."""
        return self.mesh.get_group("pp")
