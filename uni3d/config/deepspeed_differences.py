"""Where training by a config differs from what DeepSpeed would do with the same file."""

from __future__ import annotations

from collections.abc import Iterator

from uni3d.config import Config
from uni3d.config.deepspeed_keys import by_reason
from uni3d.config.optimizer import AdamConfig, MuonConfig
from uni3d.config.scheduler import OneCycleParams


def differences(config: Config, pp: int) -> list[tuple[str, str]]:
    """Pairs of a key and how it differs, in the order of the config; `pp` is the number of stages."""
    return [
        *_batches(config),
        *_zero(config, pp),
        *_precision(config),
        *_optimizer(config),
        *_rest(config),
        *(
            (", ".join(keys), f"no meaning here: {why}")
            for why, keys in by_reason(config.without_meaning).items()
        ),
    ]


def _batches(config: Config) -> Iterator[tuple[str, str]]:
    if "gradient_clipping" not in config.model_fields_set:
        yield (
            "gradient_clipping",
            "1.0 by default, as in DeepSpeed now; before June 2026 its default was 0: none",
        )
    if config.gradient_clipping:
        yield "gradient_clipping", "one norm over all stages and ranks, each logical parameter counted once"
    yield (
        "train_batch_size",
        "a global batch's loss is the mean over its terms where the loss function returns (sum, count); "
        "DeepSpeed's is a mean of the micro batches' means",
    )


def _zero(config: Config, pp: int) -> Iterator[tuple[str, str]]:
    zero = config.zero_optimization
    if zero.stage >= 2 and pp > 1:
        yield (
            "zero_optimization.stage",
            f"stage {zero.stage} under {pp} pipeline stages; DeepSpeed refuses it",
        )
    if zero.offload:
        yield (
            "zero_optimization.offload_optimizer",
            "one switch: sharded parameters, gradients and optimizer states lie on the host together, and "
            "the optimizer steps there; DeepSpeed moves parameters and optimizer states apart",
        )
    if zero.stage == 3:
        yield (
            "zero_optimization.stage3_param_persistence_threshold",
            "of whole layers, 0 by default; DeepSpeed's is of single parameters, 1e5 by default",
        )
    if zero.zero_hpz_partition_size > 1:
        yield (
            "zero_optimization.zero_hpz_partition_size",
            "everything is sharded over the group and copied between groups (MiCS); DeepSpeed shards over "
            "all ranks and keeps a second copy of the parameters in each group",
        )
    elif zero.shard_group is not None and zero.stage < 3:
        yield "zero_optimization.mics_shard_size", f"at stage {zero.stage} too; DeepSpeed has it at stage 3"


def _precision(config: Config) -> Iterator[tuple[str, str]]:
    if config.precision == "fp32":
        return
    if config.communication_data_type is None:
        yield (
            "communication_data_type",
            f"fp32 by default; DeepSpeed's is the type that is computed in ({config.precision}), "
            "which sends half as much",
        )
    yield (
        config.precision,
        "parameters stay fp32 and are cast layer by layer as they are gathered; there is no second copy, "
        "and state_dict() is fp32",
    )
    if config.precision == "bf16":
        yield "bf16", "a gradient that isn't finite is an error on all ranks; DeepSpeed skips the step"
        return
    yield (
        "fp16",
        "an overflow at min_loss_scale ends training with an error, on all ranks; a loss that is a sum is "
        "also divided by about its number of terms before the backward pass",
    )


def _optimizer(config: Config) -> Iterator[tuple[str, str]]:
    optimizer, schedule = config.optimizer, config.scheduler
    if isinstance(optimizer, AdamConfig) and not optimizer.params.torch_adam:
        yield "optimizer", f"{optimizer.implementation}, fused, where DeepSpeed has one of its own"
    if isinstance(optimizer, MuonConfig):
        yield (
            "optimizer",
            "the orthogonal iteration is the standard one, in fp32 on CPUs and bf16 on GPUs; parameters of "
            "more than two dims (convolutions) are AdamW's, where DeepSpeed takes Muon; parameter groups of "
            "your own stay apart, with their own rates",
        )
    if schedule is None:
        return
    params = schedule.params
    if isinstance(params, OneCycleParams) and params.decay_mom_rate:
        yield "scheduler", "the momentum that decay_mom_rate makes grow ends at 0.999, not beyond 1"
    if schedule.type.startswith("Warmup"):
        yield (
            "scheduler",
            "the timing is DeepSpeed's: the first step is taken before the warmup has begun, the second at "
            "its iteration 0, so that by default the rate of both is 0",
        )


def _rest(config: Config) -> Iterator[tuple[str, str]]:
    if config.activation_checkpointing.mode != "none":
        yield (
            "activation_checkpointing",
            "the engine recomputes layers by itself; in DeepSpeed the model calls deepspeed.checkpointing",
        )
    yield (
        "checkpoint",
        "every checkpoint is universal: it loads at any pp, dp, tp and ZeRO stage; saves are in the "
        "background unless async_save is false",
    )
