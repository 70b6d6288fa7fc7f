"""The measurement that a config and options ask for. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.combinations import check_combination, check_micro_batches
from parallel.degrees import Ranks, resolve_degrees
from uni3d.config import load_config
from uni3d.config.settings import parallel_settings
from uni3d.estimate.gpt import from_model_config
from uni3d.estimate.job import Job, read_document, settings_of

_QUIET = ("tensorboard", "wandb", "csv_monitor", "flops_profiler", "wall_clock_breakdown")
"""Keys of a config that print, write or count something beside the training."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A measurement, the same on all ranks."""

    job: Job
    """Model, ranks and batches, as `uni3d plan` has them; its device is yet to be found."""
    config: Mapping[str, Any]
    """Config of the engine."""
    steps: int
    """Timed steps."""
    warmup: int
    """Steps before them."""
    peak_tflops: float | None
    """Peak of one device; None if it isn't given."""
    trace: str | None = None
    """File for the trace of rank 0."""
    schedule: bool = False
    """True if each pass of a step is to be timed, for a picture."""

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.job.batch * self.job.seq_len

    def trace_of(self, rank: int) -> Path | None:
        """Return the file for the trace of a rank; the others have theirs beside the first one's."""
        if self.trace is None:
            return None
        first = Path(self.trace)
        return first if rank == 0 else first.with_name(f"{first.stem}.rank{rank}{first.suffix}")


def read_request(
    path: Path,
    nproc: int,
    *,
    given: Mapping[str, int | None],
    steps: int,
    warmup: int,
    peak_tflops: float | None,
    trace: Path | None,
    schedule: bool,
) -> Request:
    """Return the measurement of a config file on `nproc` ranks. What `given` has takes precedence.

    Raises:
        ValueError: the file or an option is wrong, or they don't fit together.
    """
    for option, value, least in [("--nproc", nproc, 1), ("--steps", steps, 1), ("--warmup", warmup, 0)]:
        if value < least:
            raise ValueError(f"{option} {value} must be at least {least}")
    if peak_tflops is not None and not 0 < peak_tflops < float("inf"):
        raise ValueError(f"--peak-tflops {peak_tflops:g}: expected a positive number")
    document = read_document(path)
    raw = _with_options(document["uni3d"], given)
    config = load_config(raw, path)
    if config.optimizer is None:
        raise ValueError(f'{path} has no optimizer, so no step can be taken; add "optimizer" to uni3d')
    p = config.parallel
    degrees = resolve_degrees(nproc, pp=p.pp, dp=p.dp, tp=p.tp)
    ranks = Ranks(**vars(degrees), zero=config.zero_optimization.stage)
    settings = parallel_settings(config)
    sizes = settings_of(config, ranks.dp)
    check_combination(settings)
    check_micro_batches(settings, ranks.pp, sizes["accumulation"])
    job = Job(shape=from_model_config(document["model"]), ranks=ranks, seq_len=document["seq_len"], **sizes)
    quiet = {key: value for key, value in raw.items() if key not in _QUIET}
    return Request(
        job=job,
        config={**quiet, "steps_per_print": None},
        steps=steps,
        warmup=warmup,
        peak_tflops=config.flops_profiler.peak_tflops if peak_tflops is None else peak_tflops,
        trace=None if trace is None else str(trace),
        schedule=schedule,
    )


def _with_options(raw: Mapping[str, Any], given: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the config with the options in it: degrees, ZeRO stage and batch sizes."""
    config = dict(raw)
    axes = {axis: given[axis] for axis in ("pp", "dp", "tp") if given[axis] is not None}
    if axes:
        config["parallel"] = {**_section(config, "parallel"), **axes}
    if given["zero"] is not None:
        config["zero_optimization"] = {**_section(config, "zero_optimization"), "stage": given["zero"]}
    sizes = {
        "train_micro_batch_size_per_gpu": given["micro_batch"],
        "gradient_accumulation_steps": given["accumulation"],
    }
    named = {key: size for key, size in sizes.items() if size is not None}
    if len(named) == 2:
        config.pop("train_batch_size", None)  # it follows from the two
    elif named:  # the other one follows from it and the global batch
        config = {key: value for key, value in config.items() if key not in sizes}
    return config | named


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"uni3d.{key} is {value!r}; expected a section")
    return value
