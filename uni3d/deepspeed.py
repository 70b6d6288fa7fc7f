"""DeepSpeed functions for scripts, other than `initialize`."""

from __future__ import annotations

import argparse
from typing import Any


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed`, which has no effect, and `--deepspeed_config FILE.json`, read by `initialize`."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="accepted for launchers; always on")
    group.add_argument("--deepspeed_config", help="JSON file of the config")
    return parser


def init_distributed(dist_backend: str | None = None, **given: Any) -> None:
    """Start the process group unless it exists, from torchrun's environment or else with one process.

    `initialize` does so too. The backend is NCCL on GPUs and gloo on CPUs.

    Raises:
        ValueError: an unknown backend, or an argument that would change the group.
    """
    import torch

    import parallel

    if dist_backend not in (None, "nccl", "gloo"):
        raise ValueError(f"dist_backend is {dist_backend!r}; expected 'nccl', 'gloo' or None")
    harmless = {"auto_mpi_discovery", "verbose", "dist_init_required"}
    if unknown := sorted(given.keys() - harmless):
        raise ValueError(
            f"init_distributed doesn't support {', '.join(unknown)}; start the processes with torchrun"
        )
    cuda = torch.cuda.is_available() and dist_backend != "gloo"
    if dist_backend == "nccl" and not cuda:
        raise ValueError("dist_backend is 'nccl', but there is no GPU; leave it out")
    parallel.start_process_group("cuda" if cuda else "cpu")
