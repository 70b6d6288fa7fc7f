"""The figures of all ranks as one answer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import prod
from typing import Any

from uni3d.bench.request import Request
from uni3d.estimate.gpt import GPTShape
from uni3d.observe.flops import TRAINING, forward_flops_per_token, peak_flops, utilisation


def row_of(request: Request, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer of the command; `ranks` are the results of `measure`, by rank."""
    job, first = request.job, ranks[0]
    seconds = first["seconds"]
    mean = sum(seconds) / len(seconds)
    forward = forward_flops(job.shape, job.seq_len) * request.tokens
    peak = _peak(request, first["device"])
    return {
        "model": str(job.shape),
        "parameters": job.shape.parameters,
        "ranks": {**vars(job.ranks), "total": job.ranks.total},
        "device": first["device"],
        "torch": first["torch"],
        "threads": first["threads"],
        "precision": job.precision,
        "recompute": job.recompute,
        "schedule": job.order,
        "micro_batch": job.micro_batch,
        "accumulation": job.accumulation,
        "train_batch_size": job.batch,
        "sequence_length": job.seq_len,
        "tokens_per_step": request.tokens,
        "steps": request.steps,
        "warmup": request.warmup,
        "loss": first["loss"],
        "tokens_per_second": request.tokens / mean,
        "step_seconds": {
            "median": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "mean": mean,
        },
        "flops_per_step": TRAINING * forward,
        "peak_flops": peak,
        "mfu": None if peak is None else utilisation(forward, mean, job.ranks.total, peak),
        "memory": [{"rank": r["rank"], "stage": r["stage"], **r["memory"]} for r in ranks],
        "phases": [{"rank": r["rank"], "stage": r["stage"], **r["phases"]} for r in ranks],
        "collectives": [{"rank": r["rank"], "stage": r["stage"], **r["collectives"]} for r in ranks],
        "traces": [str(request.trace_of(r["rank"])) for r in ranks if request.trace is not None],
    }


def forward_flops(shape: GPTShape, seq_len: int) -> int:
    """Return the forward FLOPs per token, by the formula of `uni3d.observe.flops`."""
    multiplied = (
        w for link in shape.links if link.name != "embed" for w in link.weights if len(w.shape) == 2
    )
    return forward_flops_per_token(
        sum(prod(w.shape) for w in multiplied), shape.layers, shape.hidden, seq_len
    )


def _peak(request: Request, device: str) -> float | None:
    """Return the peak FLOP/s of a device: as given, or that of a known GPU in 16 bits."""
    if request.peak_tflops is not None:
        return 1e12 * request.peak_tflops
    return None if request.job.precision == "fp32" else peak_flops(device)
