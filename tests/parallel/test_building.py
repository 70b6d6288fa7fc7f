"""A model on the meta device is built in the memory of a rank's share and about one parameter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
LAYER = 16 * MIB
"""Bytes of a layer: one matrix of 2048 x 2048."""

SCRIPT = """
import resource, sys
import torch
import torch.distributed as dist
from torch import nn
import parallel

torch.set_num_threads(1)
rank, dp, layers, rendezvous, whole = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(layers))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
    def init_parameter(self, name, tensor, generator):
        tensor.normal_(generator=generator)

dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=dp)
topology = parallel.Topology(parallel.Degrees(pp=1, dp=dp, tp=1), zero_stage=3)
settings = parallel.Settings(seed=0, zero_stage=3)

def build(width):
    with torch.device("cpu" if whole == "whole" else "meta"):
        return parallel.build(Net(), topology, settings)

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def now():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

warm, layers = layers, 1
built = build(1)
del built
layers = warm
before = now()
open("/proc/self/clear_refs", "w").write("5")  # from here on, the peak is counted anew
built = build(layers)
print("PEAK", peak() - before, now() - before)
dist.destroy_process_group()
"""


def build(tmp_path: Path, dp: int, layers: int, how: str) -> list[tuple[int, int]]:
    """Peak and final growth of each rank's resident memory, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(dp), str(layers), str(tmp_path / how), how],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(dp)
    ]
    found = []
    for process in processes:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        peak, now = (line.split()[1:] for line in out.splitlines() if line.startswith("PEAK")).__next__()
        found.append((int(peak), int(now)))
    return found
