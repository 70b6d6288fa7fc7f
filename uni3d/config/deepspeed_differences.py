"""Differences between training with a config here and in DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator

from uni3d.config import Config
from uni3d.config.deepspeed_keys import by_reason
from uni3d.config.optimizer import AdamConfig, MuonConfig
from uni3d.config.scheduler import OneCycleParams


def differences(config: Config, pp: int) -> list[tuple[str, str]]:
    """Return pairs of a key and its difference, in the order of the config; `pp` is the number of stages."""
    return [
        *_batches(config),
        *_zero(config, pp),
        *_precision(config),
        *_optimizer(config),
        *_rest(config),
        *((", ".join(keys), f"no effect: {why}") for why, keys in by_reason(config.without_meaning).items()),
    ]


def _batches(config: Config) -> Iterator[tuple[str, str]]:
    if "gradient_clipping" not in config.model_fields_set:
        yield (
            "gradient_clipping",
            "1.0 by default, as in current DeepSpeed; before June 2026 its default was 0 (no clipping)",
        )
    if config.gradient_clipping:
        yield (
            "gradient_clipping",
            "one global norm over all stages and ranks, with each logical parameter counted once",
        )
    yield (
        "train_batch_size",
        "if the loss function returns (sum, count), the loss is the mean over all terms of the global batch; "
        "DeepSpeed's is the mean of the micro batches' means",
    )


def _zero(config: Config, pp: int) -> Iterator[tuple[str, str]]:
    zero = config.zero_optimization
    if zero.stage >= 2 and pp > 1:
        yield (
            "zero_optimization.stage",
            f"stage {zero.stage} with {pp} pipeline stages; DeepSpeed refuses this",
        )
    if zero.offload:
        yield (
            "zero_optimization.offload_optimizer",
            "sharded parameters, gradients and optimizer states are offloaded together, and the optimizer "
            "steps on the CPU; DeepSpeed offloads parameters and optimizer states separately",
        )
    if zero.stage == 3:
        yield (
            "zero_optimization.stage3_param_persistence_threshold",
            "applies to whole layers, 0 by default; DeepSpeed's applies to single parameters, 1e5 by default",
        )
    if zero.zero_hpz_partition_size > 1:
        yield (
            "zero_optimization.zero_hpz_partition_size",
            "everything is sharded within the group and replicated between groups (as in MiCS); DeepSpeed "
            "shards over all ranks and keeps a second copy of the parameters in each group",
        )
    elif zero.shard_group is not None and zero.stage < 3:
        yield "zero_optimization.mics_shard_size", f"works at stage {zero.stage}; DeepSpeed needs stage 3"


def _precision(config: Config) -> Iterator[tuple[str, str]]:
    if config.precision == "fp32":
        return
    if config.communication_data_type is None:
        yield (
            "communication_data_type",
            f"fp32 by default; DeepSpeed's default is the type of computation ({config.precision}), "
            "with half the traffic",
        )
    yield (
        config.precision,
        "parameters stay fp32 and are cast layer by layer as they are gathered; there is no second copy, "
        "and state_dict() is fp32",
    )
    if config.precision == "bf16":
        yield "bf16", "a non-finite gradient is an error on all ranks; DeepSpeed skips the step"
        return
    yield (
        "fp16",
        "an overflow at min_loss_scale is an error on all ranks; a loss given as a sum is also divided by "
        "about its number of terms before the backward pass",
    )
    if config.zero_optimization.stage == 0 and config.fp16.loss_scale == 0 and config.fp16.hysteresis > 1:
        yield "fp16.hysteresis", "holds at every ZeRO stage; DeepSpeed ignores it at stage 0"


def _optimizer(config: Config) -> Iterator[tuple[str, str]]:
    optimizer, schedule = config.optimizer, config.scheduler
    if isinstance(optimizer, AdamConfig) and not optimizer.params.torch_adam:
        yield "optimizer", f"{optimizer.implementation}, fused, instead of DeepSpeed's own implementation"
    if isinstance(optimizer, MuonConfig):
        yield (
            "optimizer",
            "uses the standard Newton-Schulz iteration, in fp32 on CPUs and bf16 on GPUs; parameters with "
            "more than two dims (convolutions) are updated by AdamW, in DeepSpeed by Muon; your own "
            "parameter groups are kept, with their own learning rates",
        )
    if schedule is None:
        return
    params = schedule.params
    if isinstance(params, OneCycleParams) and params.decay_mom_rate:
        yield (
            "scheduler",
            "momentum that grows by decay_mom_rate is capped at 0.999; in DeepSpeed it can exceed 1",
        )
    if schedule.type.startswith("Warmup"):
        yield (
            "scheduler",
            "same timing as DeepSpeed: the first step comes before the warmup, the second at its iteration "
            "0, so by default the learning rate of both is 0",
        )


def _rest(config: Config) -> Iterator[tuple[str, str]]:
    if config.activation_checkpointing.mode != "none":
        yield (
            "activation_checkpointing",
            "the engine recomputes layers itself; in DeepSpeed the model calls deepspeed.checkpointing",
        )
    yield (
        "checkpoint",
        "every checkpoint is universal: it loads at any pp, dp, tp and ZeRO stage; it is written in the "
        "background unless async_save is false",
    )
