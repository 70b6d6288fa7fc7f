"""The peer: DeepSpeed's ZeRO checkpoint, made universal, loaded on other ranks, and exported to fp32.

A separate program, for an interpreter that has torch and DeepSpeed but not uni3d. `resize.py` and `export.py`
run it: `python deepspeed_arm.py FOLDER OPTIONS resize RANKS` or `... FOLDER OPTIONS export` prints
the seconds of each step as a line of JSON. FOLDER must not exist yet, OPTIONS are the GPT's as JSON, RANKS is
the number of processes that load. Nothing is synced to the disk.

    save      two ranks, ZeRO stage 1: `engine.save_checkpoint`
    convert   `ds_to_universal`, with two workers, its temporary files left in place
    load      `engine.load_checkpoint` with `load_universal`
    export    `zero_to_fp32` into one safetensors file, and the rise of its memory in MiB

Imports and start-up are not timed, except in `export command`, which is `export` as a whole process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "examples" / "megatron_gpt"))

BATCH, SEQ_LEN, TAG = 12, 4, "bench"


def resize(folder: Path, options: dict[str, Any], ranks: int) -> dict[str, float]:
    """Return the seconds of each step."""
    return {
        "save": run_ranks(2, folder, options, "save"),
        "convert": alone("convert", folder)["seconds"],
        "load": run_ranks(ranks, folder, options, "load"),
    }


def save_and_export(folder: Path, options: dict[str, Any]) -> dict[str, float]:
    """Return the seconds and MiB of the export."""
    run_ranks(2, folder, options, "save")
    start = time.perf_counter()
    exported = alone("export", folder)
    command = time.perf_counter() - start
    return {"export": exported["seconds"], "export MiB": exported["mib"], "export command": command}


def run_ranks(world: int, folder: Path, options: dict[str, Any], step: str) -> float:
    """Run `step` on `world` processes; return the seconds from the first start to the last end."""
    mp.spawn(work, args=(world, folder, options, step), nprocs=world)
    times = [json.loads((folder / f"{step}-{rank}.json").read_text()) for rank in range(world)]
    return float(max(t["end"] for t in times) - min(t["start"] for t in times))


def work(rank: int, world: int, folder: Path, options: dict[str, Any], step: str) -> None:
    """Body of one rank's process."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{step}", rank=rank, world_size=world)
    engine = make_engine(world, options, universal=step == "load")
    if step == "save":
        take_step(engine, options["vocab_size"], BATCH // world)
    dist.barrier()
    start = time.perf_counter()
    if step == "save":
        engine.save_checkpoint(str(folder / "run"), tag=TAG)
    else:
        engine.load_checkpoint(str(folder / "run"), tag=f"{TAG}_universal")
    end = time.perf_counter()
    (folder / f"{step}-{rank}.json").write_text(json.dumps({"start": start, "end": end}))
    dist.barrier()
    dist.destroy_process_group()


def make_engine(world: int, options: dict[str, Any], *, universal: bool) -> Any:
    """Make an engine for the GPT with AdamW, under ZeRO stage 1."""
    import deepspeed
    from model import GPT, GPTConfig

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**options))
    config = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def take_step(engine: Any, vocabulary: int, samples: int) -> None:
    """Take one optimizer step, so that there are moments."""
    tokens = torch.randint(vocabulary, (samples, SEQ_LEN + 1))
    total, count = engine.module.loss_fn(engine(tokens[:, :-1]), tokens[:, 1:])
    engine.backward(total / count)
    engine.step()


def alone(step: str, folder: Path) -> dict[str, float]:
    """Run `convert` or `export` in a new process, as a user would."""
    # Not by multiprocessing: its children would spawn DeepSpeed's workers instead of forking them, and each
    # would import everything again.
    subprocess.run([sys.executable, __file__, str(folder), step], check=True, stdout=subprocess.DEVNULL)
    figures: dict[str, float] = json.loads((folder / f"{step}.json").read_text())
    return figures


def convert(folder: Path) -> dict[str, float]:
    """Time `ds_to_universal`."""
    from deepspeed.checkpoint import ds_to_universal

    run = folder / "run"
    args = Namespace(
        input_folder=str(run / TAG),
        output_folder=str(run / f"{TAG}_universal"),
        num_extract_workers=2,
        num_merge_workers=2,
        keep_temp_folder=True,  # deleting slows down the creation of files after it
        strict=True,
        inject_missing_state=True,
    )
    start = time.perf_counter()
    ds_to_universal.main(args)
    return {"seconds": time.perf_counter() - start}


def export(folder: Path) -> dict[str, float]:
    """Time `zero_to_fp32`, and measure its memory."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = status("VmRSS"), time.perf_counter()
    convert_zero_checkpoint_to_fp32_state_dict(
        str(folder / "run"), str(folder / "fp32"), max_shard_size=None, safe_serialization=True, tag=TAG
    )
    return {"seconds": time.perf_counter() - start, "mib": (status("VmHWM") - before) / 1024}


def status(entry: str) -> int:
    """Return an entry of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def main(target: Path, what: str, *rest: str) -> None:
    if what in ("convert", "export"):  # a child of this program, see `alone`
        result = convert(target) if what == "convert" else export(target)
        (target / f"{what}.json").write_text(json.dumps(result))
        return
    said, sys.stdout = sys.stdout, sys.stderr  # DeepSpeed prints to stdout; keep it for the answer
    target.mkdir(parents=True)
    options = json.loads(what)
    figures = (
        resize(target, options, int(rest[1])) if rest[0] == "resize" else save_and_export(target, options)
    )
    print(json.dumps(figures), file=said)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
