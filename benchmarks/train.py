"""Compare the engine with a bare PyTorch loop of the same model: tokens/s, MFU, memory, time in Python.

    OMP_NUM_THREADS=2 python benchmarks/train.py                          # a small GPT, on the CPU
    python benchmarks/train.py --device cuda --config 1.3b.json --precision bf16 --compile
    python benchmarks/train.py --peers ...                                # beside other libraries instead

`--peers` measures DeepSpeed, DDP, FSDP2 and tensor parallelism by hand beside the engine, on 1 to 4 ranks;
`--peers --help` shows its options (`benchmarks/training/`). What follows is about the rest.

There is one process and nothing to communicate, so the difference is the engine's own cost. The bare loop
has the same model, casts, clipping and optimizer, as one would write them by hand. Both take steps in
turns. Medians are printed, and the median of the ratios by round. Memory is measured in a separate process
for each. MFU is model FLOPs (`uni3d.observe.flops`) / (seconds x the device's peak, `--peak-tflops`).
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import dataclasses
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "megatron_gpt")]

from model import GPT, GPTConfig  # noqa: E402

import uni3d  # noqa: E402
from benchmarks.training import task  # noqa: E402
from benchmarks.training.task import ADAMW, CLIP, DTYPES, Batch  # noqa: E402
from uni3d.observe import flops  # noqa: E402

Step = Callable[[Batch], None]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", help="a file of examples/megatron_gpt/configs; a small GPT by default")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile each layer, in both")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device; 989 for an H100 SXM in bf16")
    parser.add_argument("--peers", action="store_true", help="other libraries; with options of its own")
    parser.add_argument("--memory-of", choices=["engine", "bare"], help=argparse.SUPPRESS)
    return parser.parse_args()


def shape(args: argparse.Namespace) -> tuple[GPTConfig, int]:
    """Return the model's config and the length of its sequences."""
    options, seq_len = task.shape(args.config)
    return GPTConfig(**options), seq_len


def engine_step(args: argparse.Namespace, model_config: GPTConfig) -> tuple[Step, uni3d.Engine]:
    config = {
        "train_micro_batch_size_per_gpu": args.micro_batch,
        "gradient_accumulation_steps": args.accumulation,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": args.precision == "bf16"},
        "compile": {"enabled": args.compile},
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "parallel": {"device": args.device},
    }
    with torch.device("meta"):
        model = GPT(model_config)
    engine = uni3d.initialize(model=model, config=config)[0]

    def step(batch: Batch) -> None:
        engine.train_batch(iter(batch))

    return step, engine


def bare_step(args: argparse.Namespace) -> Step:
    """Make the bare loop: fp32 masters, and in bf16 a copy to compute with, its gradients summed in fp32."""
    config, _ = shape(args)
    masters = GPT(config).to(args.device)
    dtype = DTYPES[args.precision]
    model = masters if dtype == torch.float32 else copy.deepcopy(masters).to(dtype)
    if args.compile:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward)
    wholes, used = list(masters.parameters()), list(model.parameters())
    optimizer = torch.optim.AdamW(wholes, fused=True, **ADAMW)

    def step(batch: Batch) -> None:
        tokens = torch.zeros((), device=args.device)
        if model is not masters:
            with torch.no_grad():
                torch._foreach_copy_(used, wholes)
        for inputs, targets in batch:
            total, count = model.loss_fn(model(inputs.to(args.device)).float(), targets.to(args.device))
            total.backward()
            tokens = tokens + count
            if model is not masters:
                add_up(wholes, used)
        gradients = [p.grad for p in wholes if p.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / tokens)
        nn.utils.clip_grad_norm_(wholes, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.no_grad()
def add_up(wholes: list[nn.Parameter], used: list[nn.Parameter]) -> None:
    if wholes[0].grad is None:
        for whole, low in zip(wholes, used, strict=True):
            assert low.grad is not None
            whole.grad = low.grad.float()
    else:
        torch._foreach_add_([p.grad for p in wholes], [p.grad for p in used])
    for low in used:
        low.grad = None


def batches(args: argparse.Namespace) -> Iterator[Batch]:
    config, seq_len = shape(args)
    generator = torch.Generator().manual_seed(0)
    while True:
        size = (args.accumulation, args.micro_batch, seq_len + 1)
        tokens = torch.randint(0, config.vocab_size, size, generator=generator)
        yield [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


def seconds(args: argparse.Namespace, step: Step, data: list[Batch]) -> float:
    synchronize(args)
    began = time.perf_counter()
    for batch in data:
        step(batch)
    synchronize(args)
    return (time.perf_counter() - began) / len(data)


def synchronize(args: argparse.Namespace) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def own_milliseconds(args: argparse.Namespace) -> float:
    """Milliseconds of a step in uni3d's own functions: an upper bound, as the profiler slows them.

    The model has as many layers and parameters, but tiny ones, so that only Python's time is left. It is wall
    time: reading the CPU clock takes longer than many of these functions.
    """
    config, _ = shape(args)
    tiny = dataclasses.replace(
        config, hidden_size=2 * config.num_heads, ffn_size=4, vocab_size=64, max_seq_len=8
    )
    step, _ = engine_step(args, tiny)
    tokens = torch.zeros(args.micro_batch, 8, dtype=torch.int64)
    steps = [[(tokens, tokens)] * args.accumulation for _ in range(20)]
    for batch in steps[:3]:
        step(batch)
    profile = cProfile.Profile()
    with profile:
        for batch in steps:
            step(batch)
    ours = tuple(str(ROOT / package) for package in ("uni3d", "parallel", "ckpt"))
    rows = pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    return 1e3 * sum(row[2] for (file, _, _), row in rows if file.startswith(ours)) / len(steps)


def peak_bytes(args: argparse.Namespace) -> int:
    """Return the peak memory of a few steps beyond the imports. Run it in a process of its own."""
    before = resident("VmRSS")
    step = engine_step(args, shape(args)[0])[0] if args.memory_of == "engine" else bare_step(args)
    source = batches(args)
    for _ in range(3):
        step(next(source))
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM") - before


def resident(field: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return int(line.split()[1]) << 10


def memory_of(which: str) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", which]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    if "--peers" in sys.argv:
        from benchmarks.training.__main__ import main as beside_peers

        sys.exit(beside_peers([argument for argument in sys.argv[1:] if argument != "--peers"]))
    args = parse_arguments()
    if args.memory_of:
        print(peak_bytes(args))
        return
    memory = {which: memory_of(which) for which in ("engine", "bare")}
    (ours, engine), bare = engine_step(args, shape(args)[0]), bare_step(args)
    source = batches(args)
    for step in (ours, bare) * 2:
        step(next(source))  # warm-up: compilation, allocation
    pairs = []
    for i in range(args.rounds):
        data = [next(source) for _ in range(args.steps)]
        order = (ours, bare) if i % 2 else (bare, ours)
        times = {step: seconds(args, step, data) for step in order}
        pairs.append((times[ours], times[bare]))
    report(args, engine, pairs, memory, own_milliseconds(args))


def report(
    args: argparse.Namespace,
    engine: uni3d.Engine,
    pairs: list[tuple[float, float]],
    memory: dict[str, int],
    own: float,
) -> None:
    config, seq_len = shape(args)
    tokens = args.micro_batch * args.accumulation * seq_len
    parameters = sum(p.numel() for p in engine.module.parameters())
    print(
        f"{parameters:,} parameters, sequence {seq_len}, {tokens} tokens a step, {args.precision}, "
        f"{args.device}, torch {torch.__version__}, {args.rounds} rounds of {args.steps} steps"
    )
    for i, name in enumerate(("engine", "bare")):
        times = sorted(pair[i] for pair in pairs)
        median = statistics.median(times)
        print(
            f"{name:<7} {tokens / median:10,.0f} tokens/s  {median * 1e3:8.1f} ms "
            f"({times[0] * 1e3:.1f} to {times[-1] * 1e3:.1f})  peak {memory[name] / 2**20:,.0f} MiB"
            + mfu(args, config, seq_len, tokens / median)
        )
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"ratio of the speeds {ratio:.3f} (bar 0.98); the engine's own Python {own:.2f} ms a step (bar 1)")


def mfu(args: argparse.Namespace, config: GPTConfig, seq_len: int, rate: float) -> str:
    """Format the MFU at `rate` tokens/s, or nothing if the device's peak is unknown."""
    peak = args.peak_tflops and args.peak_tflops * 1e12
    if peak is None and args.device == "cuda" and args.precision == "bf16":
        peak = flops.peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return ""
    with torch.device("meta"):
        model = GPT(config)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {
        id(model.head.weight)
    }
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)
    forward = flops.forward_flops_per_token(matrices, config.num_layers, config.hidden_size, seq_len)
    return f"  MFU {flops.utilisation(forward * rate, 1.0, 1, peak):.1%}"


if __name__ == "__main__":
    main()
