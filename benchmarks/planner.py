"""Compare the planner's time of a step (`uni3d/estimate/step.py`) with published runs, or with runs here.

    python benchmarks/planner.py            # the runs of benchmarks/published_runs.py, by source
    python benchmarks/planner.py --all      # each of them
    python benchmarks/planner.py --here     # a small GPT on this machine's CPU: 1 process, dp 2, pp 2

Published runs are estimated with one set of rates for each kind of GPU. In the last two columns each source
has a rate of its own, the median of those that fit its runs: what is left is not due to its kernels.

With `--here`, the run on one process gives the FLOP/s that a rank reaches, and an all-reduce in the runs of
two the bandwidth. Processes have one thread each. Two runs on one process go at once, as cores share caches
and memory, and may be two threads of one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "megatron_gpt")]

from benchmarks.published_runs import CALIBRATION, Run, published_runs  # noqa: E402
from parallel.degrees import Ranks  # noqa: E402
from uni3d.estimate.gpt import from_model_config  # noqa: E402
from uni3d.estimate.job import Job  # noqa: E402
from uni3d.estimate.step import ERROR, Machine, cost, operations  # noqa: E402

MODEL = {"vocab_size": 2048, "hidden_size": 256, "num_layers": 8, "num_heads": 4}
PLACES = {"1 process": (1, 1), "dp 2": (1, 2), "pp 2": (2, 1)}
REDUCED = 8 << 20
"""Elements of the all-reduce that measures the bandwidth: 32 MiB, about the model's gradients."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="print every published run")
    parser.add_argument("--here", action="store_true", help="compare with runs on this machine")
    parser.add_argument("--rounds", type=int, default=3, help="times that each run here is started")
    parser.add_argument("--steps", type=int, default=5, help="steps of each that are timed")
    parser.add_argument("--case", choices=PLACES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(args.case, args.steps)
        return
    lines = here(args.rounds, args.steps) if args.here else every_run() if args.all else by_source()
    print("\n".join(lines))


def every_run() -> Iterator[str]:
    yield "| run | published (s) | estimated (s) | ratio | |"
    yield "| --- | --- | --- | --- | --- |"
    for run in published_runs():
        note = run.why or ("gives the rate" if run.name in CALIBRATION else "")
        yield f"| {run.name} | {run.seconds:.2f} | {run.estimate:.2f} | {run.ratio:.2f} | {note} |"


def by_source() -> Iterator[str]:
    yield "| source | GPU | runs | ratio | more than 25% off | own rate (TFLOP/s) | ratio with it |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for (source, gpu), group in groupby(published_runs(), lambda run: (run.name.split()[0], run.machine)):
        runs = list(group)
        ratios = [run.ratio for run in runs]
        off = sum(abs(ratio - 1) > ERROR for ratio in ratios)
        rate = statistics.median(map(fitting_rate, runs))
        own = [run.estimate_at(rate) / run.seconds for run in runs]
        yield (
            f"| {source} | {gpu} | {len(runs)} | {min(ratios):.2f} to {max(ratios):.2f} | {off} "
            f"| {rate / 1e12:.0f} | {min(own):.2f} to {max(own):.2f} |"
        )


def fitting_rate(run: Run) -> float:
    """Return the FLOP/s with which the run's estimate is its time, by bisection."""
    low, high = 1e12, 1e15
    while high / low > 1.0001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if run.estimate_at(middle) > run.seconds else (low, middle)
    return low


# --- runs here -------------------------------------------------------------------------------------------


def here(rounds: int, steps: int) -> Iterator[str]:
    """Yield a table of measured steps and their estimates."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PLACES}
    for _ in range(rounds):
        for name in PLACES:
            found[name].append(start(name, steps))
    seconds = {name: statistics.median(each["seconds"] for each in runs) for name, runs in found.items()}
    rates = [each["bandwidth"] for name, runs in found.items() for each in runs if name != "1 process"]
    bandwidth, flops = statistics.median(rates), operations(job("1 process")) / seconds["1 process"]
    machine = Machine(flops=flops, inside=bandwidth, between=bandwidth, ranks_per_node=2)
    yield f"{flops / 1e9:.1f} GFLOP/s, {bandwidth / 1e9:.2f} GB/s, load {os.getloadavg()[0]:.1f} at the end\n"
    yield "| run | measured (s) | estimated (s) | ratio |"
    yield "| --- | --- | --- | --- |"
    for name, measured in seconds.items():
        estimate = cost(job(name), machine).seconds
        yield f"| {name} | {measured:.3f} | {estimate:.3f} | {estimate / measured:.2f} |"


def job(name: str) -> Job:
    pp, dp = PLACES[name]
    sizes: dict[str, Any] = {"seq_len": 128, "micro_batch": 4, "accumulation": 4}
    ranks = Ranks(pp=pp, dp=dp, tp=1, zero=1)
    return Job(shape=from_model_config(MODEL), ranks=ranks, precision="fp32", device="cpu", **sizes)


def start(name: str, steps: int) -> dict[str, float]:
    """Run a case in processes of its own, as often at once as two processes allow; return the means."""
    ranks = job(name).ranks.total
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, "--case", name, "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2 // ranks)
    ]
    printed = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{name}: a run failed, see above")
    found = [json.loads(line) for text in printed for line in text.splitlines() if line.startswith("{")]
    return {key: statistics.mean(each[key] for each in found) for key in found[0]}


def run_case(name: str, steps: int) -> None:
    """Train a few steps as one of a case's ranks. Rank 0 prints the median seconds and the bandwidth."""
    import torch
    import torch.distributed as dist
    from model import GPT, GPTConfig
    from torch.utils.data import TensorDataset

    import uni3d

    planned = job(name)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": planned.micro_batch,
        "gradient_accumulation_steps": planned.accumulation,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": planned.ranks.zero},
        "parallel": {"pp": planned.ranks.pp, "dp": planned.ranks.dp, "device": "cpu"},
    }
    with torch.device("meta"):
        model = GPT(GPTConfig(**MODEL))
    samples = torch.randint(0, planned.shape.vocab, (2, planned.batch * (steps + 2), planned.seq_len))
    engine = uni3d.initialize(model=model, training_data=TensorDataset(*samples), config=config)[0]
    for _ in range(2):
        engine.train_batch()
    times = [timed(engine.train_batch) for _ in range(steps)]
    bandwidth = 0.0
    if planned.ranks.total > 1:
        buffer = torch.ones(REDUCED)
        once = statistics.median(timed(lambda: dist.all_reduce(buffer)) for _ in range(steps + 1))
        bandwidth = buffer.nbytes / once  # two ranks send as many bytes as the buffer has
    if int(os.environ["RANK"]) == 0:
        print(json.dumps({"seconds": statistics.median(times), "bandwidth": bandwidth}))


def timed(function: Any) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
