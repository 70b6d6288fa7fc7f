"""Monitoring of a run: printed lines and, if enabled, curves, times and FLOPs.

Modules:
    monitors   TensorBoard, Weights & Biases and CSV files
    profiler   FLOPs by module, counted in a forward pass
    times      seconds by phase
    flops      FLOPs by formula, peak FLOP/s of GPUs, MFU
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from parallel import HostComm
from uni3d.config import BatchTriad, Config
from uni3d.observe import profiler
from uni3d.observe.flops import peak_flops, utilisation
from uni3d.observe.monitors import Monitor, make_monitors
from uni3d.observe.times import PhaseTimes
from uni3d.train_state import TrainState

T = TypeVar("T")

LINE_STEPS, LINE_SECONDS = 10, 30.0
"""Steps between printed lines; after so many seconds the next step prints one too."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Results of a step."""

    step: int
    samples: int
    """Samples consumed so far, over all ranks."""
    loss: float
    norm: float
    rate: float
    """Learning rate of the first parameter group in this step."""
    scale: float | None
    """Loss scale of the step in fp16; None in other precisions."""
    terms: float
    """Number of values that the loss is the mean of: tokens, if it is a sum over tokens."""


class Observer:
    """Prints lines, feeds monitors, times phases and counts FLOPs. Local, except for `profile`."""

    def __init__(
        self,
        config: Config,
        batch: BatchTriad,
        state: TrainState,
        comm: HostComm,
        committed: Callable[[], str | None],
    ) -> None:
        """`committed` returns the tag of the last checkpoint that this process committed, or None."""
        self._config = config
        self._batch = batch
        self._state = state
        self._comm = comm
        self._device = state.model.topology.device
        self._speaks = state.model.topology.rank == 0
        self._monitors: list[Monitor] = make_monitors(config) if self._speaks else []
        self._committed = committed
        self._every = config.steps_per_print or (LINE_STEPS if config.wall_clock_breakdown else None)
        # An explicit number of steps is kept; by default, slow steps also print after a time.
        self._patience = math.inf if "steps_per_print" in config.model_fields_set else LINE_SECONDS
        self._total = getattr(getattr(config.scheduler, "params", None), "total_num_steps", None)
        self._last_line = time.perf_counter()
        self._times = PhaseTimes(self._device) if config.wall_clock_breakdown and self._speaks else None
        self._profile: profiler.Profile | None = None
        self._begun: float | None = None  # time of the last line
        self._steps, self._terms = 0, 0.0  # counted here since then, as a load changes the step numbers
        self._due: StepRecord | None = None
        self.wanted = bool(self._every or self._monitors)
        """True if `step_taken` has any effect."""

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Time a phase of a step, for `wall_clock_breakdown`."""
        return nullcontext() if self._times is None else self._times.measure(phase)

    def step_taken(self, record: StepRecord) -> None:
        """Record a step."""
        if self._begun is None:  # the first step allocates and compiles, so time is measured from its end
            self._begun = time.perf_counter()
        else:
            self._steps += 1
            self._terms += record.terms
        values = {"train_loss": record.loss, "lr": record.rate, "grad_norm": record.norm}
        if record.scale is not None:
            values["loss_scale"] = record.scale
        # The loss and norm of a skipped step may not be finite.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        for monitor in self._monitors:
            monitor.write(values, record.samples)
        if self._every:
            waited = time.perf_counter() - self._last_line
            if record.step % self._every == 0 or waited >= self._patience:
                self._due = record

    def tell(self) -> None:
        """Print the line that is due. Called at the end of a step, when its times are known."""
        record, self._due = self._due, None
        if record is None:
            return
        if self._speaks:
            print(f"uni3d: {self._line(record)}", flush=True)
            if self._times is not None:
                print(f"uni3d: {_line_of(self._times.take())}", flush=True)
        self._begun = self._last_line = time.perf_counter()
        self._steps, self._terms = 0, 0.0

    def profiles_next(self) -> bool:
        """Return whether FLOPs are to be counted before the next step."""
        config, steps = self._config.flops_profiler, self._state.progress.global_steps
        due = steps + 1 >= config.profile_step  # a resumed run may start after it
        return config.enabled and self._profile is None and due

    def profile(self, forward: Callable[[], T], times: int = 1) -> T:
        """Collective: run `forward` and count its FLOPs; return its output. See `profiler.measure`."""
        outputs: list[T] = []
        self._profile = profiler.measure(
            self._state.model, self._comm, lambda: outputs.append(forward()), times
        )
        if self._speaks:
            self._print_profile(self._profile)
        return outputs[0]

    def _print_profile(self, profile: profiler.Profile) -> None:
        config = self._config.flops_profiler
        lines = profiler.table(profile, config)
        if config.output_file is None:
            print("\n".join(f"uni3d: {line}" for line in lines), flush=True)
            return
        path = Path(config.output_file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
        except OSError as error:  # raised on one rank alone, it would leave the others waiting
            warnings.warn(f"can't write the FLOPs profile: {error}", stacklevel=2)

    def _line(self, record: StepRecord) -> str:
        topology = self._state.model.topology
        parts = [f"step {record.step}", f"loss {record.loss:.4f}", f"lr {record.rate:.3g}"]
        parts.append(f"norm {record.norm:.3g}")
        if record.scale is not None:
            parts += [f"loss scale {record.scale:g}", f"{self._state.progress.skipped_steps} skipped"]
        assert self._begun is not None
        steps = self._steps
        if steps:
            seconds = (time.perf_counter() - self._begun) / steps
            parts += [f"{seconds:.3g} s a step", f"{self._batch.train_batch / seconds:,.1f} samples/s"]
            micro_batches = self._batch.accumulation * topology.degrees.dp
            if self._terms > micro_batches * steps:  # the loss is a sum over tokens, not a mean
                parts.append(f"{self._terms / steps / seconds:,.0f} tokens/s")
            parts += self._mfu(seconds)
            if self._total is not None and self._total > record.step:
                parts.append(f"{timedelta(seconds=round(seconds * (self._total - record.step)))} left")
        if (tag := self._committed()) is not None:
            parts.append(f"saved {tag}")
        if self._device.type == "cuda":
            parts.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        return " | ".join(parts)

    def _mfu(self, seconds: float) -> list[str]:
        config, device = self._config, self._device
        tflops = config.flops_profiler.peak_tflops
        peak = None if tflops is None else tflops * 1e12
        if peak is None and device.type == "cuda" and config.precision != "fp32":
            peak = peak_flops(torch.cuda.get_device_name(device))
        if self._profile is None or peak is None:
            return []
        devices = self._state.model.topology.world_size
        return [f"MFU {utilisation(self._profile.forward, seconds, devices, peak):.1%}"]


def _line_of(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    parts = (f"{name} {1e3 * s:.1f} ms ({s / total:.0%})" for name, s in seconds.items())
    return "time since the last line: " + " | ".join(parts)
