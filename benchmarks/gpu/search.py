"""The largest model with offload: what `uni3d.estimate` says, and which sizes are tried. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from parallel.degrees import Ranks
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job
from uni3d.estimate.memory import memory

HEAD = 128
"""Size of an attention head."""
CONTEXT, PROCESS = 2 << 30, 3 << 30
"""Bytes that an estimate leaves out: the CUDA context and the allocator's cache; the process on the host."""
GROWTH = 1.15
FIRST = 4
"""The first try is this part of the estimate, to learn what a layer takes."""
MARGIN = 1.3
"""Factor on the time that a larger try should take."""
TIME = "time"


def offload_model(options: dict[str, Any], hidden: int, layers: int) -> dict[str, Any]:
    """Return options of a model of another size; all else stays."""
    heads = max(1, hidden // HEAD)
    sizes = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads}
    return options | sizes | {"num_kv_heads": None, "ffn_size": None}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    parameters: int
    device: int
    """Bytes at the peak on the GPU."""
    host: int


def estimate(
    options: dict[str, Any],
    seq_len: int,
    *,
    precision: Literal["fp32", "bf16"],
    device: Literal["cpu", "cuda"],
) -> Estimate:
    """Return what a model needs with offload, as `benchmarks.gpu.offload` trains it."""
    job = Job(
        shape=from_model_config(options),
        ranks=Ranks(pp=1, dp=1, tp=1, zero=3),
        seq_len=seq_len,
        micro_batch=1,
        accumulation=1,
        precision=precision,
        recompute="full",
        offload=True,
        device=device,
    )
    [stage] = memory(job)
    return Estimate(parameters=job.shape.parameters, device=stage.peak.total, host=stage.host)


def largest(of: Callable[[int], Estimate], most: int, *, device: float, host: float) -> int:
    """Return the largest number of layers, up to `most`, that is estimated to fit; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        needs = of(middle)
        if needs.device + CONTEXT <= device and needs.host + PROCESS <= host:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True, kw_only=True)
class Try:
    """A model that was tried."""

    layers: int
    fits: bool
    limit: str
    """Resource that ran out, if it doesn't fit."""
    seconds: float
    figures: dict[str, Any]


def search(attempt: Callable[[int], Try], estimated: int, most: int, left: Callable[[], float]) -> list[Try]:
    """Try sizes until the largest that fits is known to within 5 %, or `left()` seconds are too few.

    The first is a part of the estimate, the next the estimate itself, as far as time allows; from there on up
    or down.
    """
    tries: list[Try] = []
    fits, fails, rate = 0, most + 1, 0.0
    layers = max(1, estimated // FIRST)
    while True:
        found = attempt(layers)
        tries.append(found)
        if found.limit == TIME:
            return tries
        if found.fits:
            fits, rate = layers, found.seconds / layers
        else:
            fails = layers
        if fails - fits <= max(1, fits // 20):
            return tries
        layers = _next(fits, fails, estimated, most)
        if rate:
            layers = min(layers, int(left() / (MARGIN * rate)))
        if layers <= fits or left() < MARGIN * found.seconds:
            return tries


def _next(fits: int, fails: int, estimated: int, most: int) -> int:
    if fits < estimated < fails:
        return estimated
    if fails <= most:
        return (fits + fails) // 2
    return min(most, max(fits + 1, int(fits * GROWTH)))
