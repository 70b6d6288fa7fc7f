"""The measurement on one rank: see `uni3d.bench`."""

from __future__ import annotations

import itertools
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from parallel.spans import Part, no_span
from uni3d.bench.collectives import seconds_by_kind
from uni3d.bench.model import BenchGPT, RandomTokens
from uni3d.bench.request import Request
from uni3d.engine.build import initialize
from uni3d.estimate.memory import memory
from uni3d.observe.times import PhaseTimes

PHASES: dict[Part, str] = {
    "data": "data",
    "forward": "forward",
    "loss": "forward",
    "backward": "backward",
    "weights": "backward",
    "step": "step",
}
"""Phase of each part of a step."""
PART_STEPS, PROFILED = 3, 2
"""Steps whose parts are timed, and steps under the profiler."""


def measure(request: Request) -> dict[str, Any]:
    """Collective: train as asked, and return what this rank has measured.

    Raises:
        ValueError: the config doesn't suit this machine or these ranks.
    """
    os.dup2(sys.stderr.fileno(), 1)  # stdout is for the command's answer
    before = _resident("VmRSS")
    engine = _engine(request)
    for _ in range(request.warmup):
        engine.train_batch()
    device = engine.device
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loss, seconds = _timed(engine, request.steps)
    measured = {
        "rank": engine.global_rank,
        "stage": engine.model.topology.pp_rank,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "loss": loss,
        "seconds": seconds,
        "memory": _memory(request, engine, before),
        "phases": _phases(engine),
        "collectives": _profile(engine, request.trace_of(engine.global_rank)),
        "passes": timed_passes(engine) if request.schedule else [],
    }
    engine.destroy()
    return measured


def _engine(request: Request) -> Any:
    job = request.job
    further = PART_STEPS + 1 + PROFILED + 1  # in parts, the profiler's warm-up, under it, for a picture
    samples = (request.warmup + request.steps + further) * job.batch
    wanted = request.config.get("parallel", {}).get("device", "auto")
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        there = torch.cuda.device_count()
        if there < job.ranks.total:
            raise ValueError(
                f"{job.ranks.total} ranks need as many GPUs, but there are {there}; give a smaller --nproc, "
                'or set parallel.device to "cpu"'
            )
        torch.set_float32_matmul_precision("high")  # TF32 for what a bf16 config leaves in fp32
    with torch.device("meta"):  # a rank draws only what it keeps
        model = BenchGPT(job.shape)
    tokens = RandomTokens(samples, job.seq_len, job.shape.vocab, seed=0)
    return initialize(model=model, training_data=tokens, config=request.config)[0]


def _timed(engine: Any, steps: int) -> tuple[float, list[float]]:
    """Take steps; return the last loss and the seconds of each, on a GPU by its own clock."""
    if engine.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            loss = engine.train_batch()
            marks.append(time.perf_counter())
        return loss.item(), [b - a for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        loss = engine.train_batch()
        event.record()
    torch.cuda.synchronize()
    return loss.item(), [1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def _memory(request: Request, engine: Any, before: int) -> dict[str, int]:
    """Return the peak after the warm-up (on CPUs since before the model was built) and the estimate."""
    kind = engine.device.type
    planned = memory(replace(request.job, device=kind))[engine.model.topology.pp_rank]
    if kind == "cuda":
        return {
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "planned": planned.peak.total,
        }
    most = _resident("VmHWM")
    return {
        "peak": max(0, most - before),
        "process": most,
        "planned": planned.peak.total + planned.host,
    }


def _resident(field: str) -> int:
    """Return bytes of this process in memory: now ("VmRSS") or at most so far ("VmHWM").

    Without /proc it is the most so far in both cases.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith(field))
        return int(line.split()[1]) << 10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def _phases(engine: Any) -> dict[str, float]:
    """Take steps; return the seconds of a step by phase, and those in none of them."""
    times = PhaseTimes(engine.device)
    engine.enclose_parts(lambda part, **_: times.measure(PHASES[part]))
    for _ in range(PART_STEPS):
        with times.measure("whole"):
            engine.train_batch()
    engine.enclose_parts(no_span)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = {phase: total / PART_STEPS for phase, total in times.take().items()}
    phases = {phase: seconds[phase] for phase in dict.fromkeys(PHASES.values())}
    return phases | {"rest": max(0.0, seconds["whole"] - sum(phases.values()))}


def _profile(engine: Any, trace: Path | None) -> dict[str, float]:
    """Take steps under the profiler; write the trace, if asked; return the seconds of collectives by kind."""
    kinds = [ProfilerActivity.CPU]
    if engine.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    cycle = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED, repeat=1)
    engine.enclose_parts(lambda part, **_: record_function(f"uni3d {part}"))
    with torch.profiler.profile(activities=kinds, schedule=cycle) as profile:
        for _ in range(1 + PROFILED):
            engine.train_batch()
            if engine.device.type == "cuda":
                torch.cuda.synchronize()  # a step's kernels belong to it
            profile.step()
    engine.enclose_parts(no_span)
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    return seconds_by_kind(profile.events() or (), PROFILED)


def timed_passes(engine: Any) -> list[dict[str, Any]]:
    """Take one step; return its parts with their begin and end, on the clock that all local ranks share."""
    passes: list[dict[str, Any]] = []

    def now() -> float:
        if engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # not of the device: that may wait for another rank
        return time.perf_counter()

    @contextmanager
    def span(part: Part, *, stage: int = 0, micro_batch: int = 0) -> Iterator[None]:
        begin = now()
        yield
        passes.append(
            {"part": part, "stage": stage, "micro_batch": micro_batch, "begin": begin, "end": now()}
        )

    engine.enclose_parts(span)
    engine.train_batch()
    engine.enclose_parts(no_span)
    return passes
