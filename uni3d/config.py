"""The JSON config: DeepSpeed's keys with DeepSpeed's meanings, and one section of ours, `parallel`.

Strict: a key that isn't known is an error that names the nearest known one, and a key of DeepSpeed's that
isn't supported is refused with the reason. Nothing is parsed and then ignored.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from uni3d.optim import OptimizerConfig, SchedulerConfig

_LATER = "not supported in this release"
_NO_MEANING = (
    "it has no meaning here: gradients and parameters move layer by layer (fully_shard); leave it out"
)
_BUCKET_KEYS = (
    *("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions"),
    *("allgather_bucket_size", "round_robin_gradients", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
REFUSED = {
    "amp": f"mixed precision is {_LATER}; training is in fp32",
    "prescale_gradients": f"{_LATER}; gradients are summed, then divided once",
    "tensorboard": _LATER,
    "wandb": _LATER,
    "csv_monitor": _LATER,
    "flops_profiler": _LATER,
    "wall_clock_breakdown": _LATER,
    "steps_per_print": f"{_LATER}; print what train_batch returns",
    "elasticity": "not needed: any checkpoint resumes on any topology with the same train_batch_size",
    "checkpoint.load_universal": "not needed: every checkpoint is universal",
    "checkpoint.tag_validation": "not needed: ranks that are given different tags are an error",
    "checkpoint.use_node_local_storage": "a checkpoint lies in one place that all ranks see",
    "checkpoint.parallel_write": "not needed: all ranks write, each its part",
    "zero_optimization.offload_optimizer": _LATER,
    "zero_optimization.offload_param": _LATER,
    "zero_optimization.zero_hpz_partition_size": _LATER,
    "zero_optimization.mics_shard_size": _LATER,
    **{f"zero_optimization.{key}": _NO_MEANING for key in _BUCKET_KEYS},
    "zero_allow_untested_optimizer": "not needed: any elementwise optimizer works under every ZeRO stage",
}
"""Keys of DeepSpeed's that are refused, and why."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ParallelConfig(_Strict):
    """How many ways the work is split; `pp * dp * tp` is the number of processes."""

    pp: int | Literal["auto"] = 1
    """Pipeline stages."""
    dp: int | Literal["auto"] = "auto"
    """Data-parallel copies; "auto" takes the processes that the other two leave."""
    tp: int | Literal["auto"] = 1
    """Parts of each tensor-parallel layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; "auto" is a GPU where there is one."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"] = "1f1b"
    """In which order a pipeline's stages compute micro batches."""
    virtual_stages: int = Field(default=1, gt=0)
    """Pipeline stages on each rank; more than 1 with the schedules that are made for it."""
    balance: Literal["flops", "parameters", "uniform"] = "flops"
    """What is as even as can be between pipeline stages."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks split the sequence where they don't split the features."""


def _not_a_boolean(value: object) -> object:
    """True equals 1, and so would be taken for it."""
    if isinstance(value, bool):
        raise ValueError("expected 0, 1, 2 or 3")
    return value


class ZeroConfig(_Strict):
    """What is sharded over the data-parallel ranks; the meanings are ZeRO's (see `parallel.zero`)."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_not_a_boolean)] = 0


class CheckpointConfig(_Strict):
    """How `save_checkpoint` saves."""

    async_save: bool = True
    """Whether to write in the background, after a copy; otherwise it is committed on return."""
    durable: bool = True
    """Whether to sync files and folders before the commit, so that it survives a power cut."""
    keep_last: int | None = Field(default=None, gt=0)
    """Delete all but this many of the newest checkpoints after each save; null keeps all."""
    keep_every: int | None = Field(default=None, gt=0)
    """Keep, beside these, checkpoints whose step is a multiple of this."""

    @model_validator(mode="after")
    def _retention_is_safe(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every says what is kept beside the last ones; give keep_last too")
        if self.keep_last is not None and not self.durable:
            raise ValueError(
                "keep_last deletes checkpoints, so those that are kept must be on the disk: no durable false"
            )
        return self


class FP16Config(_Strict):
    enabled: bool = False
    loss_scale: float = 0.0
    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: float = 1.0


class BF16Config(_Strict):
    enabled: bool = False


class ActivationCheckpointingConfig(_Strict):
    """What is computed again in the backward pass instead of being kept."""

    mode: Literal["none", "full", "selective"] = "none"
    """"full" keeps each layer's input alone; "selective" also what matrix products and attention gave."""
    every: int = Field(default=1, gt=0)
    """Of how many layers one is recomputed."""


class CompileConfig(_Strict):
    """`torch.compile` of each layer."""

    enabled: bool = False
    backend: str = "inductor"
    mode: str | None = None
    dynamic: bool | None = None


class Config(_Strict):
    """A whole config, checked but for what depends on the number of processes (see `batch_triad`)."""

    train_batch_size: int | None = Field(default=None, gt=0)
    """Samples in a global batch: those of one optimizer step."""
    train_micro_batch_size_per_gpu: int | None = Field(default=None, gt=0)
    """Samples that a data-parallel rank computes at once."""
    gradient_accumulation_steps: int | None = Field(default=None, gt=0)
    """Micro batches of one optimizer step on each data-parallel rank; those that a pipeline overlaps."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest norm of all gradients together; 0 doesn't clip. DeepSpeed's default was 0 before 2026."""
    seed: int = Field(default=42, ge=0)
    """Of data order and dropout, and of the initial weights of a model on the meta device."""
    parallel: ParallelConfig = ParallelConfig()
    zero_optimization: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fp16: FP16Config = FP16Config()
    bf16: BF16Config = BF16Config()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        return "fp16" if self.fp16.enabled else "bf16" if self.bf16.enabled else "fp32"


class BatchTriad(_Strict):
    """train_batch = micro_batch * accumulation * dp."""

    train_batch: int
    micro_batch: int
    accumulation: int


def load_config(config: str | Path | Mapping[str, Any]) -> Config:
    """Read and check a config: a mapping, or the path of a JSON file.

    Raises:
        ValueError: naming every key that is wrong, with what was expected.
    """
    if isinstance(config, Mapping):
        values = dict(config)
    else:
        try:
            values = json.loads(Path(config).read_text())
        except OSError as error:
            raise ValueError(f"config {config} can't be read: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"config {config} is not JSON: {error}") from None
    for key in ("amp",):
        if isinstance(values, dict) and values.get(key) == {"enabled": False}:  # that is what fp32 is
            del values[key]
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError("config: " + "; ".join(_explain(e) for e in error.errors())) from None


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


def _explain(error: Any) -> str:
    """One problem that pydantic found, as a sentence with the key's full name."""
    path = [str(part) for part in error["loc"]]
    # Behind a key whose section depends on its type, pydantic puts that type, which the file doesn't have.
    key = ".".join(path[:1] + path[2:] if path[0:1] in (["optimizer"], ["scheduler"]) else path)
    if error["type"] == "extra_forbidden":
        if key in REFUSED:
            return f"{key} is refused: {REFUSED[key]}"
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key or 'the whole'} is {error['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: list[str]) -> list[str]:
    """Keys of the section at `path`, in which a section that depends on its type has that behind its key."""
    sections: list[type[BaseModel]] = [Config]
    for part in path:
        typed = [s for s in sections if "type" in s.model_fields and part in _types(s)]
        fields = [s.model_fields[part] for s in sections if part in s.model_fields]
        sections = typed or [model for field in fields for model in _models(field.annotation)]
    return sorted({key for section in sections for key in section.model_fields})


def _types(section: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(section.model_fields["type"].annotation)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key with this annotation can have."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
