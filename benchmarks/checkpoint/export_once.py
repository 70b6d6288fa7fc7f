"""Program that imports only `ckpt`, exports, and prints JSON.

python -m benchmarks.checkpoint.export_once RUN FILE [unsynced]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ckpt
from benchmarks.checkpoint.procfs import MIB, peak_over_start


def measure(run: Path, path: Path, durable: bool) -> dict[str, float]:
    """Return the seconds, the MiB of memory and the bytes of an export."""
    with peak_over_start() as peak:
        start = time.perf_counter()
        size = ckpt.export_safetensors(ckpt.open_checkpoint(run), path, durable=durable)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "mib": peak[0] / MIB, "size": size}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:] != ["unsynced"])))
