"""Measure on one GPU what can only be measured there, in a few minutes: `make gpu`.

    python -m benchmarks.gpu                   # 8 minutes on an H100 or H200
    python -m benchmarks.gpu --parts stall     # one part
    python -m benchmarks.gpu --device cpu --config tiny.json --precision fp32 --no-compile --micro-batches 1 \
        --rounds 1 --hidden 64 --max-layers 2  # a trial of the command itself, whose figures mean nothing

In order of worth: the tests marked `gpu`; training of the 1.3B config beside a bare compiled loop, at micro
batch 8; the stall of an asynchronous save of its state; training at micro batch 16; the largest model that
trains with offload. Each part is a process with a time limit. What there is no time for is skipped, and said
to be. The engine and the bare loop run one after the other, each alone on the GPU.

Prints a table for `benchmarks/RESULTS.md`, and writes all figures as JSON. Exits with 1 if a part failed, and
with 2 if there is no GPU. A missed bar is a figure, not a failure.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import make_parts
from benchmarks.gpu.report import PartReport, heading, table, write
from benchmarks.gpu.schedule import ROOT, Clock, run, run_parts

PARTS = ("tests", "training", "stall", "offload")


def main() -> int:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the part under way, too
    clock, began = Clock(60 * args.minutes), time.monotonic()
    done = run(["-m", "benchmarks.gpu.machine"], Clock(60))
    if done.code != 0:
        print(f"the machine can't be described: {done.error}", file=sys.stderr)
        return 1
    machine: dict[str, Any] = json.loads(done.output.splitlines()[-1])
    if args.device == "cuda" and machine["gpu"] is None:
        print(
            f"no GPU: torch {machine['torch']} finds no CUDA device here, so nothing was measured",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        reports = run_parts(make_parts(args, machine, Path(folder)), clock, show)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    taken = time.monotonic() - began
    document = {
        "date": date,
        "commit": _commit(),
        "machine": machine,
        "seconds": taken,
        "minutes": args.minutes,
    }
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write(args.out, document | {"options": options}, reports)
    print(f"\n{heading(machine, date)}")
    print(f"{args.precision}{', compiled' * args.compile}; {taken / 60:.1f} of {args.minutes:g} minutes.\n")
    print(table(reports))
    if args.device == "cpu":
        print("\nA trial on the CPU, which says nothing of a GPU: not for RESULTS.md.")
    return 1 if any(report.status == "failed" for report in reports) else 0


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the whole command")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu.json", help="the JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--folder", type=Path, help="where saves are written; the temporary folder by default"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--config", default="1.3b.json", help="a file of examples/megatron_gpt/configs")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of two steps, in training")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the models with offload")
    parser.add_argument("--max-layers", type=int, default=1024, help="most layers of these that are tried")
    return parser.parse_args(given)


def show(report: PartReport) -> None:
    """Print a line for a part that has ended."""
    print(
        f"{report.name}: {report.status}, {report.seconds:.0f} s {report.error}".rstrip(),
        file=sys.stderr,
        flush=True,
    )


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
