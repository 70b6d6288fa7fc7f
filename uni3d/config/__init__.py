"""The JSON config: DeepSpeed's keys with DeepSpeed's meanings, and a section of our own, `parallel`.

    batch                           the three batch sizes
    data                            loading of samples
    sections                        every section but the next two
    optimizer, torch_optimizers     `optimizer`
    scheduler                       `scheduler`
    deepspeed_keys, sift            DeepSpeed's other keys: refused, or accepted without effect
    deepspeed_differences           differences from DeepSpeed for a given config
    trainer                         `"auto"`, as Hugging Face's Trainer fills it in
    settings                        the config as `parallel.Settings`
    strict                          validation, and its error messages
    forms                           other forms of a value that DeepSpeed accepts
    files                           JSON files, with comments

No key is ignored silently: an unknown one is an error that names the nearest known key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, PrivateAttr, SerializeAsAny, model_validator

from uni3d.config.batch import BatchTriad, batch_triad
from uni3d.config.data import DataKeys
from uni3d.config.deepspeed_keys import NO_MEANING, READ_AS, REFUSED
from uni3d.config.files import read_file
from uni3d.config.optimizer import OptimizerConfig, read_optimizer
from uni3d.config.scheduler import SchedulerConfig, read_scheduler
from uni3d.config.sections import (
    ActivationCheckpointingConfig,
    BF16Config,
    CheckpointConfig,
    CompileConfig,
    CsvMonitorConfig,
    DataTypesConfig,
    FlopsProfilerConfig,
    FP16Config,
    ParallelConfig,
    TensorBoardConfig,
    WandbConfig,
    ZeroConfig,
)
from uni3d.config.sift import sift
from uni3d.config.strict import ConfigError, all_keys, validate
from uni3d.config.trainer import refusal

__all__ = ["BatchTriad", "Config", "FP16Config", "batch_triad", "load_config", "read_config"]


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _never_if_infinite(value: object) -> object:
    """Read infinity, which Hugging Face's Accelerate writes, as null."""
    return None if value == math.inf else value


class Config(DataKeys):
    """A validated config. What depends on the number of processes is checked later (see `batch_triad`)."""

    gradient_clipping: float = Field(default=1.0, ge=0)
    """Maximum norm of all gradients together; 0 disables clipping."""
    seed: int = Field(default=42, ge=0)
    """Seed of the data order, of dropout, and of the initial weights of a model on the meta device."""
    communication_data_type: Annotated[Literal["fp32", "bf16", "fp16"] | None, BeforeValidator(_lower)] = None
    """Type in which gradients are reduced over ranks; fp32 by default, at any precision."""
    parallel: ParallelConfig = ParallelConfig()
    zero_optimization: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fp16: FP16Config = FP16Config()
    bf16: BF16Config = BF16Config()
    data_types: DataTypesConfig = DataTypesConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    steps_per_print: Annotated[int | None, BeforeValidator(_never_if_infinite)] = Field(default=10, gt=0)
    """Print a line every N steps; null or infinity prints none. By default also after 30 s without one."""
    wall_clock_breakdown: bool = False
    """Follow that line by a breakdown of the time; every 10 steps if steps_per_print is null."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CsvMonitorConfig = CsvMonitorConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    optimizer: SerializeAsAny[OptimizerConfig] | None = None
    scheduler: SerializeAsAny[SchedulerConfig] | None = None
    _without_meaning: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """Type in which layers compute."""
        return "fp16" if self.fp16.enabled else "bf16" if self.bf16.enabled else "fp32"

    @property
    def offload(self) -> bool:
        """True if sharded parameters, gradients and optimizer states are kept in host memory."""
        return self.zero_optimization.offload

    @property
    def shard_group(self) -> int | None:
        """Number of data-parallel ranks that share one sharded copy; None for all of them."""
        return self.zero_optimization.shard_group

    @property
    def without_meaning(self) -> Mapping[str, str]:
        """DeepSpeed keys that were given and have no effect here, with the reason."""
        return self._without_meaning

    def get(self, key: str, default: Any = None) -> Any:
        """Return what a dict of the config has: a section as a dict. `default` for what there isn't."""
        value = getattr(self, key) if key in type(self).model_fields else None
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        return default if value is None else value

    @model_validator(mode="after")
    def _types_agree(self) -> Config:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16 and bf16 are both enabled; enable one")
        sent = self.communication_data_type or "fp32"
        if self.data_types.grad_accum_dtype == "fp32" != sent and self.zero_optimization.stage < 2:
            raise ValueError(
                f"data_types.grad_accum_dtype is fp32, but ZeRO stages 0 and 1 accumulate gradients in "
                f"communication_data_type({sent}); leave one out, or use stage 2 or 3"
            )
        return self


def load_config(config: str | Path | Mapping[str, Any], place: str | Path | None = None) -> Config:
    """Read and validate a config, given as a mapping or the path of a JSON file.

    Args:
        config: the config.
        place: the file that a mapping comes from, for error messages.

    Raises:
        ValueError: the message names every wrong key and what was expected.
    """
    if not isinstance(config, Mapping):
        place = config
    rest, problems, without_meaning, autos = sift(read_config(config))
    if autos:
        problems.append(refusal(autos, place))
    read: dict[str, Any] = {}
    for key, reader in (("optimizer", read_optimizer), ("scheduler", read_scheduler)):
        try:
            read[key] = reader(rest.pop(key, None))
        except ConfigError as error:
            problems += _not_among(problems, error.problems, autos)
    try:
        checked = validate(Config, rest | read, elsewhere=_ELSEWHERE)
    except ConfigError as error:
        problems += _not_among(problems, error.problems, autos)
    if problems:
        raise ConfigError(problems, place)
    checked._without_meaning = without_meaning
    return checked


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config as they are given.

    Raises:
        ValueError: there is no JSON object in the file.
    """
    values = dict(config) if isinstance(config, Mapping) else read_file(config)
    if not isinstance(values, dict):
        raise ConfigError([f"expected a JSON object, not {values!r}"], config)
    return values


_ELSEWHERE = (*all_keys(Config), *NO_MEANING, *READ_AS, *REFUSED)


def _not_among(problems: list[str], more: list[str], autos: list[str]) -> list[str]:
    """Return the further problems of keys that have none yet; each begins with its key."""
    seen = {problem.split()[0] for problem in problems} - {"unknown"} | set(autos)
    return [problem for problem in more if problem.split()[0] not in seen]
