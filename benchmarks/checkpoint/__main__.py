"""Measure how fast checkpoints are saved, loaded, resized and exported, beside raw I/O and other frameworks.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint               # every figure; about half an hour
    python -m benchmarks.checkpoint --only save stall --repeats 3   # some of them
    python -m benchmarks.checkpoint --small --repeats 1             # a smoke test

Run it from the root of the repository, on an idle machine with 60 GB free below `--folder` and 20 GiB of
memory. The arms of a figure take turns; each cell is the median of `--repeats` rounds (least to most). The
model is a GPT with 134M parameters and AdamW's fp32 moments: 1.5 GiB in 408 arrays, on gloo ranks with one
thread each. Every save goes to a fresh folder. Before each arm the disk is synced, and the files of earlier
arms leave the page cache.

DCP is measured in turn with ours, and so is DeepSpeed (save, resize, export) if this interpreter has it or
`--deepspeed-python` names one that has. To make one:

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

from benchmarks.checkpoint import export, load, memory, resize, save, subject, tiny, without_engine
from benchmarks.checkpoint.bench import Bench
from benchmarks.checkpoint.peers import find_deepspeed
from benchmarks.checkpoint.table import Row, render
from benchmarks.checkpoint.workspace import Workspace

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
    "without-engine": without_engine.figures,
}
ROOM_BYTES = 60e9
"""Most bytes that one figure writes, DeepSpeed's included."""


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
        deepspeed=find_deepspeed(args.deepspeed_python, options),
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
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE",
                        help=f"some of {', '.join(FIGURES)}")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: 5); medians are printed")
    parser.add_argument("--small", action="store_true", help="a tiny model, for a smoke test")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write; emptied at the end")
    parser.add_argument("--json", type=Path, help="write the figures of every round to this file")
    parser.add_argument("--deepspeed-python", metavar="PYTHON",
                        help="an interpreter that has DeepSpeed (default: this one, if it has)")  # fmt: skip
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
