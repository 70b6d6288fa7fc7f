"""Sections of the config that say what a run tells of itself; DeepSpeed's keys. Loads no torch."""

from __future__ import annotations

from pydantic import Field

from uni3d.config.strict import Strict


class _Files(Strict):
    enabled: bool = False
    output_path: str = ""
    """Folder in which the job's folder is; the current one by default."""
    job_name: str = "uni3d"
    """Name of the job's folder."""


class TensorBoardConfig(_Files):
    """Curves in TensorBoard's event files; needs the package `tensorboard`."""


class CsvMonitorConfig(_Files):
    """A CSV file for each curve."""


class WandbConfig(Strict):
    """Curves sent to Weights & Biases; needs the package `wandb`."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "uni3d"


class FlopsProfilerConfig(Strict):
    """FLOPs of the model, counted once; afterwards the lines that are printed have the MFU."""

    enabled: bool = False
    profile_step: int = Field(default=1, gt=0)
    """The step before which they are counted, by forward passes more of its batch; a run that is resumed
    beyond it counts before its first."""
    module_depth: int = Field(default=-1, ge=-1)
    """How deep in the tree of modules the table goes; -1 is all the way."""
    top_modules: int = Field(default=1, ge=1)
    """Rows of each depth, those with the most FLOPs, where it isn't detailed."""
    detailed: bool = True
    """Whether the table has every module."""
    output_file: str | None = None
    """Where the table goes; printed by default."""
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    """How many forward passes more are computed, by recomputation; counts as hardware FLOPs alone."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Of one device, in the type of training; known for some GPUs in 16 bits."""
