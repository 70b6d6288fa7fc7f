"""Measure training by uni3d beside DeepSpeed, DDP, FSDP2 and torch's tensor parallelism.

    python benchmarks/train.py --peers --deepspeed-python .venv-deepspeed/bin/python      # every arm
    python benchmarks/train.py --peers --ranks 2 --arms "uni3d zero1" "deepspeed zero1"   # some of them
    python benchmarks/train.py --peers --tiny --rounds 1                                  # a smoke test

Every arm trains the same GPT from the same weights, on the same samples in the same order, with AdamW
(torch's, fused) and gradients clipped to a norm of 1. The global batch is the same on any number of
ranks, cut by data-parallel rank; pipelines cut it into `--micro-batches`. On CPUs a rank stays on its
share of the cores. In a round each arm runs once, as whole processes; the order alternates. Figures are
medians of the rounds (least to most); ratios are taken by round.

It exits with 1 if two arms differ in a loss or in a gradient norm by more than rounding explains. DeepSpeed
is measured if this interpreter or the one of `--deepspeed-python` has it; how to make one is said in
`benchmarks/checkpoint/__main__.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint.peers import DeepSpeed, find_deepspeed
from benchmarks.training import report
from benchmarks.training.arms import RANKS, Arm, chosen
from benchmarks.training.launch import Run, run
from benchmarks.training.task import DTYPES, SAVE_EVERY, Task, shape, write_weights

PROGRAM = "python benchmarks/train.py --peers"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    options, _ = shape(args.config, tiny=args.tiny)
    deepspeed = find_deepspeed(args.deepspeed_python, options)
    try:
        how = {"precision": args.precision, "compiled": args.compile}
        arms = chosen(args.ranks, args.arms, deepspeed=deepspeed is not None, **how)
    except ValueError as error:
        raise SystemExit(f"{PROGRAM}: {error}") from None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # by way of `run`, which ends the ranks
    runs: dict[Arm, list[Run]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="training-benchmark-", dir=args.folder) as folder:
        write_weights(Path(folder) / "weights.safetensors", options)
        for turn in range(args.rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                print(f"{datetime.now():%H:%M:%S} round {turn + 1}: {arm.name}, {arm.ranks} ranks",
                      file=sys.stderr, flush=True)  # fmt: skip
                python = deepspeed.python if deepspeed and arm.library == "deepspeed" else sys.executable
                runs[arm].append(run(task_of(arm, args, folder), python))
            if args.json:
                args.json.write_text(json.dumps(document(args, runs, deepspeed), indent=1) + "\n")
    return conclude(args, runs, deepspeed)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only the arms of these names")
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=list(RANKS))
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run, after --warm-up")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--batch", type=int, default=8, help="samples in a global batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="micro batches of a pipeline")
    parser.add_argument("--threads", type=int, help="threads of a rank (default: its share of the cores)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile each layer, in every library")
    parser.add_argument("--config", help="a file of examples/megatron_gpt/configs; a small GPT by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny GPT, for a smoke test")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write; emptied at the end")
    parser.add_argument("--json", type=Path, help="write the figures of every round to this file")
    parser.add_argument("--deepspeed-python", metavar="PYTHON",
                        help="an interpreter that has DeepSpeed (default: this one, if it has)")  # fmt: skip
    args = parser.parse_args(arguments)
    if any(args.batch % parts for parts in (args.micro_batches, *args.ranks)):
        parser.error(
            f"--batch {args.batch} must be a multiple of --micro-batches {args.micro_batches} and of each "
            f"of --ranks {args.ranks}"
        )
    if min(args.rounds, args.steps, args.warm_up) < 1:
        parser.error("--rounds, --steps and --warm-up must be at least 1")
    return args


def task_of(arm: Arm, args: argparse.Namespace, folder: str) -> Task:
    """Return the arm's task. Runs with saves, and those beside them, take time for two saves."""
    options, seq_len = shape(args.config, tiny=args.tiny)
    return Task(
        library=arm.library,
        ranks=arm.ranks,
        zero=arm.zero,
        pp=arm.pp,
        tp=arm.tp,
        balance=arm.balance,
        schedule=arm.schedule,
        saves=arm.saves,
        options=options,
        seq_len=seq_len,
        batch=args.batch,
        micro_batches=args.micro_batches if arm.pp > 1 else 1,
        warm_up=args.warm_up,
        steps=args.steps if arm.saves is None else 2 * SAVE_EVERY,
        precision=args.precision,
        compile=args.compile,
        device=args.device,
        threads=args.threads or max(1, (os.cpu_count() or 1) // arm.ranks),
        weights=str(Path(folder) / "weights.safetensors"),
        folder=folder,
        began=0.0,
    )


def conclude(args: argparse.Namespace, runs: report.Runs, deepspeed: DeepSpeed | None) -> int:
    """Print the tables; return 1 if the arms didn't compute the same."""
    options, seq_len = shape(args.config, tiny=args.tiny)
    tokens = args.batch * seq_len
    print(machine(args, deepspeed, tokens))
    sizes = {"seq_len": seq_len, "batch": args.batch, "micro_batches": args.micro_batches}
    for text in (
        report.training_table(runs, tokens),
        report.bubbles(runs, options, **sizes),
        report.saves_table(runs, os.cpu_count() or 1),
    ):
        if text:
            print(f"\n{text}")
    losses, norms = report.differences(runs)
    limits = report.TOLERANCE[args.precision]
    print(f"\nLargest relative difference between two arms at any step: of the loss {losses:.1e}, of the "
          f"gradient norm {norms:.1e} (limits {limits[0]:.0e} and {limits[1]:.0e}).")  # fmt: skip
    if losses <= limits[0] and norms <= limits[1]:
        return 0
    print(f"{PROGRAM}: the arms didn't train alike, so their speeds can't be compared", file=sys.stderr)
    return 1


def machine(args: argparse.Namespace, deepspeed: DeepSpeed | None, tokens: int) -> str:
    beside = f"DeepSpeed {deepspeed.version}" if deepspeed else "no DeepSpeed"
    compiled = ", compiled layers" if args.compile else ""
    threads = args.threads or f"{os.cpu_count()} / ranks, at least 1"
    return (
        f"{args.rounds} rounds of {args.steps} steps after {args.warm_up}; {tokens} tokens a step, "
        f"{args.micro_batches} micro batches in pipelines; {args.precision}{compiled}, {args.device}, "
        f"threads of a rank: {threads}; torch {torch.__version__}, {beside}."
    )


def document(args: argparse.Namespace, runs: report.Runs, deepspeed: DeepSpeed | None) -> dict[str, Any]:
    settings = {key: value for key, value in vars(args).items() if isinstance(value, int | str | list | None)}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "deepspeed": deepspeed and deepspeed.version,
        "settings": settings,
        "arms": [asdict(arm) | {"rounds": [asdict(r) for r in rounds]} for arm, rounds in runs.items()],
    }


if __name__ == "__main__":
    sys.exit(main())
