"""Compare the engine with a bare PyTorch loop of the same model: tokens/s, MFU, memory, time in Python.

    OMP_NUM_THREADS=2 python benchmarks/train.py                          # a small GPT, on the CPU
    python benchmarks/train.py --device cuda --config 1.3b.json --precision bf16 --compile
    python benchmarks/train.py --peers ...                                # beside other libraries instead

`--peers` measures DeepSpeed, DDP, FSDP2 and tensor parallelism by hand beside the engine, on 1 to 4 ranks;
`--peers --help` shows its options (`benchmarks/training/`). What follows is about the rest.

There is one process and nothing to communicate, so the difference is the engine's own cost. The bare loop
has the same model, casts, clipping and optimizer, as one would write them by hand; with `--compile`, layers
and loss are compiled in both. Both take steps in turns. Medians are printed, and the median of the ratios by
round. Memory is measured in a separate process for each. `--only` measures one of the two, for a GPU that
hasn't room for both. MFU is model FLOPs (`uni3d.observe.flops`) / (seconds x the device's peak,
`--peak-tflops`).
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import dataclasses
import json
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "megatron_gpt")]

from model import GPT, GPTConfig  # noqa: E402

import uni3d  # noqa: E402
from benchmarks.training import task  # noqa: E402
from benchmarks.training.task import ADAMW, CLIP, DTYPES, Batch  # noqa: E402
from uni3d.observe import flops  # noqa: E402

Step = Callable[[Batch], None]
ARMS = ("engine", "bare")
WARM_UP = 3
"""Steps before any is timed: compilation, states of the optimizer, memory that the allocator caches."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--config", help="a file of examples/megatron_gpt/configs; a small GPT by default")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile each layer and the loss, in both")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--peak-tflops", type=float, help="peak of the device; 989 for an H100 SXM in bf16")
    parser.add_argument("--only", choices=ARMS, help="measure one of the two, with its memory; no ratio")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--peers", action="store_true", help="other libraries; with options of its own")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def shape(args: argparse.Namespace) -> tuple[GPTConfig, int]:
    """Return the model's config and the length of its sequences."""
    options, seq_len = task.shape(args.config)
    return GPTConfig(**options), seq_len


def engine_step(args: argparse.Namespace, model_config: GPTConfig) -> Step:
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

    return step


def bare_step(args: argparse.Namespace) -> Step:
    """Make the bare loop: fp32 masters, and in bf16 a copy to compute with, its gradients summed in fp32."""
    config, _ = shape(args)
    with torch.device(args.device):  # a GPU draws billions of weights in no time, a CPU doesn't
        masters = GPT(config)
    dtype = DTYPES[args.precision]
    model = masters if dtype == torch.float32 else copy.deepcopy(masters).to(dtype)

    def loss_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return model.loss_fn(logits.float(), targets)

    if args.compile:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward)
        loss_of = torch.compile(loss_of)  # fused with the cast, logits in fp32 never exist as a whole
    wholes, used = list(masters.parameters()), list(model.parameters())
    optimizer = torch.optim.AdamW(wholes, fused=True, **ADAMW)

    def step(batch: Batch) -> None:
        tokens = torch.zeros((), device=args.device)
        if model is not masters:
            with torch.no_grad():
                torch._foreach_copy_(used, wholes)
        for inputs, targets in batch:
            inputs, targets = (part.to(args.device, non_blocking=True) for part in (inputs, targets))
            total, count = loss_of(model(inputs), targets)
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
    """Yield random batches; for a GPU in pinned memory, so that no copy waits for the device."""
    config, seq_len = shape(args)
    generator = torch.Generator().manual_seed(0)
    while True:
        size = (args.accumulation, args.micro_batch, seq_len + 1)
        tokens = torch.randint(0, config.vocab_size, size, generator=generator)
        pairs = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]
        yield [(a.pin_memory(), b.pin_memory()) for a, b in pairs] if args.device == "cuda" else pairs


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
    step = engine_step(args, tiny)
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


def make_step(args: argparse.Namespace, which: str) -> Step:
    return engine_step(args, shape(args)[0]) if which == "engine" else bare_step(args)


def alone(args: argparse.Namespace, which: str, rounds: int) -> dict[str, Any]:
    """Return seconds of a step by round, and the peak memory of all steps beyond the imports.

    Run it in a process of its own.
    """
    before = resident("VmRSS")
    step, source = make_step(args, which), batches(args)
    for _ in range(WARM_UP):
        step(next(source))
    times = [seconds(args, step, [next(source) for _ in range(args.steps)]) for _ in range(rounds)]
    cuda = args.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before
    return {"seconds": times, "peak": peak}


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
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is fp32, as the example's script sets it
    if args.memory_of:
        print(alone(args, args.memory_of, rounds=0)["peak"])
        return
    try:
        figures = {args.only: alone(args, args.only, args.rounds)} if args.only else together(args)
    except RuntimeError as error:
        if (reason := task.out_of_memory(error)) is not None:
            write(args, {"out_of_memory": reason})
        raise
    report(args, figures)


def together(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of both, whose rounds take turns, and the engine's own milliseconds."""
    memory = {which: memory_of(which) for which in ARMS}
    steps = {which: make_step(args, which) for which in ARMS}
    source = batches(args)
    for step in [*steps.values()] * WARM_UP:
        step(next(source))
    times: dict[str, list[float]] = {which: [] for which in ARMS}
    for i in range(args.rounds):
        data = [next(source) for _ in range(args.steps)]
        for which in ARMS if i % 2 else reversed(ARMS):
            times[which].append(seconds(args, steps[which], data))
    found: dict[str, Any] = {which: {"seconds": times[which], "peak": memory[which]} for which in ARMS}
    return found | {"own_ms": own_milliseconds(args)}


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    config, seq_len = shape(args)
    tokens = args.micro_batch * args.accumulation * seq_len
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    print(
        f"{parameters:,} parameters, sequence {seq_len}, {tokens} tokens a step, {args.precision}, "
        f"{args.device}, torch {torch.__version__}, {args.rounds} rounds of {args.steps} steps"
    )
    for which in [which for which in ARMS if which in figures]:
        arm = figures[which]
        median = statistics.median(arm["seconds"])
        arm |= {"tokens_per_second": tokens / median, "mfu": mfu(args, config, seq_len, tokens / median)}
        print(
            f"{which:<7} {tokens / median:10,.0f} tokens/s  {median * 1e3:8.1f} ms "
            f"({min(arm['seconds']) * 1e3:.1f} to {max(arm['seconds']) * 1e3:.1f})  "
            f"peak {arm['peak'] / 2**20:,.0f} MiB" + ("" if arm["mfu"] is None else f"  MFU {arm['mfu']:.1%}")
        )
    if not args.only:
        pairs = zip(*(figures[which]["seconds"] for which in ARMS), strict=True)
        figures["ratio"] = statistics.median(theirs / ours for ours, theirs in pairs)
        print(
            f"ratio of the speeds {figures['ratio']:.3f} (bar 0.98); the engine's own Python "
            f"{figures['own_ms']:.2f} ms a step (bar 1)"
        )
    write(args, {"parameters": parameters, "seq_len": seq_len, "tokens": tokens, **figures})


def write(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures beside the options, if a file for them is given."""
    if args.json is not None:
        options = {name: value for name, value in vars(args).items() if name not in ("json", "memory_of")}
        args.json.write_text(json.dumps({"options": options, "torch": torch.__version__} | figures, indent=1))


def mfu(args: argparse.Namespace, config: GPTConfig, seq_len: int, rate: float) -> float | None:
    """Return the MFU at `rate` tokens/s, or None if the device's peak is unknown."""
    peak = args.peak_tflops and args.peak_tflops * 1e12
    if peak is None and args.device == "cuda" and args.precision == "bf16":
        peak = flops.peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return None
    with torch.device("meta"):
        model = GPT(config)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - {
        id(model.head.weight)
    }
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in looked_up)
    forward = flops.forward_flops_per_token(matrices, config.num_layers, config.hidden_size, seq_len)
    return flops.utilisation(forward * rate, 1.0, 1, peak)


if __name__ == "__main__":
    main()
