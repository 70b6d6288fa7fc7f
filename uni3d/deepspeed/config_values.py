"""`deepspeed.runtime.config.DeepSpeedConfig`: a config's values, by the names that DeepSpeed gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from pydantic import model_validator

from uni3d.config import batch_triad, load_config
from uni3d.config.optimizer import OptimizerConfig
from uni3d.config.scheduler import SchedulerConfig
from uni3d.config.sections import BF16Config, FP16Config, ZeroConfig
from uni3d.config.sift import sift
from uni3d.deepspeed import constants
from uni3d.engine.deepspeed_arguments import Given, decoded, with_degrees
from uni3d.engine.ranks import degrees_of

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOWER = {getattr(constants, name) for name in dir(constants) if name.endswith("_OPTIMIZER")}
"""Names that DeepSpeed writes in small letters; the others are classes of `torch.optim`."""


class DeepSpeedZeroConfig(ZeroConfig):
    """Section `zero_optimization`, read as in a config; of keys without effect nothing is kept.

    Raises:
        ValueError: a key or its value is refused.
    """

    @model_validator(mode="before")
    @classmethod
    def _sifted(cls, values: dict[str, Any]) -> Any:
        rest, problems, _, autos = sift({"zero_optimization": values})
        if problems or autos:
            raise ValueError("; ".join([*problems, *(f"{key} is 'auto': give a value" for key in autos)]))
        return rest["zero_optimization"]

    @property
    def gather_16bit_weights_on_model_save(self) -> bool:
        """True: `save_16bit_model` always gathers the weights."""
        return True


class DeepSpeedConfig:
    """A config by DeepSpeed's names, with the batch sizes of these processes. Read-only.

    Attributes:
        train_batch_size, train_micro_batch_size_per_gpu, gradient_accumulation_steps: the three batch sizes.
        world_size, global_rank: number of data-parallel ranks, and this process among all.
        zero_config, zero_enabled, zero_optimization_stage, mics_shard_size: section `zero_optimization`.
        float16_config, fp16_enabled, loss_scale, initial_dynamic_scale: section `fp16`.
        bfloat16_config, bfloat16_enabled: section `bf16`.
        gradient_clipping, steps_per_print, wall_clock_breakdown, dataloader_drop_last: keys of these names.
        gradient_allreduce_op: "mean"; any other is refused.
        communication_data_type: torch's dtype, or None if the config has none.
        optimizer_name, optimizer_params, scheduler_name, scheduler_params: as the config gives them, or None.
        flops_profiler_config, compile_config: these sections.
    """

    def __init__(self, config: Given, mpu: Any = None) -> None:
        """Take a file's path, its content or the base64 of it, and an object with Megatron's degrees.

        Raises:
            ValueError: the config or the `mpu` doesn't fit, as `initialize` says it.
        """
        settings = with_degrees(load_config(decoded(config)), {"mpu": mpu})
        dp = degrees_of(settings)[0].dp
        triad = batch_triad(settings, dp)
        zero, fp16, bf16 = settings.zero_optimization, settings.fp16, settings.bf16
        optimizer_name, optimizer_params = _named(settings.optimizer)
        scheduler_name, scheduler_params = _named(settings.scheduler)
        vars(self).update(
            train_batch_size=triad.train_batch,
            train_micro_batch_size_per_gpu=triad.micro_batch,
            gradient_accumulation_steps=triad.accumulation,
            world_size=dp,
            global_rank=dist.get_rank() if dist.is_initialized() else 0,
            zero_config=DeepSpeedZeroConfig.model_construct(zero.model_fields_set, **dict(zero)),
            zero_enabled=zero.stage > 0,
            zero_optimization_stage=zero.stage,
            mics_shard_size=zero.mics_shard_size,
            float16_config=fp16,
            fp16_enabled=fp16.enabled,
            loss_scale=fp16.loss_scale,
            initial_dynamic_scale=2.0**fp16.initial_scale_power,
            bfloat16_config=bf16,
            bfloat16_enabled=bf16.enabled,
            gradient_allreduce_op="mean",
            gradient_clipping=settings.gradient_clipping,
            steps_per_print=settings.steps_per_print,
            wall_clock_breakdown=settings.wall_clock_breakdown,
            dataloader_drop_last=settings.dataloader_drop_last,
            communication_data_type=_DTYPES[settings.communication_data_type],
            optimizer_name=optimizer_name,
            optimizer_params=optimizer_params,
            scheduler_name=scheduler_name,
            scheduler_params=scheduler_params,
            flops_profiler_config=settings.flops_profiler,
            compile_config=settings.compile,
        )

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError: Python calls this only for what there isn't."""
        raise AttributeError(
            f"DeepSpeedConfig has no {name!r} in uni3d; it has {', '.join(sorted(vars(self)))}"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"DeepSpeedConfig is read-only; change {name} in what it is made of")


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> BF16Config:
    """Return the section `bf16`, or `bfloat16`, of a config; other keys aren't looked at."""
    return load_config({key: param_dict[key] for key in ("bf16", "bfloat16") if key in param_dict}).bf16


def get_float16_config(param_dict: Mapping[str, Any]) -> FP16Config:
    """Return the section `fp16` of a config; other keys aren't looked at."""
    return load_config({key: param_dict[key] for key in ("fp16",) if key in param_dict}).fp16


def _named(section: OptimizerConfig | SchedulerConfig | None) -> tuple[Any, dict[str, Any] | None]:
    """Return the type, in DeepSpeed's spelling, and the parameters that a section gives."""
    if section is None:
        return None, None
    lower = section.type.lower()
    return lower if lower in _LOWER else section.type, section.params.model_dump(
        mode="json", exclude_unset=True
    )
