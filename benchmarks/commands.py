"""Measure the commands as a user waits for them, start-up included, and their memory.

    OMP_NUM_THREADS=1 python benchmarks/commands.py [--repeats 5] [--mib 1024] [--folder DIR]

Each command runs in turns with a raw limit that does the same reading or writing. For `inspect` of 10,000
atoms with two moments each (30,000 arrays), the limit is parsing its two documents. For `import` of a file
of `torch.save`, and for exports in each format, it is `cp` and a sync of as many bytes. Medians and the
median of the ratios are printed. The memory is the peak of a process's own pages, without mapped files.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import ckpt

UNI3D = [sys.executable, "-c", "from uni3d.cli import main; main()"]
PARSE = "import json, sys; [json.loads(open(path, 'rb').read()) for path in sys.argv[1:]]"
ATOMS, STATES = 10_000, ("fp32", "exp_avg", "exp_avg_sq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="size of the weights to import and export")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        many_atoms(Path(folder), args.repeats)
        large_files(Path(folder), args.repeats, args.mib)


def many_atoms(folder: Path, repeats: int) -> None:
    names = [f"layers.{i // 10}.part.{i % 10}.weight" for i in range(ATOMS)]
    save(folder / "many", {(n, state): np.zeros((4, 4), np.float32) for n in names for state in STATES})
    documents = [str(folder / "many" / "t" / name) for name in ("manifest.json", "zarr.json")]
    parse = [sys.executable, "-c", PARSE, *documents]
    for command in (["--help"], ["inspect", folder / "many"], ["inspect", folder / "many", "--atoms"]):
        raw = [sys.executable, "-c", "pass"] if command == ["--help"] else parse
        what = " ".join(map(str, command)).replace(str(folder / "many"), "RUN")
        report(f"uni3d {what}", [(seconds([*UNI3D, *command]), seconds(raw)) for _ in range(repeats)])


def large_files(folder: Path, repeats: int, mib: int) -> None:
    memory_of_nothing = memory([*UNI3D, "--version"])
    print(f"uni3d --version: {memory_of_nothing:.0f} MiB in memory")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(1024, 4096, generator=generator) for i in range(mib // 16)}
    torch.save(tensors, folder / "weights.pt")
    del tensors
    out = folder / "out"
    works = {
        "import of a torch file": ["import", folder / "weights.pt", out],
        "export to safetensors": ["export", folder / "run", out / "x.safetensors"],
        "export to bf16 in files of 256MB": ["export", folder / "run", out, *SHARDS, "--dtype", "bf16"],
        "export to a torch file": ["export", folder / "run", out / "x.bin"],
    }
    subprocess.run([*UNI3D, "import", folder / "weights.pt", folder / "run"], check=True, capture_output=True)
    for what, command in works.items():
        pairs, peaks = [], []
        for _ in range(repeats):
            prepare(out, is_file="out" not in str(command[2]).rpartition("/")[2])
            peaks.append(memory([*UNI3D, *map(str, command)]))
            prepare(out, is_file="out" not in str(command[2]).rpartition("/")[2])
            ours = seconds([*UNI3D, *map(str, command)])
            prepare(out, is_file=True)
            pairs.append((ours, copied(folder / "weights.pt", out)))
        report(f"{what}, {mib} MiB of fp32", pairs, f"; at most {max(peaks):.0f} MiB in memory")


SHARDS = ["--max-shard-size", "256MB"]


def prepare(out: Path, *, is_file: bool) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if is_file:
        out.mkdir()
    subprocess.run(["sync"], check=True)


def copied(source: Path, out: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, out / "copy")
    subprocess.run(["sync", str(out / "copy")], check=True)
    return time.perf_counter() - start


def seconds(command: list[object]) -> float:
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    return time.perf_counter() - start


def memory(command: list[str]) -> float:
    """Return the peak of the process's anonymous memory in MiB, sampled every few milliseconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                most = max(most, int(line.split()[1]))
        time.sleep(0.003)
    assert process.returncode == 0
    return most / 1024


def report(what: str, pairs: list[tuple[float, float]], more: str = "") -> None:
    ours, raw = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    spread = f"{min(a for a, _ in pairs):.2f} to {max(a for a, _ in pairs):.2f}"
    print(f"{what}: {ours:.2f} s ({spread}), raw {raw:.2f} s, ratio {ratio:.2f}{more}", flush=True)


def save(run: Path, arrays: dict[tuple[str, str], np.ndarray]) -> None:
    shards = [
        ckpt.Shard(ckpt.ShardSpec(ckpt.ArrayKey(*key), str(a.dtype), a.shape, ckpt.Box.whole(a.shape)), a)
        for key, a in arrays.items()
    ]
    document = {
        "step": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "writer": {"topology": {"pp": 1, "dp": 1, "tp": 1}, "zero_stage": 1},
    }
    plan = ckpt.make_plan({0: [shard.spec for shard in shards]})
    ckpt.save(run, "t", shards, plan=plan, comm=ckpt.Solo(), document=document, durable=False)


if __name__ == "__main__":
    main()
