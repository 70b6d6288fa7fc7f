"""Program: describe this machine as JSON. Also how much host memory is left."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    import torch

    there = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if there else None
    return {
        "gpu": properties.name if properties else None,
        "gpu_memory": properties.total_memory if properties else None,
        "driver": _driver() if there else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": memory_total(),
    }


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()


CGROUP = Path("/sys/fs/cgroup")


def memory_total() -> int:
    """Return the bytes of host memory that this process may use: the machine's, or a container's limit."""
    limit = _cgroup("memory.max", "memory/memory.limit_in_bytes")
    return min(_meminfo("MemTotal"), limit if limit is not None else 1 << 62)


def memory_available() -> int:
    """Return the bytes of host memory that are left, the page cache counted as left."""
    left = _meminfo("MemAvailable")
    limit = _cgroup("memory.max", "memory/memory.limit_in_bytes")
    used = _cgroup("memory.current", "memory/memory.usage_in_bytes")
    if limit is None or used is None:
        return left
    cache = 0
    for name in ("memory.stat", "memory/memory.stat"):
        if (CGROUP / name).exists():
            rows = dict(line.split() for line in (CGROUP / name).read_text().splitlines())
            cache = int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
            break
    return min(left, limit - used + cache)


def _meminfo(field: str) -> int:
    line = next(row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) << 10


def _cgroup(*names: str) -> int | None:
    for name in names:
        path = CGROUP / name
        if path.exists() and (text := path.read_text().strip()) != "max":
            return int(text)
    return None


if __name__ == "__main__":
    print(json.dumps(describe()))
