"""Checkpoints beside what the machine can do and what others do: what is claimed, measured.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py                    # everything; half an hour or so
    python benchmarks/checkpoint.py --only save stall --repeats 3        # some figures
    python benchmarks/checkpoint.py --small --repeats 1                  # whether it runs at all

Run it on a machine that does nothing else, with 50 GB free below `--folder` and 20 GiB of memory. Arms take
turns within a figure, and each cell gives the median of `--repeats` rounds (least to most). The state is that
of a GPT with 134M parameters and AdamW's fp32 moments, 1.5 GiB in 408 arrays, on gloo ranks with one thread
each. Every save goes into a fresh folder; before each arm the disk is synced, and what earlier ones wrote
leaves the page cache. With `--deepspeed PYTHON`, an interpreter with DeepSpeed, that is run too; without, its
published figures (`benchmarks/RESULTS.md`) stand in. To make one:

    python3 -m venv .venv-deepspeed
    .venv-deepspeed/bin/pip install torch==2.13.0 numpy safetensors setuptools wheel
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/pip install --no-build-isolation deepspeed==0.19.8
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parent)]
sys.path[:0] = PATHS  # and those of the processes that it starts
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])

from checkpoint_figures import export, load, memory, resize, save, subject, tiny  # noqa: E402
from checkpoint_figures.bench import Bench  # noqa: E402
from checkpoint_figures.table import Row, render  # noqa: E402
from checkpoint_figures.workspace import Workspace  # noqa: E402

FIGURES: dict[str, Callable[[Bench], list[Row]]] = {
    "save": save.figures,
    "stall": save.stall_figures,
    "load": load.figures,
    "topologies": load.topology_figures,
    "bytes": load.byte_figures,
    "resize": resize.figures,
    "export": export.figures,
    "tiny": tiny.figures,
    "memory": memory.figures,
}
ROOM_BYTES = 50e9
"""The most that a figure writes, with DeepSpeed."""


def main() -> int:
    args = _arguments()
    options = subject.SMALL if args.small else subject.FULL
    rows: list[Row] = []
    workspace = Workspace(args.folder, room=1e9 if args.small else ROOM_BYTES, settle=not args.small)
    bench = Bench(
        workspace=workspace,
        repeats=args.repeats,
        options=options,
        pair_options=options | {"num_layers": 2},
        deepspeed=args.deepspeed,
    )
    try:
        for name in args.only:
            print(f"{datetime.now():%H:%M:%S} {name}", file=sys.stderr, flush=True)
            workspace.make_room()
            found = FIGURES[name](bench)
            rows += found
            print(render(found), file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(_document(args, rows), indent=1) + "\n")
    finally:
        workspace.close()
    print(render(rows))
    return 0 if all(row.holds is not False for row in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE",
                        help=f"some of {', '.join(FIGURES)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the medians are printed")
    parser.add_argument("--small", action="store_true", help="a model that is only good for a smoke run")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write; cleaned up")
    parser.add_argument("--json", type=Path, help="write every figure of every round to this file")
    parser.add_argument("--deepspeed", metavar="PYTHON", help="an interpreter that has DeepSpeed installed")
    return parser.parse_args()


def _document(args: argparse.Namespace, rows: list[Row]) -> dict[str, object]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "small": args.small,
        "repeats": args.repeats,
        "rows": [row.to_json() for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
