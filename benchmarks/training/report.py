"""Tables of the arms: medians over the rounds, ratios by round; and whether all arms computed the same."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from benchmarks.checkpoint.table import Sample, number
from benchmarks.training.arms import Arm
from benchmarks.training.launch import Run
from benchmarks.training.task import SAVE_EVERY
from parallel.degrees import Ranks
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job
from uni3d.estimate.traffic import bubble

TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (5e-3, 5e-2)}
"""Largest relative difference between two arms of a loss, and of a gradient norm.

Adam's first steps amplify rounding, and the norms of DeepSpeed's stage 3 were up to 1.4e-4 off all others.
"""
MIB = 1 << 20
HEADINGS = (
    *("arm", "ranks", "tokens/s", "ms a step", "speed of uni3d beside it", "peak memory of a rank"),
    *("initialize", "process start to first step", "last loss"),
)
Runs = Mapping[Arm, Sequence[Run]]
"""Runs of each arm, one for each round."""


def training_table(runs: Runs, tokens: int) -> str:
    """Return the table of all arms but those of longer runs; it is empty if there are no others."""
    keys = {arm.key: arm for arm in runs}
    rows = []
    for arm, rounds in runs.items():
        if arm.saves is not None:
            continue
        step = Sample(tuple(1e3 * median_step(run) for run in rounds), "ms")
        ours = [keys[key] for key in arm.beside if key in keys]
        beside = ", ".join(f"{ratio(rounds, runs[our], median_step)} ({our.name})" for our in ours)
        rows.append(
            (
                *(arm.name, str(arm.ranks), f"{1e3 * tokens / step.median:,.0f}", bare(step), beside),
                f"{statistics.median(run.peak for run in rounds) / MIB:,.0f} MiB",
                *(str(Sample(tuple(getattr(run, field) for run in rounds))) for field in
                  ("initialize", "first_step")),
                f"{rounds[-1].losses[-1]:.6f}",
            )
        )  # fmt: skip
    return markdown(HEADINGS, rows) if rows else ""


def saves_table(runs: Runs, cores: int) -> str | None:
    """Return the table of runs with asynchronous saves beside those without; None if they weren't run.

    `cores` is the number that the ranks share.
    """
    arms = {arm.saves: arm for arm in runs if arm.saves is not None}
    if len(arms) < 2:
        return None
    rows = [
        (
            *(arm.name, str(arm.ranks), bare(Sample(tuple(1e3 * per_step(run) for run in runs[arm])))),
            bare(Sample(tuple(1e3 * run.cpu / len(run.seconds) for run in runs[arm]))),
        )
        for arm in arms.values()
    ]
    table = markdown(("arm", "ranks", "ms a step, waits included", "CPU ms a step, all ranks"), rows)
    longer, beyond, used = [], [], []
    for saving, without in zip(runs[arms[True]], runs[arms[False]], strict=True):
        cpu = (saving.cpu - without.cpu) / len(saving.seconds)
        longer.append(per_step(saving) / per_step(without) - 1)
        beyond.append((per_step(saving) - cpu / cores) / per_step(without) - 1)
        used.append(cpu * SAVE_EVERY)
    return (
        f"{table}\n\nWith an asynchronous save every {SAVE_EVERY} steps, a step takes {percent(longer)} "
        f"longer. A save takes {Sample(tuple(used))} of CPU time on all ranks together. Beyond that time, "
        f"spread over {cores} cores, a step takes {percent(beyond)} longer (bar 3 %)."
    )


def bubbles(runs: Runs, options: Mapping[str, Any], *, seq_len: int, batch: int, micro_batches: int) -> str:
    """Return the stages of the pipeline arms, and the bubble that theory gives them."""
    lines = []
    for arm, rounds in runs.items():
        if arm.pp == 1:
            continue
        job = Job(
            shape=from_model_config(options),
            ranks=Ranks(pp=arm.pp, dp=1, tp=1, zero=0),
            seq_len=seq_len,
            micro_batch=batch // micro_batches,
            accumulation=micro_batches,
            schedule=arm.schedule,
        )
        cut = " | ".join(stage(names) for names in rounds[0].parameters)
        name = {"1f1b": "1F1B", "zero_bubble": "the zero-bubble schedule"}[arm.schedule]
        share = f"{bubble(job):.0%}"
        lines.append(f"- {arm.name}: {cut}. Bubble of {name} with equal stages: {share} of a step.")
        cores = os.cpu_count() or 1
        if arm.ranks > cores:
            lines[-1] += f" Not to be seen here, as {arm.ranks} ranks take turns on {cores} cores."
    return "\n".join(lines)


def stage(names: Sequence[str]) -> str:
    """Return the first and last layer of a stage, from the names of its parameters."""
    layers = [".".join(name.split(".")[: 2 if name.startswith("layers.") else 1]) for name in names]
    return layers[0] if layers[0] == layers[-1] else f"{layers[0]} to {layers[-1]}"


def differences(runs: Runs) -> tuple[float, float]:
    """Return the largest relative difference between two arms at any step, of losses and of norms."""
    every = [run for rounds in runs.values() for run in rounds]
    return largest([run.losses for run in every]), largest([run.norms for run in every])


def largest(series: Sequence[Sequence[float | None]]) -> float:
    """Return the largest relative difference at one place of the series; infinity if one isn't finite."""
    found = 0.0
    for values in zip_longest(*series):
        present = [value for value in values if value is not None]
        if not all(map(math.isfinite, present)):
            return math.inf
        if present:
            found = max(found, (max(present) - min(present)) / abs(min(present)))
    return found


def median_step(run: Run) -> float:
    return statistics.median(run.seconds)


def per_step(run: Run) -> float:
    return run.wall / len(run.seconds)


def ratio(theirs: Sequence[Run], ours: Sequence[Run], seconds: Callable[[Run], float]) -> str:
    """Return how many times as fast ours is: the median of the rounds, least and most."""
    return str(Sample(tuple(seconds(b) / seconds(a) for a, b in zip(ours, theirs, strict=True)), "x"))


def bare(sample: Sample) -> str:
    return str(sample).removesuffix(f" {sample.unit}")


def percent(shares: Sequence[float]) -> str:
    low, middle, high = (number(100 * x) for x in (min(shares), statistics.median(shares), max(shares)))
    return f"{middle} % ({low} to {high})"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(headings), *lines[1:]])
