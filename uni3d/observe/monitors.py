"""Monitors: TensorBoard, Weights & Biases, CSV files. Curve names and the x axis are DeepSpeed's."""

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
    """A destination of curves."""

    def write(self, values: Mapping[str, float], samples: int) -> None:
        """Add a point at `samples` to each curve, and flush it where the destination allows."""


class CsvMonitor:
    """Files `<output_path>/<job_name>/Train_Samples_<name>.csv`, with columns `step` (samples) and name."""

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
    """Event files of TensorBoard in `<output_path>/<job_name>`."""

    def __init__(self, config: TensorBoardConfig) -> None:
        module = _imported("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(log_dir=str(Path(config.output_path) / config.job_name))

    def write(self, values: Mapping[str, float], samples: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(PREFIX + name, value, samples)
        self._writer.flush()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, config: WandbConfig) -> None:
        self._wandb = _imported("wandb", "wandb")
        self._wandb.init(project=config.project, group=config.group, entity=config.team)

    def write(self, values: Mapping[str, float], samples: int) -> None:
        # Without `commit`, wandb holds a row back for more values, and a crash would lose the last one.
        self._wandb.log({PREFIX + n: value for n, value in values.items()}, step=samples, commit=True)


class Guarded:
    """A monitor that is disabled with a warning when it fails, so that training goes on.

    The same holds if it can't be created (no login, a read-only folder): an error on rank 0 alone would leave
    the other ranks waiting.
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
        warnings.warn(f"{self._name} is disabled after an error: {error}", stacklevel=3)


def check_installed(config: Config) -> None:
    """Raises ValueError if the package of an enabled monitor isn't installed."""
    if config.tensorboard.enabled:
        _imported("torch.utils.tensorboard", "tensorboard")
    if config.wandb.enabled:
        _imported("wandb", "wandb")


def make_monitors(config: Config) -> list[Monitor]:
    """Return the enabled monitors. Called on rank 0."""
    sections: list[tuple[type[Any], Any]] = [
        (TensorBoard, config.tensorboard),
        (Wandb, config.wandb),
        (CsvMonitor, config.csv_monitor),
    ]
    return [Guarded(kind, section) for kind, section in sections if section.enabled]


def _imported(module: str, package: str) -> Any:
    """Import the package of a monitor, which is also its key in the config."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{package} is enabled, but its package can't be imported ({error}); pip install {package}, or "
            f'write "{package}": {{"enabled": false}}'
        ) from None
