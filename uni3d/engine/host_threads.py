"""Threads of an optimizer that steps in host memory."""

from __future__ import annotations

import os

import torch


def use_cores() -> None:
    """Give this process's operations on the CPU its share of the machine's cores, if torchrun gave them one.

    Where nothing else says how many threads a process has, torchrun sets `OMP_NUM_THREADS` to 1. Beside GPUs
    the CPU is idle, but for the step of offloaded parameters.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.get_num_threads() == 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
