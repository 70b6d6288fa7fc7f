"""The sections of a config, apart from `optimizer` and `scheduler`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from uni3d.config.strict import Strict


class ParallelConfig(Strict):
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


def _not_nvme(value: object) -> object:
    if value == "nvme":
        raise ValueError('there is no offload to disks; "cpu" takes the host\'s memory')
    return value


def _whole_number(value: object) -> object:
    """1e5, which JSON has as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class OffloadConfig(Strict):
    """Where what is offloaded lies."""

    device: Annotated[Literal["none", "cpu"], BeforeValidator(_not_nvme)] = "none"
    """The host's memory, or none: it stays on the GPU."""


class ZeroConfig(Strict):
    """What is sharded over the data-parallel ranks; the meanings are ZeRO's (see `parallel.zero`)."""

    stage: Annotated[Literal[0, 1, 2, 3], BeforeValidator(_not_a_boolean)] = 0
    """What is sharded: 1 optimizer states, 2 gradients too, 3 parameters too; with any pp and tp."""
    offload_optimizer: OffloadConfig | None = None
    """Keep optimizer states on the host, and with them sharded parameters and gradients; from stage 1 on."""
    offload_param: OffloadConfig | None = None
    """The same switch, for stage 3."""
    stage3_param_persistence_threshold: Annotated[int, BeforeValidator(_whole_number)] = Field(
        default=0, ge=0
    )
    """At stage 3, layers of fewer elements are kept whole from the forward pass to the backward one."""
    zero_hpz_partition_size: int = Field(default=1, ge=1)
    """Shard over groups of so many ranks, which are copies of each other; 1 shards over all."""
    mics_shard_size: int = -1
    """The same, by its other name; -1 shards over all."""

    @property
    def offload(self) -> bool:
        """Whether sharded parameters, gradients and optimizer states lie in the host's memory."""
        return any(o is not None and o.device == "cpu" for o in (self.offload_optimizer, self.offload_param))

    @property
    def shard_group(self) -> int | None:
        """How many ranks a shard group has; None is all data-parallel ranks."""
        if self.mics_shard_size > 0:
            return self.mics_shard_size
        return self.zero_hpz_partition_size if self.zero_hpz_partition_size > 1 else None

    @model_validator(mode="after")
    def _fits_the_stage(self) -> ZeroConfig:
        if self.offload_param is not None and self.offload_param.device == "cpu" and self.stage < 3:
            raise ValueError(f"offload_param needs stage 3, which shards parameters, not {self.stage}")
        if self.offload and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: stage 0 has nothing that is sharded")
        if self.mics_shard_size != -1 and self.mics_shard_size < 1:
            raise ValueError("mics_shard_size is a number of ranks, or -1 for all")
        sizes = (self.zero_hpz_partition_size, self.mics_shard_size)
        if sizes[0] > 1 and sizes[1] > 0 and sizes[0] != sizes[1]:
            raise ValueError("zero_hpz_partition_size and mics_shard_size are the same thing here; give one")
        if self.shard_group is not None and self.stage == 0:
            raise ValueError("a shard group needs stage 1, 2 or 3: stage 0 shards nothing")
        return self


class CheckpointConfig(Strict):
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


class FP16Config(Strict):
    """Compute in fp16, with a loss scale (`uni3d.optim.loss_scale`). Parameters and their states stay fp32."""

    enabled: bool = False
    """Whether to."""
    loss_scale: float = Field(default=0.0, ge=0)
    """A scale that stays; 0 is one that moves."""
    initial_scale_power: int = Field(default=16, ge=0, le=127)
    """The moving scale begins at 2 to this power."""
    loss_scale_window: int = Field(default=1000, gt=0)
    """After so many steps without an overflow it is doubled."""
    hysteresis: int = Field(default=2, gt=0)
    """After so many overflows it is halved."""
    consecutive_hysteresis: bool = False
    """Whether only overflows in a row count."""
    min_loss_scale: float = Field(default=1.0, gt=0)
    """An overflow at this scale is an error."""

    @model_validator(mode="after")
    def _begins_above_the_least(self) -> FP16Config:
        if self.loss_scale == 0 and self.min_loss_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"min_loss_scale({self.min_loss_scale:g}) is above the scale to begin with, "
                f"2 ** initial_scale_power({self.initial_scale_power})"
            )
        return self


class BF16Config(Strict):
    """Compute in bf16. Parameters and their states stay fp32."""

    enabled: bool = False
    """Whether to."""


class DataTypesConfig(Strict):
    """Types apart from that of computing."""

    grad_accum_dtype: Literal["fp32"] | None = None
    """Gradients are accumulated in fp32, or, below ZeRO stage 2, in `communication_data_type`."""


class ActivationCheckpointingConfig(Strict):
    """What is computed again in the backward pass instead of being kept."""

    mode: Literal["none", "full", "selective"] = "none"
    """"full" keeps each layer's input alone; "selective" also what matrix products and attention gave."""
    every: int = Field(default=1, gt=0)
    """Of how many layers one is recomputed."""

    @model_validator(mode="after")
    def _every_what(self) -> ActivationCheckpointingConfig:
        if self.every > 1 and self.mode == "none":
            raise ValueError(
                'every says of how many layers one is recomputed; give mode "full" or "selective"'
            )
        return self


class CompileConfig(Strict):
    """`torch.compile` of each layer."""

    enabled: bool = False
    """Whether to."""
    backend: str = "inductor"
    """`torch.compile`'s."""
    mode: str | None = None
    """`torch.compile`'s."""
    dynamic: bool | None = None
    """`torch.compile`'s."""
