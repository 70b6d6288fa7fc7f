"""What scripts call of DeepSpeed beside `initialize`."""

from __future__ import annotations

import argparse
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed`, which changes nothing, and `--deepspeed_config FILE.json`, for `initialize`."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="accepted, as launchers give it; always on")
    group.add_argument("--deepspeed_config", help="the JSON file with the config")
    return parser


def init_distributed(dist_backend: str | None = None, **given: Any) -> None:
    """Start the process group if it wasn't, from torchrun's environment; without torchrun, of one process.

    `initialize` does so too. NCCL is used for GPUs where there are any, gloo for CPUs.

    Raises:
        ValueError: another backend, or an argument that would change the group.
    """
    import torch

    import parallel

    if dist_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"dist_backend is {dist_backend!r}; expected 'nccl', 'gloo' or None")
    harmless = {"auto_mpi_discovery", "verbose", "dist_init_required"}
    if unknown := sorted(given.keys() - harmless):
        raise ValueError(
            f"init_distributed doesn't know {', '.join(unknown)}; start the processes with torchrun"
        )
    cuda = torch.cuda.is_available() and dist_backend != "gloo"
    if dist_backend == "nccl" and not cuda:
        raise ValueError("dist_backend is 'nccl', but there is no GPU here; leave it out")
    parallel.start_process_group("cuda" if cuda else "cpu")
