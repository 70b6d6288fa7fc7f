"""Runs of an arm: a whole process for each rank, as torchrun would start them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.training.task import ROOT, Task

TIMEOUT_S = 900
LAST_CHARACTERS = 4000


@dataclass(frozen=True)
class Run:
    """Figures of one arm in one round."""

    seconds: list[float]
    """Seconds of each measured step, on the slowest rank."""
    first_step: float
    """Seconds from the start of the processes to the end of the first step."""
    imports: float
    initialize: float
    """Seconds of building: process group, model, weights, sharding, optimizer."""
    peak: int
    """Most bytes of a rank, beyond its imports."""
    losses: list[float]
    norms: list[float | None]
    wall: float
    """Seconds of all measured steps, and of waiting for the last save."""
    cpu: float
    """CPU seconds of all ranks in that time."""
    saved: int
    """Checkpoints that were committed, the one of the warm-up included."""
    parameters: list[list[str]]
    """Names of the parameters on each rank."""


def run(task: Task, python: str = sys.executable) -> Run:
    """Run the task's ranks to their end.

    Raises:
        RuntimeError: a rank failed, or none came to an end in time; with the end of its output.
    """
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        task = replace(task, folder=folder, began=time.time())
        port = free_port()
        processes = [start(task, rank, port, python) for rank in range(task.ranks)]
        try:
            failed = wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed is not None:
            said = (Path(folder) / f"{failed}.log").read_text(errors="replace")
            raise RuntimeError(f"rank {failed} of {task.ranks} failed:\n{said[-LAST_CHARACTERS:]}")
        return merged([json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(task.ranks)])


def start(task: Task, rank: int, port: int, python: str) -> subprocess.Popen[bytes]:
    world = str(task.ranks)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    threads = {"OMP_NUM_THREADS": str(task.threads), "PYTHONPATH": str(ROOT)}
    if task.device == "cpu":
        threads["DS_ACCELERATOR"] = "cpu"
    with (Path(task.folder) / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [python, "-m", "benchmarks.training.worker", task.to_json()],
            cwd=ROOT,
            env={**os.environ, **rendezvous, **ranks, **threads},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait(processes: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended or one has failed; return the rank of that one."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code or (code is None and time.monotonic() > deadline):
                return rank
        if None not in codes:
            return None
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def merged(ranks: list[Mapping[str, Any]]) -> Run:
    """Return the figures of a run from those of its ranks: of most, the slowest or largest."""
    times = ("first_step", "imports", "initialize", "wall")
    slowest = {key: max(rank[key] for rank in ranks) for key in times}
    return Run(
        **slowest,
        seconds=[max(step) for step in zip(*(rank["seconds"] for rank in ranks), strict=True)],
        peak=max(rank["peak"] for rank in ranks),
        losses=ranks[0]["losses"],
        norms=ranks[0]["norms"],
        saved=ranks[0]["saved"],
        cpu=sum(rank["cpu"] for rank in ranks),
        parameters=[rank["parameters"] for rank in ranks],
    )
