"""`DeepSpeedConfig` of a script: the values that its engine has, read-only."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Stack, make_engine, seeded
from ranks import Ranks
from uni3d.deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from uni3d.deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from uni3d.deepspeed.runtime.zero.config import (
    DeepSpeedZeroConfig,
    DeepSpeedZeroOffloadOptimizerConfig,
    ZeroStageEnum,
)

import uni3d.deepspeed as deepspeed

GIVEN: dict[str, Any] = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_clipping": 0.5,
    "steps_per_print": 7,
    "communication_data_type": "bf16",
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.5, 0.9]}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "zero_optimization": {"stage": 2, "cpu_offload": True},
    "fp16": {"enabled": True, "initial_scale_power": 4},
    "dataloader_drop_last": True,
}
EXPECTED = {
    "train_batch_size": 24,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 2,
    "world_size": 4,
    "global_rank": 0,
    "zero_enabled": True,
    "zero_optimization_stage": ZeroStageEnum.gradients,
    "mics_shard_size": -1,
    "fp16_enabled": True,
    "loss_scale": 0.0,
    "initial_dynamic_scale": 16.0,
    "bfloat16_enabled": False,
    "gradient_allreduce_op": "mean",
    "gradient_clipping": 0.5,
    "steps_per_print": 7,
    "wall_clock_breakdown": False,
    "dataloader_drop_last": True,
    "communication_data_type": torch.bfloat16,
    "optimizer_name": "adamw",
    "optimizer_params": {"lr": 0.1, "betas": [0.5, 0.9]},
    "scheduler_name": "WarmupLR",
    "scheduler_params": {"warmup_num_steps": 5},
}


@pytest.mark.parametrize("form", ["dict", "path", "base64"])
def test_values(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    given: Any = GIVEN
    if form == "path":
        given = tmp_path / "config.json"
        given.write_text(json.dumps(GIVEN))
    elif form == "base64":
        given = base64.urlsafe_b64encode(json.dumps(GIVEN).encode()).decode()
    config: Any = DeepSpeedConfig(given)
    assert {name: getattr(config, name) for name in EXPECTED} == EXPECTED
    sections = ("zero_config", "float16_config", "bfloat16_config", "flops_profiler_config", "compile_config")
    assert vars(config).keys() == {*EXPECTED, *sections}
    assert isinstance(config.zero_config, DeepSpeedZeroConfig)
    assert isinstance(config.zero_config.offload_optimizer, DeepSpeedZeroOffloadOptimizerConfig)
    assert (config.zero_config.stage, config.zero_config.offload_optimizer.device) == (2, "cpu")
    assert (config.float16_config.enabled, config.bfloat16_config.enabled) == (True, False)
    assert config.flops_profiler_config.profile_step == 1
    assert config.compile_config.enabled is False
    assert deepspeed.DeepSpeedConfig is DeepSpeedConfig


def test_what_isn_t_given() -> None:
    config: Any = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 3})
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.world_size) == (3, 1, 1)
    assert (config.optimizer_name, config.optimizer_params) == (None, None)
    assert (config.scheduler_name, config.scheduler_params) == (None, None)
    assert (config.zero_enabled, config.communication_data_type) == (False, None)
    other: Any = DeepSpeedConfig({"train_batch_size": 1, "optimizer": {"type": "sgd", "params": {"lr": 1}}})
    assert (other.optimizer_name, other.optimizer_params) == ("SGD", {"lr": 1.0})


def test_sections_of_a_mapping() -> None:
    given = {"bfloat16": {"enabled": "true"}, "train_batch_size": None, "of": "the script"}
    assert get_bfloat16_config(given).enabled
    assert not get_float16_config(given).enabled
    assert get_float16_config({"fp16": {"enabled": True, "loss_scale": 8}}).loss_scale == 8
    with pytest.raises(DeepSpeedConfigError, match=r"bf16\.enabled is 'maybe'"):
        get_bfloat16_config({"bfloat16": {"enabled": "maybe"}})


def test_a_section_of_zero() -> None:
    given = {"stage": 3, "overlap_comm": True, "cpu_offload": True, "reduce_bucket_size": "auto"}
    zero = DeepSpeedZeroConfig(**given)
    assert (zero.stage, zero.offload_param, zero.shard_group) == (3, None, None)
    assert zero.offload_optimizer == DeepSpeedZeroOffloadOptimizerConfig(device="cpu")
    assert zero.gather_16bit_weights_on_model_save
    assert DeepSpeedZeroConfig() == DeepSpeedZeroConfig(stage=0)
    for wrong, message in (
        ({"stage": 5}, "stage"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights is refused"),
        ({"sub_group_sizes": 1}, "sub_group_sizes"),
        ({"stage": "auto"}, "stage is 'auto': give a value"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepSpeedZeroConfig(**wrong)


def test_errors() -> None:
    config: Any = DeepSpeedConfig({"train_batch_size": 3})
    with pytest.raises(
        AttributeError, match="has no 'elasticity_enabled' in uni3d; it has bfloat16_config, "
    ):
        config.elasticity_enabled  # noqa: B018
    with pytest.raises(AttributeError, match="read-only; change train_batch_size"):
        config.train_batch_size = 4
    assert config.train_batch_size == 3
    with pytest.raises(DeepSpeedConfigError, match="'train_batchsize'"):
        DeepSpeedConfig({"train_batchsize": 3})
    with pytest.raises(ValueError, match="give train_batch_size"):
        DeepSpeedConfig({})


def engine_case(tp: int) -> None:
    given: dict[str, Any] = {"parallel": {"tp": tp, "device": "cpu"}, "train_micro_batch_size_per_gpu": 2}
    engine = make_engine(seeded(Stack), zero=1, config=given)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert engine.mpu.get_data_parallel_world_size() == 2
    for mpu in (None, engine.mpu):
        config: Any = DeepSpeedConfig({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, mpu)
        assert [getattr(config, name) for name in names] == [getattr(engine, name)() for name in names]
        assert (config.world_size, config.global_rank) == (2, engine.global_rank)
    with pytest.raises(ValueError, match="get_data_parallel_world_size"):
        DeepSpeedConfig({"train_batch_size": 12, "parallel": {"dp": 1, "tp": 2}}, engine.mpu)


def test_as_the_engine_has_them(ranks: Ranks) -> None:
    ranks.run(2, engine_case, 1)
