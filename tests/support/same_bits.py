"""Check that two versions of the code compute the same bits.

    python tests/support/same_bits.py record FOLDER [--tree PATH]
    python tests/support/same_bits.py compare FOLDER [--tree PATH]

`record` does the short trainings of `same_bits_runs.py` on real ranks with the code in PATH (by default this
repository), and writes FOLDER/record.json and a checkpoint of each run, FOLDER/<name>. Each checkpoint is
then resumed twice: on the topology that wrote it, and on another.

`compare` does the same with the code in PATH, except that it resumes from FOLDER's checkpoints. Losses,
gradient norms, learning rates, weights, moments and every file of the checkpoints must be exactly as they
were recorded. It prints a line for each run, and exits with 1 if anything differs. Either command takes
about a minute and a half on 2 cores.

Results depend on the processor and on torch's version: record and compare on the same machine.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import Ranks
from same_bits_runs import FURTHER, RUNS, STEPS, Json, resume, train

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = Path("examples", "megatron_gpt")
PACKAGES = ("uni3d", "parallel", "ckpt")
RECORD = "record.json"
SCRIPT = "zero_to_fp32.py"
"""Part of each checkpoint. Its text may change; what it writes may not."""
VARIES = re.compile(rf'(?P<key>"created": ?|"run_id": ?|"uni3d": ?|"{SCRIPT}": ?)("[^"]*"|{{[^}}]*}})')
"""Values in a manifest that may differ."""


# --- on the ranks ------------------------------------------------------------------------------------------


def case(tree: Path, task: Callable[..., Any], *args: Any) -> Any:
    """Do a task on a rank, with the code of `tree` alone."""
    check_origin(tree)
    with contextlib.redirect_stderr(io.StringIO()):  # a line for each load
        found = task(*args)
    check_origin(tree)
    return found


def check_origin(tree: Path) -> None:
    """Make sure that the code under test, with every module loaded so far, is that of `tree`.

    Raises:
        ImportError: naming a package or module that comes from elsewhere.
    """
    origins = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origins[name] = spec.origin if spec is not None else None
    loaded = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] in (*PACKAGES, "model")
    }
    origins |= {name: getattr(module, "__file__", None) for name, module in loaded.items()}
    for name, origin in origins.items():
        if origin is None or not Path(origin).resolve().is_relative_to(tree):
            raise ImportError(f"{name} should come from {tree}, but Python finds {origin or 'none'}")


# --- what is recorded --------------------------------------------------------------------------------------


def saved(folder: Path) -> Json:
    """Digests of what a run saved (weights, moments, files, what its script writes), and its manifest."""
    import zarr

    import uni3d

    checkpoint = folder / (folder / "latest").read_text().strip()
    text = manifest(checkpoint)
    weights = uni3d.get_fp32_state_dict_from_zero_checkpoint(folder)
    members = zarr.open_group(checkpoint, mode="r").members(max_depth=None)
    arrays = {path: array[...] for path, array in members if isinstance(array, zarr.Array)}
    moments = {path: array for path, array in arrays.items() if not path.endswith(("/fp32", "/value"))}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, checkpoint / SCRIPT, checkpoint, out, "--safe_serialization"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        written = digests(out)
    return {
        "weights": digest((name, weight.numpy()) for name, weight in weights.items()),
        "moments": digest(moments.items()),
        "number of moments": len(moments),
        "manifest": json.loads(text),
        "text of the manifest": hashlib.sha256(text.encode()).hexdigest(),
        "files": digests(folder, leave_out=("manifest.json", SCRIPT)),
        f"by {SCRIPT}": written,
    }


def digest(arrays: Iterable[tuple[str, Any]]) -> str:
    """SHA-256 of arrays with their names, in the names' order."""
    total = hashlib.sha256()
    for name, array in sorted(arrays, key=lambda item: item[0]):
        total.update(f"{name} {array.dtype} {array.shape} ".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def digests(folder: str | Path, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path there."""
    files = [
        path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name not in leave_out
    ]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def manifest(checkpoint: Path) -> str:
    """Text of the manifest without its checksum, the time, run and version, and the script's size."""
    _, _, text = (checkpoint / "manifest.json").read_text().partition("\n")
    return "{" + VARIES.sub(r"\g<key>null", text)


def environment() -> dict[str, str]:
    """Versions and hardware that results depend on, apart from the code."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


# --- record and compare ------------------------------------------------------------------------------------


def perform(tree: Path, source: Path, folder: Path) -> Json:
    """Do all runs with the code of `tree`, resuming from the checkpoints in `source`; returns the record.

    Checkpoints and the record are written to `folder`.
    """
    paths = [str(tree), str(tree / EXAMPLE)]
    sys.path[:0] = paths  # spawned processes take it over
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # the tree is only read
    record: Json = {"environment": environment(), "runs": {}}
    pool = Ranks(4)
    try:
        for run in RUNS:
            there, elsewhere = run.split.world, run.other.world
            target, before = folder / run.name, source / run.name
            record["runs"][run.name] = {
                "run": asdict(run),
                "training": pool.run(there, case, tree, train, run, target)[0],
                "resumed": pool.run(there, case, tree, resume, run, run.split, before)[0],
                "resumed elsewhere": pool.run(elsewhere, case, tree, resume, run, run.other, before)[0],
                **pool.run(1, case, tree, saved, target)[0],
            }
    finally:
        pool.stop()
    text = json.dumps(record, indent=1)
    (folder / RECORD).write_text(text + "\n")
    return json.loads(text)


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """First place where two JSON values differ, and how; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            if key in new and (found := first_difference(old[key], new[key], f"{place}.{key}".lstrip("."))):
                return found
        if gone := [key for key in old if key not in new]:
            return f"{place}: {gone[0]} is missing"
        if added := [key for key in new if key not in old]:
            return f"{place}: {added[0]} is new"
        return None if list(old) == list(new) else f"{place}: the keys are in another order"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{place}[{i}]"))), None)
    return None if old == new else f"{place}: {shown(old)} became {shown(new)}"


def shown(value: Any) -> str:
    """Text of a value for people: floats in decimal too, anything long cut short."""
    if isinstance(value, str) and value.lstrip("-").startswith("0x"):
        return f"{value} ({float.fromhex(value):.9g})"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def report(old: Json, new: Json) -> bool:
    """Print a line for each run; returns whether all are the same."""
    if found := first_difference(old["environment"], new["environment"]):
        print(f"warning: recorded in another environment, so results may differ: {found}")
    splits = {run.name: f"{run.split} -> {run.other}" for run in RUNS}
    names = [*splits, *(name for name in old["runs"] if name not in splits)]
    width = max(map(len, names))
    differing = 0
    print(f"{'run':{width}}  {'pp x dp x tp -> second resume':45}  steps")
    for name in names:
        recorded, again = old["runs"].get(name), new["runs"].get(name)
        found = first_difference(recorded, again, "" if recorded and again else "run")
        differing += found is not None
        print(f"{name:{width}}  {splits.get(name, ''):45}  {STEPS}+{FURTHER}+{FURTHER}  {found or 'same'}")
    print(f"{differing} of {len(names)} runs differ" if differing else f"all {len(names)} runs are the same")
    return not differing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["record", "compare"])
    parser.add_argument("folder", type=Path, help="where the recording is, or goes")
    parser.add_argument("--tree", type=Path, default=ROOT, help="repository to run (default: this one)")
    args = parser.parse_args()
    tree, folder = args.tree.resolve(), args.folder.resolve()
    if args.command == "record":
        if folder.exists() and any(folder.iterdir()):
            sys.exit(f"error: {folder} isn't empty; delete it, or record to another folder")
        folder.mkdir(parents=True, exist_ok=True)
        perform(tree, folder, folder)
        print(f"{folder / RECORD}: {len(RUNS)} runs of {tree}")
        return
    if not (folder / RECORD).is_file():
        sys.exit(f"error: {folder} has no {RECORD}; make one with: record {folder}")
    with tempfile.TemporaryDirectory() as again:
        new = perform(tree, folder, Path(again))
    if not report(json.loads((folder / RECORD).read_text()), new):
        sys.exit(1)


if __name__ == "__main__":
    main()
