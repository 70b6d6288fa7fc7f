"""Helpers for the scripts that make fixtures: local ranks, and files of expected tensors."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(os.path.relpath(Path(__file__).parent / "fixtures"))
"""Relative, since DCP writes this path into its metadata."""


def destination() -> Path:
    """Return the script's output folder."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES


def wanted(name: str) -> bool:
    """Return whether to make this fixture: the command line names some after the folder, or none for all."""
    return not sys.argv[2:] or name in sys.argv[2:]


def new_folder(out: Path, name: str) -> Path:
    """Return an empty folder for a fixture."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def on_ranks(world_size: int, case: Callable[..., None], *args: Any) -> None:
    """Run `case(*args)` on gloo ranks with a file store."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, f"file://{folder}/meet", case, args), nprocs=world_size)


def make(out: Path, name: str, world_size: int, case: Callable[..., None], *args: Any) -> None:
    """Make a fixture, if it is wanted, by `case(folder, *args)` on ranks."""
    if wanted(name):
        on_ranks(world_size, case, new_folder(out, name), *args)


def _rank(rank: int, world_size: int, meet: str, case: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        GLOO_SOCKET_IFNAME="lo",
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size)
    case(*args)
    dist.barrier()
    dist.destroy_process_group()


def write_expected(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `expected.safetensors` and `expected.json` next to the framework's files."""
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in sorted(tensors.items())}
    save_file(whole, folder / "expected.safetensors")
    (folder / "expected.json").write_text(json.dumps(facts, indent=1, default=plain) + "\n")


def plain(value: Any) -> Any:
    """Convert values that JSON can't represent: one-element tensors, nested tuples."""
    if isinstance(value, Tensor):
        return value.item()
    raise TypeError(f"{type(value)} in expected.json: {value!r}")


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer group without its parameters."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}
