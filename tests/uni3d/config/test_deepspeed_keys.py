"""Every key of DeepSpeed's config is honoured, reported as having no effect, or refused; never ignored.

The keys were collected by hand from DeepSpeed 0.19's `runtime/config.py` and the files it uses, independently
of our own tables.
"""

import copy
from typing import Any

import pytest
from models import Stack, make_engine, seeded

from uni3d.config import Config, load_config
from uni3d.config.strict import ConfigError

ON = {"enabled": True}
BASE: dict[str, Any] = {"optimizer": {"type": "Adam"}}

HONOURED: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "seed": 3,
    "communication_data_type": "bf16",
    "data_types.grad_accum_dtype": "fp32",
    "fp16.enabled": True,
    "fp16.loss_scale": 128.0,
    "fp16.initial_scale_power": 8,
    "fp16.loss_scale_window": 10,
    "fp16.hysteresis": 1,
    "fp16.consecutive_hysteresis": True,
    "fp16.min_loss_scale": 2,
    "bf16.enabled": True,
    "bfloat16.enabled": True,
    "zero_optimization.stage": 2,
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_param.device": "cpu",
    "zero_optimization.cpu_offload": True,
    "zero_optimization.cpu_offload_param": True,
    "zero_optimization.zero_hpz_partition_size": 2,
    "zero_optimization.mics_shard_size": 2,
    "zero_optimization.stage3_param_persistence_threshold": 1e5,
    "zero_optimization.param_persistence_threshold": 10,
    "optimizer.type": "SGD",
    "optimizer.params": {"lr": 0.5},
    "scheduler": {"type": "WarmupLR"},
    "tensor_parallel.autotp_size": 2,
    "pipeline.stages": 2,
    "pipeline.activation_checkpoint_interval": 1,
    "steps_per_print": 20,
    "wall_clock_breakdown": True,
    "tensorboard": {"enabled": True, "output_path": "x", "job_name": "y"},
    "csv_monitor": {"enabled": True, "output_path": "x", "job_name": "y"},
    "wandb": {"enabled": True, "group": "x", "team": "y", "project": "z"},
    "flops_profiler": {"enabled": True, "profile_step": 2, "module_depth": 1, "top_modules": 3},
}
NAMED: dict[str, Any] = {
    **{
        f"zero_optimization.{key}": value
        for key, value in {
            "contiguous_gradients": False,
            "reduce_scatter": False,
            "reduce_bucket_size": 5e7,
            "use_multi_rank_bucket_allreduce": False,
            "allgather_partitions": False,
            "allgather_bucket_size": 1000,
            "overlap_comm": True,
            "load_from_fp32_weights": False,
            "elastic_checkpoint": True,
            "sub_group_size": "auto",
            "cpu_offload_use_pin_memory": True,
            "stage3_prefetch_bucket_size": 1,
            "stage3_model_persistence_threshold": 1,
            "stage3_max_live_parameters": 1,
            "stage3_max_reuse_distance": 1,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "stage3_module_granularity_threshold": 1,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_allgather_sequential": True,
            "legacy_stage1": True,
            "round_robin_gradients": True,
            "mics_hierarchical_params_gather": True,
            "memory_efficient_linear": False,
            "pipeline_loading_checkpoint": True,
            "override_module_apply": False,
            "log_trace_cache_warnings": True,
            "enable_sanity_checks": True,
            "save_muon_momentum_buffer_in_memory": True,
            "leaf_module": {"classes": ["x"]},
            "offload_param.nvme_path": "/x",
            "offload_param.buffer_count": 5,
            "offload_param.buffer_size": 1e8,
            "offload_param.max_in_cpu": 1e9,
            "offload_param.pin_memory": True,
            "offload_optimizer.nvme_path": "/x",
            "offload_optimizer.buffer_count": 4,
            "offload_optimizer.pin_memory": True,
            "offload_optimizer.pipeline_read": True,
            "offload_optimizer.pipeline_write": True,
            "offload_optimizer.fast_init": True,
            "offload_optimizer.cpuadam_cores_perc": 0.5,
        }.items()
    },
    "fp16.auto_cast": True,
    "bf16.immediate_grad_update": True,
    "bf16.loss_scale": 0,
    "bf16.initial_scale_power": 16,
    "fp16.opt_level": "O2",
    "optimizer.legacy_fusion": True,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "disable_allgather": True,
    "seq_parallel_communication_data_type": "fp32",
    "vocabulary_size": 100,
    "log_level": "info",
    "aio": {"block_size": 1},
    "timers": {"throughput": {"enabled": True}},
    "checkpoint.load_universal": True,
    "checkpoint.tag_validation": "Warn",
    "checkpoint.parallel_write": {"pipeline_stage": True},
    "checkpoint.writer": {"type": "fast"},
    "checkpoint.checkpoint_serialization": True,
    "pipeline.pipe_partitioned": True,
    "pipeline.grad_partitioned": True,
    "tensor_parallel.tp_overlap_comm": True,
    "tensor_parallel.dtype": "fp16",
    "compile.offload_activation": True,
    "compile.passes": ["z3"],
}
REQUESTS: dict[str, Any] = {
    "bf16.check_grad_overflow": False,
    "sparse_gradients": True,
    "zero_optimization.ignore_unused_parameters": False,
    "zero_optimization.offload_optimizer.ratio": 0.5,
    "zero_optimization.offload_optimizer.super_offload": True,
    "activation_checkpointing.partition_activations": True,
    "activation_checkpointing.cpu_checkpointing": True,
    "activation_checkpointing.contiguous_memory_optimization": True,
    "activation_checkpointing.number_checkpoints": 4,
    "activation_checkpointing.synchronize_checkpoint_boundary": True,
    "activation_checkpointing.profile": True,
    "pipeline.partition": "uniform",
    "pipeline.seed_layers": True,
    "compile.deepcompile": True,
    "graph_harvesting": True,
    "autotuning": ON,
    "comms_logger": ON,
    "memory_breakdown": True,
    "dump_state": True,
    "eigenvalue": ON,
    "datastates_ckpt": {"host_cache_size": 1},
    "compile.disable": True,
}
"""Keys without effect that are reported only if their value asks for something."""
REFUSED: dict[str, Any] = {
    "amp": {"enabled": True, "opt_level": "O1"},
    "torch_autocast": ON,
    "fp16.fp16_master_weights_and_grads": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "data_types.param_dtype": "bf16",
    "data_types.buffer_dtype": "bf16",
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "sequence_parallel_size": 2,
    "data_parallel_size": 2,
    "expert_parallel": {"autoep_size": 2},
    "use_data_before_expert_parallelism": True,
    "tensor_parallel.tp": {"tp_size": 2},
    "tensor_parallel.partition_config": {"layer_specs": []},
    "tensor_parallel.preset_model": "llama",
    "checkpoint.use_node_local_storage": True,
    "elasticity": {"enabled": True, "max_train_batch_size": 2000},
    "comet": ON,
    "progressive_layer_drop": ON,
    "curriculum_learning": ON,
    "data_efficiency": ON,
    "compression_training": {"weight_quantization": {"shared_parameters": ON}},
    "quantize_training": ON,
    "weight_quantization": {"num_groups": 1},
    "sparse_attention": {"mode": "fixed"},
    "hybrid_engine": ON,
    "nebula": ON,
}

NEEDS: dict[str, dict[str, Any]] = {
    "zero_optimization.offload_optimizer.device": {"zero_optimization": {"stage": 1}},
    "zero_optimization.offload_param.device": {"zero_optimization": {"stage": 3}},
    "zero_optimization.cpu_offload": {"zero_optimization": {"stage": 1}},
    "zero_optimization.cpu_offload_param": {"zero_optimization": {"stage": 3}},
    "zero_optimization.zero_hpz_partition_size": {"zero_optimization": {"stage": 3}},
    "zero_optimization.mics_shard_size": {"zero_optimization": {"stage": 3}},
}
"""Other keys that a key needs to be valid."""


def with_key(key: str, value: Any) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(BASE | NEEDS.get(key, {}))
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


def without_key(key: str) -> Config:
    return load_config(BASE | NEEDS.get(key, {}))


@pytest.mark.parametrize("key", HONOURED)
def test_a_key_that_is_honoured_changes_the_config(key: str) -> None:
    config = load_config(with_key(key, HONOURED[key]))
    assert config != without_key(key)
    assert not config.without_meaning


@pytest.mark.parametrize("key", NAMED)
def test_a_key_without_effect_is_reported_and_changes_nothing(key: str) -> None:
    config = load_config(with_key(key, NAMED[key]))
    assert list(config.without_meaning) == [key]
    empty = {"offload_optimizer": {}, "offload_param": {}}
    section = key.split(".")[1] if key.count(".") == 2 else None
    expected = load_config(BASE | ({"zero_optimization": {section: empty[section]}} if section else {}))
    assert config.model_dump() == expected.model_dump()
    assert not load_config(with_key(key, None)).without_meaning, "null means not given"


@pytest.mark.parametrize("key", REQUESTS)
def test_a_request_without_effect_is_reported_if_it_is_made(key: str) -> None:
    config, without = load_config(with_key(key, REQUESTS[key])), load_config(BASE | _empty_section(key))
    assert list(config.without_meaning) == [key]
    assert config.model_dump() == without.model_dump()
    opposite = REQUESTS[key] is False
    for off in (None, {"enabled": False, "more": 1}, opposite):
        if key != "compile.disable" or off is None:
            assert not load_config(with_key(key, off)).without_meaning, "nothing to report"


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_is_refused_is_accepted_when_it_is_off(key: str) -> None:
    with pytest.raises(ValueError, match=rf"^config: {key} is refused: \w"):
        load_config(with_key(key, REFUSED[key]))
    for off in (None, {"enabled": False, "more": 1}, REFUSED[key] is False):
        config = load_config(with_key(key, off))
        assert config.model_dump() == load_config(BASE | _empty_section(key)).model_dump()
        assert not config.without_meaning, "nothing to report"


def _empty_section(key: str) -> dict[str, Any]:
    parts = key.split(".")
    return {parts[0]: {parts[1]: {}}} if len(parts) == 3 else {}


@pytest.mark.parametrize(
    ("key", "right", "wrong", "expected"),
    [
        ("checkpoint.tag_validation", ("Ignore", "WARN", "fail"), ("foo", True), "Ignore, Warn or Fail"),
        ("log_level", ("INFO",), ("loud",), "debug, info, warning, error or critical"),
        ("seq_parallel_communication_data_type", ("FP32", "bf16"), ("fp8",), "fp32, bf16 or fp16"),
    ],
)
def test_a_value_that_deepspeed_refuses(
    key: str, right: tuple[str, ...], wrong: tuple[Any, ...], expected: str
) -> None:
    for value in right:
        assert list(load_config(with_key(key, value)).without_meaning) == [key]
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            load_config(with_key(key, value))
        assert str(caught.value) == f"config: {key} is {value!r}: expected {expected}"


NEUTRAL = {
    "sequence_parallel_size": 1,
    "gradient_allreduce_op": "mean",
    "pipeline.stages": "auto",
    "pipeline.partition": "best",
    "pipeline.activation_checkpoint_interval": 0,
    "tensor_parallel.autotp_size": 0,
    "zero_optimization.offload_optimizer.ratio": 1.0,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_hpz_partition_size": 1,
}


@pytest.mark.parametrize("key", NEUTRAL)
def test_deepspeeds_own_default_is_accepted(key: str) -> None:
    config = load_config(with_key(key, NEUTRAL[key]))
    assert (config.offload, config.shard_group, config.parallel.tp) == (False, None, 1)
    assert not config.without_meaning


def test_one_is_not_true() -> None:
    with pytest.raises(ValueError, match="sequence_parallel_size is refused"):
        load_config({"sequence_parallel_size": True})


def test_keys_are_resolved() -> None:
    zero: dict[str, Any] = {"stage": 3, "mics_shard_size": 4, "offload_param": {"device": "cpu"}}
    config = load_config({"zero_optimization": zero, "tensor_parallel": {"autotp_size": 2}})
    assert (config.shard_group, config.offload, config.parallel.tp) == (4, True, 2)
    assert load_config({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 8}}).shard_group == 8
    old = load_config({"zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_param": False}})
    assert old.offload
    none = {"device": "none"}
    off = {"stage": 3, "offload_optimizer": none, "offload_param": none, "cpu_offload": False}
    assert not load_config({"zero_optimization": off}).offload
    assert load_config({"bfloat16": {"enabled": True}}).precision == "bf16"


@pytest.mark.parametrize("stage", range(4))
def test_what_a_stage_cant_offload_is_reported(stage: int) -> None:
    """Parameters are offloaded at stage 3 only, and nothing is at stage 0, as in DeepSpeed."""
    cpu = {"device": "cpu", "pin_memory": True}
    both = {"stage": stage, "offload_param": cpu, "cpu_offload": True}
    config = load_config({"zero_optimization": both})
    expected = ["offload_param"] * (stage < 3) + ["offload_optimizer"] * (stage < 1)
    assert set(config.without_meaning) - {"zero_optimization.offload_param.pin_memory"} == {
        f"zero_optimization.{key}" for key in expected
    }
    assert config.offload == (stage > 0)
    only = load_config({"zero_optimization": {"stage": stage, "offload_param": True}})
    assert only.offload == (stage == 3) == (not only.without_meaning)


@pytest.mark.parametrize(
    ("stage", "sent", "reported"),
    [(0, None, True), (1, "fp32", True), (1, "BF16", False), (2, "bf16", True), (3, None, True)],
)
def test_another_type_of_accumulation_is_reported(stage: int, sent: str | None, reported: bool) -> None:
    values = {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"stage": stage}}
    found = load_config({**values, "communication_data_type": sent}).without_meaning
    assert list(found) == ["data_types.grad_accum_dtype"] * reported


def test_layers_recomputed_together_are_recomputed_one_by_one() -> None:
    config = load_config({"pipeline": {"activation_checkpoint_interval": 4}})
    assert (config.activation_checkpointing.mode, config.activation_checkpointing.every) == ("full", 1)
    assert "not 4 at once" in config.without_meaning["pipeline.activation_checkpoint_interval"]


def test_a_comment_is_reported_as_one() -> None:
    config = load_config({"_comment": "x", "fp16": {"//enabled": True, "loss_scale": 1}, "#seed": 3})
    assert list(config.without_meaning) == ["_comment", "fp16.//enabled", "#seed"]
    assert (config.precision, config.fp16.loss_scale, config.seed) == ("fp32", 1.0, 42)


def test_zero_settings_reach_the_parallel_package() -> None:
    from uni3d.config.settings import parallel_settings

    on = load_config({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}})
    assert parallel_settings(on).offload
    assert not parallel_settings(load_config({"zero_optimization": {"stage": 1}})).offload
    kept = load_config({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1e5}})
    assert parallel_settings(kept).persistence_threshold == 100_000


def test_the_given_dict_is_not_modified() -> None:
    values = {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 1, "overlap_comm": True}}
    load_config(values)
    assert values == {"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 1, "overlap_comm": True}}


def test_training_begins_with_one_warning_about_keys_without_effect(alone: None) -> None:
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 5e8}
    with pytest.warns(UserWarning, match="keys of the config that have no effect") as caught:
        make_engine(seeded(Stack), config={"zero_optimization": zero, "log_level": "info"})
    assert len(caught) == 1
    assert str(caught[0].message).count("\n") == 0
    assert "zero_optimization.overlap_comm, zero_optimization.reduce_bucket_size (fully_shard " in str(
        caught[0].message
    )
    assert "log_level (use Python's logging)" in str(caught[0].message)
