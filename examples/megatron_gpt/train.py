"""Train the example GPT with uni3d on any topology, from scratch or from the run's newest checkpoint.

    torchrun --standalone --nproc-per-node 4 -- examples/megatron_gpt/train.py \
        --config examples/megatron_gpt/configs/tiny.json --pp 2 --dp 2 --tp 1 --zero 1 \
        --steps 100 --run runs/tiny --save-every 50

It resumes from the newest checkpoint in `--run`, whatever topology wrote it.
"""

# ruff: noqa: E402

from __future__ import annotations

import time

began = time.perf_counter()  # before the imports, which take seconds and are the first phase

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from data import TokenDataset, load_tokens
from model import GPT, GPTConfig

import uni3d


class StartUp:
    """Prints the seconds of each phase between the start of the script and the first step, on rank 0."""

    def __init__(self, began: float) -> None:
        self.began = began

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        if os.environ.get("RANK", "0") == "0":
            print(f"start-up: {phase} {now - self.began:.1f} s", flush=True)
        self.began = now


def parse_arguments() -> argparse.Namespace:
    def degree(text: str) -> int | str:
        return text if text == "auto" else int(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--config", required=True, metavar="FILE.json", help="model, seq_len and uni3d config"
    )
    parser.add_argument("--pp", type=degree, default=1, metavar="N", help="pipeline stages")
    parser.add_argument("--dp", type=degree, default="auto", metavar="N|auto", help="data-parallel degree")
    parser.add_argument("--tp", type=degree, default=1, metavar="N", help="tensor-parallel degree")
    parser.add_argument("--zero", type=int, default=1, choices=[0, 1, 2, 3], help="ZeRO stage")
    parser.add_argument(
        "--steps", type=int, required=True, metavar="N", help="last step, counted over all resumes"
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of the checkpoints")
    parser.add_argument(
        "--save-every", type=int, default=0, metavar="N", help="steps between checkpoints; 0: at the end only"
    )
    parser.add_argument(
        "--eval-batches", type=int, default=2, metavar="N", help="validation batches after each checkpoint"
    )
    parser.add_argument("--data", default="builtin", help="builtin, FILE.txt or FILE.bin")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and data order")
    parser.add_argument("--metrics", type=Path, metavar="FILE.jsonl", help="append one line per step")
    return parser.parse_args()


def read_config(path: str) -> dict[str, Any]:
    """Read a config: `model` (as a GPTConfig), `seq_len` and `uni3d`.

    Raises:
        ValueError: the file can't be read, or a part of it is missing or unknown.
    """
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text())
        config["model"] = GPTConfig(**config["model"])
        assert config["seq_len"] > 0
        assert config["uni3d"]
    except OSError as error:
        raise ValueError(f"--config {path} can't be read: {error.strerror}") from None
    except (KeyError, TypeError, AssertionError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--config {path} must be JSON with model (the fields of GPTConfig), seq_len and uni3d: "
            f"{type(error).__name__} {error}"
        ) from None
    return config


def start(
    args: argparse.Namespace, config: dict[str, Any], start_up: StartUp
) -> tuple[uni3d.Engine, TokenDataset]:
    """Return the engine, resumed from the run's newest checkpoint if any, and the validation data."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what a bf16 config leaves in fp32
    uni3d.init_distributed()
    start_up.done("process group")
    settings = config["uni3d"] | {
        "seed": args.seed,
        "parallel": {"pp": args.pp, "dp": args.dp, "tp": args.tp},
        "zero_optimization": {"stage": args.zero},
    }
    with torch.device("meta"):  # no memory yet: each rank initializes only the parts that it keeps
        model = GPT(config["model"])
    train_data, valid_data = (
        TokenDataset(load_tokens(args.data, split), config["seq_len"], vocab_size=model.config.vocab_size)
        for split in ("train", "valid")
    )
    engine, *_ = uni3d.initialize(
        model=model,
        model_parameters=decay_groups(model),
        training_data=train_data,
        config=settings,
        resume=args.run,  # its newest checkpoint, if any; else the weights are drawn
    )
    start_up.done(f"data, model and optimizer at step {engine.global_steps}")
    return engine, valid_data


def train(args: argparse.Namespace, engine: uni3d.Engine, valid_data: TokenDataset) -> None:
    """Train up to `--steps`, with a checkpoint every `--save-every` steps and at the end."""
    first_rank = engine.model.topology.rank == 0
    if first_rank and engine.global_steps >= args.steps:
        print(f"nothing to do: {args.run} is at step {engine.global_steps}, and --steps is {args.steps}")
    if first_rank and args.metrics:
        args.metrics.parent.mkdir(parents=True, exist_ok=True)
    while engine.global_steps < args.steps:
        began = time.perf_counter()
        lr = engine.get_lr()[0]
        loss = engine.train_batch().item()
        if first_rank and args.metrics:
            append_metrics(args.metrics, engine, loss, lr, valid_data.seq_len, time.perf_counter() - began)
        done = engine.global_steps == args.steps
        if done or (args.save_every and engine.global_steps % args.save_every == 0):
            engine.save_checkpoint(args.run)  # written in the background, during validation
            report_validation(engine, valid_data, args.eval_batches)
    engine.wait_for_checkpoint()


def report_validation(engine: uni3d.Engine, data: TokenDataset, n_batches: int) -> None:
    """Print the mean loss over the first global batches of the validation data."""
    if n_batches == 0:
        return
    batches = uni3d.RepeatingLoader(engine.loader(data))
    loss = sum(engine.eval_batch(batches).item() for _ in range(n_batches)) / n_batches
    engine.wait_for_checkpoint()
    if engine.model.topology.rank == 0:
        print(f"step {engine.global_steps}: saved; validation loss {loss:.4f}", flush=True)


def decay_groups(model: GPT) -> list[dict[str, Any]]:
    """Return parameter groups with weight decay for matrices and none for norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def append_metrics(
    path: Path, engine: uni3d.Engine, loss: float, lr: float, seq_len: int, seconds: float
) -> None:
    """Append one JSON object about the last step."""
    degrees = engine.model.topology.degrees
    line = {
        "step": engine.global_steps,
        "loss": loss,
        "grad_norm": engine.get_global_grad_norm(),
        "lr": lr,
        "samples": engine.global_samples,
        "tokens": engine.global_samples * seq_len,
        "tokens_per_s": engine.train_batch_size() * seq_len / seconds,
        "pp": degrees.pp,
        "dp": degrees.dp,
        "tp": degrees.tp,
        "zero": engine.model.zero.stage,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    args = parse_arguments()
    start_up = StartUp(began)
    start_up.done("imports")
    try:
        engine, valid_data = start(args, read_config(args.config), start_up)
    except (ValueError, uni3d.CheckpointError) as error:
        # All ranks raise the same error here: print one line, not a traceback from each.
        sys.exit(f"error: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    train(args, engine, valid_data)


if __name__ == "__main__":
    main()
