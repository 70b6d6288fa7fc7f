"""DeepSpeed's keys that uni3d doesn't have (as of DeepSpeed 0.19).

A key is *refused*, with the reason, if ignoring it would lose something that the user asked for. It has *no
effect* if it tunes a mechanism that doesn't exist here and training computes the same without it: it is
accepted, so that existing files work, and reported in one line when training begins and by `uni3d config`. A
few are other names for our keys: they are *read as* those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from uni3d.config.forms import as_boolean, as_integer, as_json

_OTHER_DATA = "it changes the samples of a step; select them in training_data"
_INSIDE = "it replaces modules of the model; do so before initialize"
_BY_LAYER = "fully_shard communicates gradients and parameters layer by layer, at every ZeRO stage"
_QUANTIZED = "communication isn't quantized; use communication_data_type to halve gradient traffic"
_NO_DISK = "offloading to disk isn't supported"

REFUSED: dict[str, str] = {
    # Observation
    "comet": "log from your script, with the return value of train_batch",
    "memory_breakdown": "the line printed by steps_per_print includes peak GPU memory",
    "dump_state": "use uni3d config to print the resolved config",
    "comms_logger": "use torch.profiler, which records collectives",
    "autotuning": "it searches by running; use uni3d plan for estimates",
    "eigenvalue": "it is part of DeepSpeed's quantization schedules, which aren't supported",
    # Precision
    "amp": "apex isn't supported; use bf16 or fp16",
    "torch_autocast": "layers compute in a single type; use bf16 or fp16",
    "fp16.fp16_master_weights_and_grads": "parameters and their states are always fp32",
    "bf16.bf16_master_weights_and_grads": "parameters and their states are always fp32",
    "bf16.bf16_optimizer_states": "parameters and their states are always fp32",
    "bf16.check_grad_overflow": "gradients are always checked",
    "data_types.param_dtype": "parameters are always fp32; use bf16 or fp16 for the type of computation",
    "data_types.buffer_dtype": "buffers keep the model's type",
    # Gradients, batches
    "gradient_allreduce_op": "gradients are always those of the mean loss over the global batch",
    "sparse_gradients": "gradients are always reduced as dense tensors",
    "managed_gradient_accumulation": "the engine always counts gradient_accumulation_steps itself",
    "elasticity": "any checkpoint resumes on any topology; set train_batch_size to keep the global batch",
    # How work is split
    "sequence_parallel_size": "use parallel.sequence_parallel, which uses the tensor-parallel ranks",
    "data_parallel_size": 'use "parallel": {"dp": ...}',
    "expert_parallel": "expert parallelism isn't supported",
    "use_data_before_expert_parallelism": "expert parallelism isn't supported",
    "tensor_parallel.tp_size": 'use "parallel": {"tp": ...}',
    "tensor_parallel.tp": 'use "parallel": {"tp": ...}',
    "tensor_parallel.tensor_parallel": 'use "parallel": {"tp": ...}',
    "tensor_parallel.partition_config": "a model is sharded according to its own tp_plan",
    "tensor_parallel.preset_model": "a model is sharded according to its own tp_plan",
    "tensor_parallel.injection_policy_tuple": "a model is sharded according to its own tp_plan",
    "tensor_parallel.replace_with_kernel_inject": _INSIDE,
    "tensor_parallel.kernel_inject": _INSIDE,
    "pipeline.stages": 'use "parallel": {"pp": ...}',
    "pipeline.partition": "use parallel.balance",
    "pipeline.seed_layers": "each parameter is already seeded by its name",
    "pipeline.activation_checkpoint_interval": 'use activation_checkpointing with mode "full" and every',
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zeropp_loco_param": _QUANTIZED,
    "zero_optimization.zenflow": "optimizer steps aren't split or delayed",
    "zero_optimization.ignore_unused_parameters": "parameters without gradients are never an error",
    "zero_optimization.offload_optimizer.ratio": "partial offloading isn't supported",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeed's own kernels",
    # Memory
    "activation_checkpointing.partition_activations": "activations aren't partitioned; use "
    "parallel.sequence_parallel to split those between layers",
    "activation_checkpointing.cpu_checkpointing": "activations stay on the GPU; use mode",
    "activation_checkpointing.contiguous_memory_optimization": "torch's allocator handles it; use mode",
    "activation_checkpointing.number_checkpoints": "use every, to recompute one of every N layers",
    "activation_checkpointing.synchronize_checkpoint_boundary": "nothing is synchronized there; use mode",
    "activation_checkpointing.profile": "use torch.profiler",
    "compile.deepcompile": "layers are compiled by torch.compile; use enabled",
    "graph_harvesting": 'for CUDA graphs use "compile": {"mode": "reduce-overhead"}',
    # Checkpoints
    "checkpoint.use_node_local_storage": "checkpoints need storage shared by all ranks",
    "nebula": "checkpoints are already written in the background",
    "datastates_ckpt": "checkpoints are already written in the background",
    # What is trained, on what
    "sparse_attention": "attention is up to the model",
    "progressive_layer_drop": "skipping layers is up to the model",
    "curriculum_learning": _OTHER_DATA,
    "data_efficiency": _OTHER_DATA,
    "compression_training": _INSIDE,
    "quantize_training": _INSIDE,
    "weight_quantization": _INSIDE,
    "hybrid_engine": "inference isn't supported",
}
"""Keys that are refused unless their value turns them off, with the reason."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bf16.check_grad_overflow": (True,),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "sequence_parallel_size": (1,),
    "tensor_parallel.tp_size": (1,),
    "pipeline.stages": ("auto",),
    "pipeline.partition": ("best",),
    "pipeline.activation_checkpoint_interval": (0,),
    "zero_optimization.ignore_unused_parameters": (True,),
    "zero_optimization.offload_optimizer.ratio": (1, 1.0),
}
"""Values of refused keys that ask for the default behavior. null, false and `enabled` false always do."""

CONVERTED = {"zero_optimization", "fp16", "bf16", "tensor_parallel", "compile"} | {
    *("comet", "comms_logger", "hybrid_engine"),
}
"""Sections in which DeepSpeed converts the texts of numbers and booleans."""

AUTO_IS_DEFAULT = (
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.param_persistence_threshold",
)
"""Keys whose "auto" may be left out: it changes no numbers, and DeepSpeed drops it too."""

OFF_BY_DEFAULT = {
    *("amp", "torch_autocast", "comet", "comms_logger", "hybrid_engine", "autotuning", "elasticity"),
    *("nebula", "data_efficiency", "curriculum_learning", "progressive_layer_drop", "eigenvalue"),
}
"""Sections that DeepSpeed ignores unless they have `enabled` true."""

OFF_BY_FALSE_ONLY = {
    "bf16.check_grad_overflow",
    "managed_gradient_accumulation",
    "zero_optimization.ignore_unused_parameters",
}
"""Keys for which `false` is a request, not a default."""


def _zero(reason: str, *keys: str) -> dict[str, str]:
    return {f"zero_optimization.{key}": reason for key in keys}


NO_MEANING: dict[str, str] = {
    **_zero(
        _BY_LAYER,
        *("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size"),
        *("use_multi_rank_bucket_allreduce", "allgather_partitions", "allgather_bucket_size"),
        *("round_robin_gradients", "sub_group_size", "legacy_stage1", "mics_hierarchical_params_gather"),
        *("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
        *("stage3_model_persistence_threshold", "model_persistence_threshold"),
        *("stage3_max_live_parameters", "max_live_parameters"),
        *("stage3_max_reuse_distance", "max_reuse_distance"),
        *("stage3_module_granularity_threshold", "module_granularity_threshold"),
        *("stage3_use_all_reduce_for_fetch_params", "use_all_reduce_for_fetch_params"),
        *("stage3_allgather_sequential", "allgather_sequential"),
        *("leaf_module", "log_trace_cache_warnings", "enable_sanity_checks"),
    ),
    **_zero("modules aren't modified for ZeRO", "memory_efficient_linear", "override_module_apply"),
    **_zero("momentum is saved like any optimizer state", "save_muon_momentum_buffer_in_memory"),
    **_zero(
        "save_16bit_model always gathers the weights",
        "stage3_gather_16bit_weights_on_model_save",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
    ),
    **_zero(
        "every checkpoint loads on any topology, in fp32",
        *("load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint"),
    ),
    **_zero("offloaded memory is always pinned if there is a GPU", "cpu_offload_use_pin_memory"),
    **_zero(
        "offloaded memory is always pinned if there is a GPU",
        *("offload_optimizer.pin_memory", "offload_param.pin_memory"),
    ),
    **_zero(
        _NO_DISK,
        *(
            f"{o}.{key}"
            for o in ("offload_optimizer", "offload_param")
            for key in ("nvme_path", "buffer_count")
        ),
        *("offload_param.buffer_size", "offload_param.max_in_cpu", "offload_optimizer.pipeline_read"),
        *("offload_optimizer.pipeline_write", "offload_optimizer.fast_init"),
    ),
    **_zero("the number of threads is set by OMP_NUM_THREADS", "offload_optimizer.cpuadam_cores_perc"),
    "aio": _NO_DISK,
    "zero_allow_untested_optimizer": "optimizers that don't support sharded parameters are refused by name",
    "zero_force_ds_cpu_optimizer": "optimizers step on the device of their parameters",
    "prescale_gradients": "gradients are summed in communication_data_type and then divided",
    "gradient_predivide_factor": "gradients are summed in communication_data_type and then divided",
    "disable_allgather": _BY_LAYER,
    "allgather_size": _BY_LAYER,
    "seq_parallel_communication_data_type": "Ulysses sequence parallelism isn't supported",
    "vocabulary_size": "it only enables a check of alignment",
    "log_level": "use Python's logging",
    "timers": "there are no throughput timers",
    "optimizer.legacy_fusion": "optimizers are torch's",
    "fp16.auto_cast": "floating-point inputs are always cast",
    "bf16.immediate_grad_update": "gradients are accumulated in data_types.grad_accum_dtype",
    "tensor_parallel.tp_overlap_comm": "overlap is left to DTensor",
    "tensor_parallel.tp_grain_size": "dims are split evenly",
    "tensor_parallel.dtype": "bf16 and fp16 set the type of computation",
    "tensor_parallel.keep_module_on_host": "each rank keeps only its own shards",
    "pipeline.pipe_partitioned": "stages exchange whole activations",
    "pipeline.grad_partitioned": "stages exchange whole activations",
    "pipeline.use_reentrant": "recomputation is never reentrant",
    "checkpoint.load_universal": "every checkpoint is universal",
    "checkpoint.tag_validation": "different tags on different ranks are always an error",
    "checkpoint.parallel_write": "all ranks always write in parallel",
    "checkpoint.writer": "all ranks always write in parallel",
    "checkpoint.checkpoint_serialization": "nothing is pickled",
    **{
        f"compile.{key}": "it belongs to DeepCompile"
        for key in (
            *("free_activation", "free_activation_threshold", "offload_activation", "passes", "debug_log"),
            *("offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory"),
            *("offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather"),
            *("sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors"),
        )
    },
}
"""Keys that are accepted with any value but have no effect, with the reason."""

READ_AS: dict[str, str] = {
    "bfloat16": "bf16",
    "num_workers": "num_local_io_workers",
    "tensor_parallel.autotp_size": "parallel.tp",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
}
"""Other names for keys of ours."""


class Sifted(NamedTuple):
    """A config without the keys above."""

    values: dict[str, Any]
    problems: list[str]
    """Refused keys, with the reason."""
    without_meaning: dict[str, str]
    """Given keys that have no effect, with the reason."""


def by_reason(keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Group keys by their reason, in order."""
    grouped: dict[str, list[str]] = {}
    for key, reason in keys.items():
        grouped.setdefault(reason, []).append(key)
    return grouped


def sift(values: Mapping[str, Any]) -> Sifted:
    """Return a copy of a config without the DeepSpeed keys that uni3d doesn't have."""
    left: dict[str, Any] = as_json(values)
    problems: list[str] = []
    without_meaning: dict[str, str] = {}
    _open_booleans(left)
    for key in AUTO_IS_DEFAULT:
        for value in _take(left, key):
            if value != "auto":
                _put(left, key, value, key)
    for key, target in READ_AS.items():
        for value in _take(left, key):
            problems += _put(left, key, value, target)
    for key, reason in REFUSED.items():
        for value in _take(left, key):
            if not _is_off(key, value):
                problems.append(f"{key} is refused: {reason}")
    for key, reason in NO_MEANING.items():
        for value in _take(left, key):
            if value is not None:
                without_meaning[key] = reason
    for section in ("tensor_parallel", "pipeline"):  # all their known keys have been removed
        if section in left and left[section] in ({}, None):
            del left[section]
    problems += _autos(left)
    return Sifted(left, problems, without_meaning)


def _open_booleans(values: dict[str, Any]) -> None:
    """Replace the booleans that stand for a section by that section."""
    if isinstance(enabled := values.get("zero_optimization"), bool):
        values["zero_optimization"] = {"stage": int(enabled)}
    zero = values.get("zero_optimization")
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero, dict) and isinstance(enabled := zero.get(key), bool):
            zero[key] = {"device": "cpu" if enabled else "none"}


def _take(values: dict[str, Any], key: str) -> Iterator[Any]:
    """Remove a key if it is present, and yield its value."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    if last in values:
        yield values.pop(last)


def _put(values: dict[str, Any], key: str, value: Any, target: str) -> list[str]:
    """Set the key that `key` is read as, and return the problems with it; null isn't given."""
    if value is None:
        return []
    if key.startswith("zero_optimization.cpu_offload"):
        if not isinstance(on := as_boolean(value), bool):
            return [f"{key} is {value!r}: expected true or false"]
        value = {"device": "cpu" if on else "none"}
    if key == "tensor_parallel.autotp_size":
        value = as_integer(value)
        if value in (0, 1):  # disabled
            return []
    *sections, last = target.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return []  # the section itself is reported
    if values.get(last) is not None and values[last] != value:
        return [f"{key} is {value!r}, but {target}, which means the same, is {values[last]!r}; give one"]
    values[last] = value
    return []


def _is_off(key: str, value: Any) -> bool:
    """Return whether the value of a refused key turns it off."""
    converted = key.split(".")[0] in CONVERTED
    if isinstance(value, dict):
        enabled = value.get("enabled", key not in OFF_BY_DEFAULT)
        return not value or (as_boolean(enabled) if converted else enabled) in (None, False)
    neutral = NEUTRAL.get(key, ())
    is_number = any(type(wanted) in (int, float) for wanted in neutral)
    if converted:
        value = as_integer(value) if is_number else as_boolean(value)
    if isinstance(value, str):
        value = value.lower()  # as DeepSpeed does
    if value is None or any(_same(value, wanted) for wanted in neutral):
        return True
    if key in OFF_BY_FALSE_ONLY:
        return False
    return value is False or (_same(value, 0) and not is_number)


def _same(value: Any, wanted: Any) -> bool:
    """Return whether two values are equal, where true isn't 1 unless true is wanted."""
    return bool(value == wanted) and (isinstance(wanted, bool) or not isinstance(value, bool))


def _autos(values: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Yield a problem for each value left to a trainer to fill in."""
    for name, value in values.items():
        key = f"{within}{name}"
        if isinstance(value, Mapping):
            yield from _autos(value, f"{key}.")
        elif value == "auto" and not (within.startswith("parallel.") or key == "checkpoint.files"):
            yield (
                f'{key} is "auto", which only Hugging Face\'s Trainer fills in; '
                "give a value, or leave the key out for its default"
            )
