"""Program: take a few steps of one model with offload, and say whether it fits.

    python -m benchmarks.gpu.offload FIGURES --config 1.3b.json --hidden 4096 --layers 16 --device cuda ...

The figures have `fits`; if it is false, `limit` says what ran out: "GPU memory" or "host memory". A thread
watches the host's memory and ends the process before the kernel would end another.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import memory_available, memory_total
from benchmarks.gpu.model import make_engine, synchronize, train_step, write
from benchmarks.gpu.search import offload_model
from benchmarks.training import task

RESERVE = 0.03
"""Share of the host's memory that stays free."""
SETTINGS: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu"},
        "offload_optimizer": {"device": "cpu"},
    },
    "activation_checkpointing": {"mode": "full"},
}
HOST, GPU = "host memory", "GPU memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--config", required=True, help="the example's config that has all but the sizes")
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--precision", choices=task.DTYPES, required=True)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    watch = HostWatch(args.figures)
    watch.start()
    try:
        found = attempt(args)
    except (RuntimeError, MemoryError) as error:
        limit = limit_of(error)
        if limit is None:
            raise
        found = {"fits": False, "limit": limit, "message": str(error).splitlines()[0]}
    write(args.figures, found | {"host": watch.most})


def attempt(args: argparse.Namespace) -> dict[str, Any]:
    options, seq_len = task.shape(args.config)
    options = offload_model(options, args.hidden, args.layers)
    engine = make_engine(options, SETTINGS, args.device, args.precision)
    seconds = []
    for _ in range(args.steps):
        began = time.perf_counter()
        train_step(engine, options["vocab_size"], seq_len)
        synchronize(args.device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else None
    return {"fits": True, "seconds": seconds, "peak": peak}


def limit_of(error: BaseException) -> str | None:
    """Return the memory that has run out, or None for another error."""
    text = str(error)
    if task.out_of_memory(error) is not None:
        return GPU
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return HOST
    if "CUDA error: out of memory" in text:  # of a pinned allocation: the device's have a class of their own
        return f"{HOST} (pinned)"
    return None


class HostWatch(threading.Thread):
    """Watches the host's memory from its start on; ends the process when it runs out.

    Attributes:
        most: most bytes that have gone since, pinned ones too, which a process's resident size may lack.
    """

    def __init__(self, figures: Path) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._figures = figures
        self._before = memory_available()
        self._least = RESERVE * memory_total()

    def run(self) -> None:
        while True:
            left = memory_available()
            self.most = max(self.most, self._before - left)
            if left < self._least:
                message = f"{left / 2**30:.1f} GiB of the host's memory were left"
                write(self._figures, {"fits": False, "limit": HOST, "message": message, "host": self.most})
                os._exit(0)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
