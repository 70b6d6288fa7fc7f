"""Where curves go: TensorBoard, Weights & Biases, CSV files. The names and the x axis are DeepSpeed's."""

from __future__ import annotations

import csv
import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from uni3d.config import Config
from uni3d.config.sections import CsvMonitorConfig, TensorBoardConfig, WandbConfig

PREFIX = "Train/Samples/"


class Monitor(Protocol):
    """One place."""

    def write(self, values: Mapping[str, float], samples: int) -> None:
        """Add a point to each curve, at so many samples; it is there when this returns, as far as can be."""


class CsvMonitor:
    """`<output_path>/<job_name>/Train_Samples_<name>.csv`, with the columns `step` (samples) and the name."""

    def __init__(self, config: CsvMonitorConfig) -> None:
        self._folder = Path(config.output_path) / config.job_name

    def write(self, values: Mapping[str, float], samples: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            path = self._folder / f"{PREFIX.replace('/', '_')}{name}.csv"
            with path.open("a", newline="") as file:
                rows = csv.writer(file)
                if file.tell() == 0:
                    rows.writerow(["step", name])
                rows.writerow([samples, value])


class TensorBoard:
    def __init__(self, config: TensorBoardConfig) -> None:
        module = _imported("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(Path(config.output_path) / config.job_name))

    def write(self, values: Mapping[str, float], samples: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(PREFIX + name, value, samples)
        self._writer.flush()


class Wandb:
    def __init__(self, config: WandbConfig) -> None:
        self._wandb = _imported("wandb", "wandb", "wandb")
        self._wandb.init(project=config.project, group=config.group, entity=config.team)

    def write(self, values: Mapping[str, float], samples: int) -> None:
        # Given a step, wandb keeps a row back for more values of it, and a crash would lose the last one.
        self._wandb.log({PREFIX + n: value for n, value in values.items()}, step=samples, commit=True)


class Guarded:
    """A monitor that gives up, with a warning, when it fails: training doesn't end for a curve.

    Nor does it when it can't be made (no login, a folder that can't be written): rank 0 alone would raise,
    and the other ranks wait for it.
    """

    def __init__(self, kind: type[Any], config: Any) -> None:
        self._name = kind.__name__
        self._monitor: Monitor | None = None
        try:
            self._monitor = kind(config)
        except Exception as error:
            self._give_up(error)

    def write(self, values: Mapping[str, float], samples: int) -> None:
        if self._monitor is None:
            return
        try:
            self._monitor.write(values, samples)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._monitor = None
        warnings.warn(f"{self._name} gets no more values: {error}", stacklevel=3)


def check_installed(config: Config) -> None:
    """Check that what is enabled can be had.

    Raises:
        ValueError: naming the package that isn't installed.
    """
    if config.tensorboard.enabled:
        _imported("torch.utils.tensorboard", "tensorboard", "tensorboard")
    if config.wandb.enabled:
        _imported("wandb", "wandb", "wandb")


def make_monitors(config: Config) -> list[Monitor]:
    """Those that are enabled; for rank 0."""
    monitors: list[Monitor] = []
    if config.tensorboard.enabled:
        monitors.append(Guarded(TensorBoard, config.tensorboard))
    if config.wandb.enabled:
        monitors.append(Guarded(Wandb, config.wandb))
    if config.csv_monitor.enabled:
        monitors.append(Guarded(CsvMonitor, config.csv_monitor))
    return monitors


def _imported(module: str, key: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{key} is enabled, but its package can't be imported ({error}); pip install {package}, or "
            f'write "{key}": {{"enabled": false}}'
        ) from None
