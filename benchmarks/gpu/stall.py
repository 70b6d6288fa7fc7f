"""Program: measure the stall of an asynchronous save, beside a plain copy of as many bytes to pinned memory.

    python -m benchmarks.gpu.stall FIGURES --config 1.3b.json --device cuda --precision bf16 --folder DIR

The first save allocates its pinned memory and isn't counted. The copy is the raw limit: from one GiB of the
GPU's memory to one of pinned memory, as often as it takes. The files are written without fsync, to a fresh
folder each time, and removed: neither is part of the stall.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from benchmarks.gpu.model import make_engine, synchronize, train_step, write
from benchmarks.training import task

STEP_TOKENS = 64
"""Length of the sequence of the one step, which is taken only to have moments."""
BLOCK = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--precision", choices=task.DTYPES, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="where to write")
    parser.add_argument("--saves", type=int, default=3, help="saves that are measured")
    args = parser.parse_args()
    measure(args, args.folder)


def measure(args: argparse.Namespace, folder: Path) -> None:
    options, seq_len = task.shape(args.config)
    settings = {"checkpoint": {"async_save": True, "durable": False}}
    engine = make_engine(options, settings, args.device, args.precision)
    train_step(engine, options["vocab_size"], min(seq_len, STEP_TOKENS))
    nbytes = state_bytes(engine)
    check_room(folder, nbytes)
    copies = Copies(nbytes, args.device)
    found: dict[str, Any] = {"bytes": nbytes, "stalls": [], "copies": []}
    for i in range(args.saves + 1):
        run = folder / str(i)
        synchronize(args.device)
        began = time.perf_counter()
        engine.save_checkpoint(run)
        stall = time.perf_counter() - began
        engine.wait_for_checkpoint()
        if not (run / "latest").exists():
            raise RuntimeError(f"{run} has no checkpoint")
        shutil.rmtree(run)
        copy = copies.seconds()
        if i == 0:
            found["first"] = stall
        else:
            found["stalls"].append(stall)
            found["copies"].append(copy)
        write(args.figures, found)
    engine.destroy()


def state_bytes(engine: Any) -> int:
    """Return the bytes of all parameters and moments, by torch's own objects."""
    total = 0
    for parameter, state in engine.optimizer.state.items():
        for tensor in (parameter, *state.values()):
            if tensor.ndim:  # not the count of steps
                total += (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
    return total


def check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.05 * nbytes + (64 << 20):
        raise ValueError(
            f"a save needs {nbytes / 1e9:.1f} GB, but {folder.parent} has {free / 1e9:.1f} GB free; "
            "name another --folder"
        )


class Copies:
    """Copies of `nbytes` from the device to the host's memory, pinned for a GPU."""

    def __init__(self, nbytes: int, device: str) -> None:
        self._device, self._nbytes = device, nbytes
        size = min(BLOCK, nbytes)
        self._source = torch.zeros(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros(size, dtype=torch.uint8, pin_memory=device == "cuda")

    def seconds(self) -> float:
        synchronize(self._device)
        began = time.perf_counter()
        left = self._nbytes
        while left > 0:
            size = min(left, len(self._source))
            self._target[:size].copy_(self._source[:size], non_blocking=True)
            left -= size
        synchronize(self._device)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
