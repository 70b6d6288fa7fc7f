"""Sections of a config, except `optimizer` and `scheduler`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from uni3d.config.forms import DTYPES
from uni3d.config.strict import DeepSpeedSection, Strict


class ParallelConfig(Strict):
    """Degrees of parallelism; `pp * dp * tp` is the number of processes."""

    pp: int | Literal["auto"] = 1
    """Pipeline stages."""
    dp: int | Literal["auto"] = "auto"
    """Data-parallel ranks; "auto" is the number of processes divided by the other two."""
    tp: int | Literal["auto"] = 1
    """Tensor-parallel ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on; "auto" is a GPU if there is one."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"] = "1f1b"
    """Pipeline schedule."""
    virtual_stages: int = Field(default=1, gt=0)
    """Pipeline stages per rank; more than 1 needs an interleaved or zero-bubble schedule."""
    balance: Literal["flops", "parameters", "uniform"] = "flops"
    """Quantity that is balanced between pipeline stages."""
    sequence_parallel: bool = False
    """Megatron's sequence parallelism: split the sequence where tensor parallelism doesn't split features."""
    timeout_seconds: float | None = Field(default=None, gt=0)
    """Time after which training's collectives fail; null is torch's: 10 minutes with NCCL, 30 with gloo."""


def _stage(value: object) -> object:
    """Read booleans as DeepSpeed does: true is stage 1."""
    return int(value) if isinstance(value, bool) else value


def _not_nvme(value: object) -> object:
    if value == "nvme":
        raise ValueError('offloading to disk isn\'t supported; use "cpu", the host memory')
    return value


class OffloadConfig(DeepSpeedSection):
    """Target of offloading."""

    device: Annotated[Literal["none", "cpu"], BeforeValidator(_not_nvme)] = "none"
    """"cpu" offloads to host memory; "none" keeps everything on the GPU."""


class ZeroConfig(DeepSpeedSection):
    """ZeRO: sharding over the data-parallel ranks (see `parallel.zero`)."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_stage)] = 0
    """ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters; with any pp and tp."""
    offload_optimizer: OffloadConfig | None = None
    """Offload optimizer states with their sharded parameters and gradients, at stages 1 to 3."""
    offload_param: OffloadConfig | None = None
    """Same as `offload_optimizer`, at stage 3."""
    stage3_param_persistence_threshold: int = Field(default=0, ge=0)
    """At stage 3, keep layers with fewer elements than this gathered between forward and backward."""
    zero_hpz_partition_size: int = Field(default=1, ge=0)
    """Shard within groups of this many ranks, and replicate between groups; 0 or 1 shards over all ranks."""
    mics_shard_size: int = Field(default=-1, ge=-1)
    """Same as `zero_hpz_partition_size`; 0 or -1 shards over all ranks."""

    @property
    def offload(self) -> bool:
        """True if sharded parameters, gradients and optimizer states are kept in host memory."""
        return any(o is not None and o.device == "cpu" for o in (self.offload_optimizer, self.offload_param))

    @property
    def shard_group(self) -> int | None:
        """Number of ranks in a shard group; None for all data-parallel ranks."""
        if self.mics_shard_size > 0:
            return self.mics_shard_size
        return self.zero_hpz_partition_size if self.zero_hpz_partition_size > 1 else None

    @model_validator(mode="after")
    def _fits_the_stage(self) -> ZeroConfig:
        sizes = (self.zero_hpz_partition_size, self.mics_shard_size)
        if sizes[0] > 1 and sizes[1] > 0 and sizes[0] != sizes[1]:
            raise ValueError(
                "zero_hpz_partition_size and mics_shard_size mean the same here, but differ; give one"
            )
        if self.shard_group is not None and self.stage == 0:
            raise ValueError("a shard group needs stage 1, 2 or 3: stage 0 shards nothing")
        return self


class CheckpointConfig(Strict):
    """Options of `save_checkpoint`."""

    async_save: bool = True
    """Copy the state and write in the background; if false, the checkpoint is committed on return."""
    durable: bool = True
    """Sync files and folders before the commit, so that a checkpoint survives a power failure."""
    files: Literal["auto", "array", "writer"] = "auto"
    """Content of a file: a whole array, which several ranks write at once, or what one rank writes of it, as
    in object stores. "auto" chooses by the place of the run."""
    keep_last: int | None = Field(default=None, gt=0)
    """After each save, delete all but the newest N checkpoints; null keeps all."""
    keep_every: int | None = Field(default=None, gt=0)
    """Also keep checkpoints whose step is a multiple of this."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds without a sign of life after which a rank counts as lost, and a save, a load or `initialize`
    fails on all the others. A rank that is only slow gives signs, and is waited for."""
    accept_changes: list[Literal["dataset", "seed", "scheduler"]] = Field(default=[])
    """Changes with which a resume goes on, with a warning: by default each of these is an error."""

    @model_validator(mode="after")
    def _retention_is_safe(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every needs keep_last: it lists exceptions to its deletions")
        if self.keep_last is not None and not self.durable:
            raise ValueError(
                "keep_last deletes checkpoints, so the ones it keeps must be durable; leave out durable false"
            )
        return self


class FP16Config(DeepSpeedSection):
    """Compute in fp16 with loss scaling (see `uni3d.optim.loss_scale`). Parameters and states stay fp32."""

    enabled: bool = False
    loss_scale: float = Field(default=0.0, ge=0)
    """Static loss scale; 0 scales dynamically."""
    initial_scale_power: int = Field(default=16, ge=0, le=127)
    """Initial dynamic scale, as a power of 2."""
    loss_scale_window: int = 1000
    """Steps without an overflow before one that doubles the scale, as DeepSpeed counts."""
    hysteresis: int = 2
    """Overflows after which the scale is halved."""
    consecutive_hysteresis: bool = False
    """Count only consecutive overflows."""
    min_loss_scale: float = 1.0
    """Minimum scale; an overflow at it is an error."""

    @model_validator(mode="after")
    def _can_scale(self) -> FP16Config:
        if not self.enabled or self.loss_scale > 0:  # the rest isn't used, and DeepSpeed doesn't check it
            return self
        for key in ("loss_scale_window", "hysteresis", "min_loss_scale"):
            if (value := getattr(self, key)) <= 0:
                raise ValueError(f"{key}({value:g}) should be greater than 0 if the loss scale is dynamic")
        if self.min_loss_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"min_loss_scale({self.min_loss_scale:g}) is above the initial scale, "
                f"2 ** initial_scale_power({self.initial_scale_power})"
            )
        return self


class BF16Config(DeepSpeedSection):
    """Compute in bf16. Parameters and their states stay fp32."""

    enabled: bool = False


def _dtype(value: object) -> object:
    return DTYPES.get(value, value) if isinstance(value, str) else value


class DataTypesConfig(Strict):
    """Types other than that of the computation."""

    grad_accum_dtype: Annotated[Literal["fp32"] | None, BeforeValidator(_dtype)] = None
    """Type of gradient accumulation: fp32, or at ZeRO stages 0 and 1 `communication_data_type`."""


class ActivationCheckpointingConfig(Strict):
    """Activation checkpointing: recompute activations in the backward pass instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """"full" keeps only each layer's input; "selective" also the outputs of matmuls and attention."""
    every: int = Field(default=1, gt=0)
    """Recompute one of every N layers."""

    @model_validator(mode="after")
    def _every_needs_a_mode(self) -> ActivationCheckpointingConfig:
        if self.every > 1 and self.mode == "none":
            raise ValueError('every has no effect without a mode; set mode to "full" or "selective"')
        return self


class CompileConfig(DeepSpeedSection):
    """`torch.compile` of each layer."""

    enabled: bool = False
    backend: str = "inductor"
    """Argument of `torch.compile`."""
    mode: str | None = None
    """Argument of `torch.compile`; not one with CUDA graphs."""
    dynamic: bool | None = None
    """Argument of `torch.compile`."""

    @field_validator("mode")
    @classmethod
    def _without_graphs(cls, mode: str | None) -> str | None:
        if mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                "it records CUDA graphs, for which parameters must stay where they are in memory, and "
                "sharding moves them; use max-autotune-no-cudagraphs, or leave mode out"
            )
        return mode


class _Files(DeepSpeedSection):
    enabled: bool = False
    output_path: str = ""
    """Parent of the job's folder; the current folder by default."""
    job_name: str = "uni3d"
    """Name of the job's folder."""


class TensorBoardConfig(_Files):
    """Log to TensorBoard event files; needs the package `tensorboard`."""


class CsvMonitorConfig(_Files):
    """Log to CSV files, one per curve."""


class WandbConfig(DeepSpeedSection):
    """Log to Weights & Biases; needs the package `wandb`."""

    enabled: bool = False
    group: str | None = None
    """Group of the run."""
    team: str | None = None
    """Team that owns the run."""
    project: str = "uni3d"
    """Project of the run."""


class FlopsProfilerConfig(Strict):
    """Count the model's FLOPs once, print a table, and report MFU from then on."""

    enabled: bool = False
    profile_step: int = Field(default=1, gt=0)
    """Step before which FLOPs are counted, by extra forward passes; a run resumed after it counts before its
    first step."""
    module_depth: int = Field(default=-1, ge=-1)
    """Maximum depth of modules in the table; -1 is unlimited."""
    top_modules: int = Field(default=1, ge=1)
    """Number of modules listed per depth, those with the most FLOPs, if `detailed` is false."""
    detailed: bool = True
    """List every module."""
    output_file: str | None = None
    """File for the table; printed by default."""
    recompute_fwd_factor: float = Field(default=0.0, ge=0)
    """Extra forward passes due to recomputation; they count as hardware FLOPs only."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device at the training precision; known for some GPUs in 16 bits."""
