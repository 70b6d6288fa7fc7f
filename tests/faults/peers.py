"""The same faults for other libraries: saves that are killed or lose power, and damage to what they saved.

A save of a second checkpoint is killed at each of its calls to the file system (or a sample of them; a write
also when half of it is done), or ends by a power cut; then a fresh process looks for a checkpoint as the
library's own reader does, and loads it. What comes of that is of the kinds of `figures.py`:

- *lost*: the older checkpoint can't be loaded whole, nor the new one in its place if it has the same name; or
  the reader finds none; or, after a power cut, not the new one, though its save had returned;
- *torn*: the newest one is there by its name, but can't be loaded;
- *wrong*: a load returns without an error, with numbers that were not saved together under that name.

Damage is noticed by an error of the load, harmless if the numbers are right, or else silently wrong. Prints a
table of Markdown. `make faults-peers` runs it; `calls.c` says how calls are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from preload import build

TRIAL = Path(__file__).with_name("peer_trial.py")
OTHERS = ("torch.save", "torch.save, synced and renamed", "DCP", "zarr-python", "zarr-python, crc32c")
NAMES = ("uni3d", *OTHERS, "DeepSpeed")
WAYS = ("next", "over")
KINDS = ("lost", "torn", "wrong")
DAMAGES = ("tried", "noticed", "harmless", "wrong")


def trial(name: str, arguments: argparse.Namespace, library: Path) -> dict[str, Any] | None:
    """Try a peer in a process of its own; return its figures, or None if it isn't installed."""
    python = sys.executable
    if name == "DeepSpeed" and arguments.deepspeed_python:
        python = arguments.deepspeed_python
    elif name == "DeepSpeed" and find_spec("deepspeed") is None:
        print("DeepSpeed: not installed, not tried (see --deepspeed-python)", file=sys.stderr)
        return None
    settings = {
        key: getattr(arguments, key) for key in ("ways", "points", "cuts", "damages", "seed", "folder")
    }
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [python, str(TRIAL), name, json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name}: the trial failed")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def table(found: list[dict[str, Any]]) -> str:
    """Return the figures as a table of Markdown."""
    columns = ["saved by", "how", *(name for key in ("kills", "power cuts") for name in (key, *KINDS))]
    rows = [[*columns, "damages", *DAMAGES[1:]], ["---"] * (len(columns) + len(DAMAGES))]
    for peer in found:
        for way, figures in peer["ways"].items():
            row = [peer["title"], way]
            for name in ("kill", "cut"):
                row += [f"{figures[name].get(key, 0):,}" for key in ("points", *KINDS)]
            damage = figures.get("damage")
            rows.append(row + [f"{damage.get(key, 0):,}" if damage else "" for key in DAMAGES])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, help="beside an older one, or over it"
    )
    parser.add_argument(
        "--points", type=int, default=40, help="most kills of each peer and way; DeepSpeed has half"
    )
    parser.add_argument("--cuts", type=int, default=40, help="most power cuts of each peer and way")
    parser.add_argument("--damages", type=int, default=120, help="damages of each peer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--folder", help="where to save; by default /dev/shm if it is there")
    parser.add_argument("--deepspeed-python", help="interpreter that has DeepSpeed, if this one doesn't")
    arguments = parser.parse_args()
    if arguments.folder is None and os.access("/dev/shm", os.W_OK):
        arguments.folder = "/dev/shm"
    found = []
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        for name in arguments.peers:
            figures = trial(name, arguments, library)
            found += [figures] if figures else []
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
