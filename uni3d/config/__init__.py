"""The JSON config: DeepSpeed's keys with DeepSpeed's meanings, and one section of ours, `parallel`.

    config_sections                what each section holds
    optim_config, torch_optim      `optimizer`
    schedule_config                `scheduler`
    observe_config                 what a run tells of itself
    deepspeed_keys                 DeepSpeed's other keys: refused, or named as having no meaning here
    strict                         how sections are checked, and errors explained

Strict: a key that isn't known is an error that names the nearest known one. Nothing is parsed and then
ignored without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny, model_validator

from uni3d.config.deepspeed_keys import sift
from uni3d.config.observe_sections import (
    CsvMonitorConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    WandbConfig,
)
from uni3d.config.optimizer import OptimizerConfig, read_optimizer
from uni3d.config.scheduler import SchedulerConfig, read_scheduler
from uni3d.config.sections import (
    ActivationCheckpointingConfig,
    BF16Config,
    CheckpointConfig,
    CompileConfig,
    DataTypesConfig,
    FP16Config,
    ParallelConfig,
    ZeroConfig,
)
from uni3d.config.strict import ConfigError, Strict, validate

__all__ = ["BatchTriad", "Config", "FP16Config", "batch_triad", "load_config"]


class Config(Strict):
    """A whole config, checked but for what depends on the number of processes (see `batch_triad`)."""

    train_batch_size: int | None = Field(default=None, gt=0)
    """Samples in a global batch: those of one optimizer step."""
    train_micro_batch_size_per_gpu: int | None = Field(default=None, gt=0)
    """Samples that a data-parallel rank computes at once."""
    gradient_accumulation_steps: int | None = Field(default=None, gt=0)
    """Micro batches of one optimizer step on each data-parallel rank; those that a pipeline overlaps."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of all gradients together; 0 doesn't clip."""
    seed: int = Field(default=42, ge=0)
    """Of data order and dropout, and of the initial weights of a model on the meta device."""
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    """In which gradients are summed over ranks; fp32 by default, whatever is computed in."""
    parallel: ParallelConfig = ParallelConfig()
    zero_optimization: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fp16: FP16Config = FP16Config()
    bf16: BF16Config = BF16Config()
    data_types: DataTypesConfig = DataTypesConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    steps_per_print: int | None = Field(default=10, gt=0)
    """Print a line every so many steps; null prints none. By default also after 30 s without one."""
    wall_clock_breakdown: bool = False
    """Print a second line with the time spent in each phase; every 10 steps if `steps_per_print` is null."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CsvMonitorConfig = CsvMonitorConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    optimizer: SerializeAsAny[OptimizerConfig] | None = None
    scheduler: SerializeAsAny[SchedulerConfig] | None = None
    _without_meaning: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """In which type layers compute."""
        return "fp16" if self.fp16.enabled else "bf16" if self.bf16.enabled else "fp32"

    @property
    def offload(self) -> bool:
        """Whether sharded parameters, gradients and optimizer states lie in the host's memory."""
        return self.zero_optimization.offload

    @property
    def shard_group(self) -> int | None:
        """How many data-parallel ranks share one copy of what is sharded; None is all."""
        return self.zero_optimization.shard_group

    @property
    def without_meaning(self) -> Mapping[str, str]:
        """DeepSpeed's keys that were given and change nothing here, with the reason."""
        return self._without_meaning

    @model_validator(mode="after")
    def _types_agree(self) -> Config:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16 and bf16 are both enabled; enable one")
        sent = self.communication_data_type or "fp32"
        if self.data_types.grad_accum_dtype == "fp32" != sent and self.zero_optimization.stage < 2:
            raise ValueError(
                f"data_types.grad_accum_dtype is fp32, but below ZeRO stage 2 gradients are accumulated in "
                f"communication_data_type({sent}); leave one out, or use stage 2 or 3"
            )
        return self


class BatchTriad(Strict):
    """train_batch = micro_batch * accumulation * dp."""

    train_batch: int
    micro_batch: int
    accumulation: int


def load_config(config: str | Path | Mapping[str, Any]) -> Config:
    """Read and check a config: a mapping, or the path of a JSON file.

    Raises:
        ValueError: naming every key that is wrong, with what was expected.
    """
    values = dict(config) if isinstance(config, Mapping) else _read(config)
    if not isinstance(values, dict):
        raise ConfigError([f"the whole is {values!r}: expected an object"])
    rest, problems, without_meaning = sift(values)
    read: dict[str, Any] = {}
    for key, reader in (("optimizer", read_optimizer), ("scheduler", read_scheduler)):
        try:
            read[key] = reader(rest.pop(key, None))
        except ConfigError as error:
            problems += error.problems
    try:
        checked = validate(Config, rest | read)
    except ConfigError as error:
        seen = [problem.split()[0] for problem in problems]  # the key that a problem is about comes first
        problems += [problem for problem in error.problems if problem.split()[0] not in seen]
    if problems:
        raise ConfigError(problems)
    checked._without_meaning = without_meaning
    return checked


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(), object_pairs_hook=_no_key_twice)
    except OSError as error:
        raise ValueError(f"config {path} can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not JSON: {error}") from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        raise ConfigError([f"the key {max(names, key=names.count)!r} is given twice"])
    return values


def batch_triad(config: Config, dp: int) -> BatchTriad:
    """Derive what isn't given of the three batch sizes, by DeepSpeed's rules.

    With `train_batch_size` alone, accumulation is 1; with `train_micro_batch_size_per_gpu` alone, too.

    Raises:
        ValueError: they don't multiply, showing the equation, or neither batch size is given.
    """
    total = config.train_batch_size
    micro = config.train_micro_batch_size_per_gpu
    steps = config.gradient_accumulation_steps
    if total is None and micro is None:
        raise ValueError("config: give train_batch_size or train_micro_batch_size_per_gpu")
    given = (
        f"train_batch_size({total}) = train_micro_batch_size_per_gpu({micro}) * "
        f"gradient_accumulation_steps({steps}) * dp({dp})"
    )
    if total is None:
        assert micro is not None, "one of them is given"
        steps = steps or 1
        total = micro * steps * dp
    elif micro is None:
        steps = steps or 1
        micro = total // (steps * dp)
    elif steps is None:
        steps = total // (micro * dp)
    if micro * steps * dp != total or micro < 1 or steps < 1:
        raise ValueError(f"config: {given.replace('None', '?')} can't be solved in whole numbers; change one")
    return BatchTriad(train_batch=total, micro_batch=micro, accumulation=steps)
