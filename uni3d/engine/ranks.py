"""Ranks of an engine: from the config to connected processes, a process group and their topology."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch

import ckpt
import parallel
from parallel.failures import connect
from parallel.topology import Meeting, timeout_of_the_default_group
from uni3d.config import BatchTriad, Config, batch_triad
from uni3d.config.settings import parallel_settings
from uni3d.engine.deepspeed_arguments import check_mpu
from uni3d.engine.host_threads import use_cores
from uni3d.observe.monitors import check_installed

INITIALIZE = "initialize()"
"""Name of the work, in errors of ranks that are lost meanwhile."""


class Demands(NamedTuple):
    """Demands of a config on the ranks, before they meet."""

    degrees: parallel.Degrees
    device: str
    triad: BatchTriad
    split: parallel.Settings


@contextmanager
def joined(settings: Config, mpu: Any) -> Iterator[tuple[parallel.Topology, Demands]]:
    """Join the other ranks, and do the block's work with them: if one fails or is lost, all end. Collective.

    Raises:
        parallel.RankFailedError: another rank failed, was lost or didn't come.
    """
    asked = _demands(settings)
    timeout = _timeout(settings, asked.device)
    meeting, host, failures = connect(INITIALIZE, asked.device, settings.checkpoint.timeout_seconds, timeout)
    told = failures.told(INITIALIZE, alike=(ckpt.CheckpointError,))
    with told, host.at(INITIALIZE, alike=(ValueError, ckpt.CheckpointError)):
        yield _distribute(settings, asked, meeting, timeout, host, mpu), asked


def _demands(settings: Config) -> Demands:
    """Check the config before the ranks meet, as those that wait there can't report an error. Local."""
    check_installed(settings)
    degrees, device = degrees_of(settings)
    triad = batch_triad(settings, degrees.dp)
    split = parallel_settings(settings)
    parallel.check_micro_batches(split, degrees.pp, triad.accumulation)
    return Demands(degrees, device, triad, split)


def _distribute(
    settings: Config,
    asked: Demands,
    meeting: Meeting,
    timeout: timedelta | None,
    host: parallel.HostComm,
    mpu: Any,
) -> parallel.Topology:
    """Start the process group, if there is none, and return the topology. Collective."""
    device = asked.device
    parallel.start_process_group(device, timeout, meeting)
    topology = parallel.Topology(
        asked.degrees,
        zero_stage=settings.zero_optimization.stage,
        shard_group=settings.shard_group,
        device_type=device,
        host=host,
    )
    check_mpu(mpu, topology)
    if asked.split.offload and device == "cuda":
        use_cores()
    return topology


def _timeout(settings: Config, device: str) -> timedelta | None:
    """Return the config's timeout of collectives, None for torch's own.

    Raises:
        ValueError: it has one, but the process group was started with another.
    """
    seconds = settings.parallel.timeout_seconds
    if seconds is None:
        return None
    timeout = timedelta(seconds=seconds)
    if torch.distributed.is_initialized() and timeout_of_the_default_group(device) != timeout:
        raise ValueError(
            f"parallel.timeout_seconds is {seconds:g}, but the process group has been started before "
            "initialize(), with another timeout; leave the key out, or give the timeout to "
            "init_process_group() or init_distributed()"
        )
    return timeout


def degrees_of(settings: Config) -> tuple[parallel.Degrees, str]:
    """Return the degrees of the config on the processes of this job, and the type of their device."""
    device = settings.parallel.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
    else:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    p = settings.parallel
    return parallel.resolve_degrees(world_size, pp=p.pp, dp=p.dp, tp=p.tp), device
