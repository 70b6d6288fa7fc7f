"""The peer: DeepSpeed's ZeRO checkpoint, made universal, loaded on other ranks, and exported to fp32.

A separate program, for an interpreter that has torch and DeepSpeed but not uni3d; `peers.py` runs it. It does
one step in FOLDER and prints its figures as a line of JSON. OPTIONS are the GPT's as JSON; nothing is synced.

    python deepspeed_arm.py STEP FOLDER OPTIONS RANKS

    save      RANKS processes, ZeRO stage 1: `engine.save_checkpoint`
    convert   `ds_to_universal`, with two workers, its temporary files left in place
    load      RANKS processes: `engine.load_checkpoint` of the universal checkpoint
    export    `zero_to_fp32` into one safetensors file, and the rise of its memory in MiB

Imports and start-up are not timed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
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


def run_ranks(step: str, folder: Path, options: dict[str, Any], world: int) -> dict[str, float]:
    """Run `save` or `load` on `world` processes; time it from the first start to the last end."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(work, args=(world, folder, options, step), nprocs=world)
    times = [json.loads((folder / f"{step}-{rank}.json").read_text()) for rank in range(world)]
    return {"seconds": max(t["end"] for t in times) - min(t["start"] for t in times)}


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

    output = tempfile.mkdtemp(prefix="fp32-", dir=folder)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = status("VmRSS"), time.perf_counter()
    convert_zero_checkpoint_to_fp32_state_dict(
        str(folder / "run"), output, max_shard_size=None, safe_serialization=True, tag=TAG
    )
    return {"seconds": time.perf_counter() - start, "mib": (status("VmHWM") - before) / 1024}


def status(entry: str) -> int:
    """Return an entry of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def main(step: str, folder: Path, options: dict[str, Any], ranks: int) -> None:
    said, sys.stdout = sys.stdout, sys.stderr  # DeepSpeed prints to stdout; keep it for the answer
    if step in ("save", "load"):
        figures = run_ranks(step, folder, options, ranks)
    else:
        figures = {"convert": convert, "export": export}[step](folder)
    print(json.dumps(figures), file=said)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))
