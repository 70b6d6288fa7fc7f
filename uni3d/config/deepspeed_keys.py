"""DeepSpeed's keys that aren't keys of ours: refused with the reason, or named as having no meaning here.

A key is *refused* if leaving it out would lose what the user asked for. It has *no meaning* if it tunes a
mechanism of DeepSpeed's that isn't here, and training computes the same without it: it is accepted, so that
a file can stay as it is, and named in one line when training begins and by `uni3d config`. A few say in
DeepSpeed's words what our keys say too: they are *read as* those. The names are those of DeepSpeed 0.19.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_LATER = "not supported in this release"
_OTHER_DATA = "it changes which samples a step sees; choose them in training_data"
_INSIDE = "it replaces parts of the model; do that before initialize"
_BY_LAYER = "gradients and parameters move layer by layer (fully_shard), at every ZeRO stage"
_QUANTIZED = "what is sent isn't quantized; communication_data_type halves what gradients take"
_NO_DISK = "nothing is offloaded to disks"

REFUSED: dict[str, str] = {
    # Observation
    "comet": "write to it from the script, with what train_batch returns",
    "memory_breakdown": "the line of steps_per_print has a GPU's peak memory",
    "dump_state": "uni3d config prints the resolved config",
    "comms_logger": "use torch.profiler, which records collectives",
    "autotuning": "it is a search over runs; uni3d plan estimates before one",
    "eigenvalue": "it belongs to DeepSpeed's quantization schedules, which aren't here",
    # Precision
    "amp": "apex isn't used; write bf16 or fp16",
    "torch_autocast": "layers compute in one type; write bf16 or fp16",
    "fp16.fp16_master_weights_and_grads": "parameters and their states are always fp32",
    "bf16.bf16_master_weights_and_grads": "parameters and their states are always fp32",
    "bf16.bf16_optimizer_states": "parameters and their states are always fp32",
    "bf16.check_grad_overflow": "a gradient that isn't finite is always noticed",
    "data_types.param_dtype": "parameters are always fp32, and computed with in fp16's or bf16's type",
    "data_types.buffer_dtype": "buffers keep the type that the model gives them",
    # Gradients, batches
    "gradient_allreduce_op": "the loss is the mean over the global batch, so gradients are too",
    "sparse_gradients": "gradients are reduced as dense ones",
    "managed_gradient_accumulation": "the engine ends a step after gradient_accumulation_steps micro batches",
    "dataloader_drop_last": "nothing is dropped: global batches go on from one epoch into the next",
    "elasticity": "any checkpoint resumes on any topology with the same train_batch_size; write that",
    # How work is split
    "sequence_parallel_size": "write parallel.sequence_parallel, which splits the sequence over tp's ranks",
    "data_parallel_size": 'write "parallel": {"dp": ...}',
    "expert_parallel": "experts aren't split over ranks",
    "use_data_before_expert_parallelism": "experts aren't split over ranks",
    "tensor_parallel.tp_size": 'write "parallel": {"tp": ...}',
    "tensor_parallel.tp": 'write "parallel": {"tp": ...}',
    "tensor_parallel.tensor_parallel": 'write "parallel": {"tp": ...}',
    "tensor_parallel.partition_config": "a model says by its tp_plan how it is split",
    "tensor_parallel.preset_model": "a model says by its tp_plan how it is split",
    "tensor_parallel.injection_policy_tuple": "a model says by its tp_plan how it is split",
    "tensor_parallel.replace_with_kernel_inject": _INSIDE,
    "tensor_parallel.kernel_inject": _INSIDE,
    "pipeline.stages": 'write "parallel": {"pp": ...}',
    "pipeline.partition": "write parallel.balance",
    "pipeline.seed_layers": "each parameter has a seed of its own already, by its name",
    "pipeline.activation_checkpoint_interval": 'write activation_checkpointing\'s mode "full" and every',
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zeropp_loco_param": _QUANTIZED,
    "zero_optimization.zenflow": "the whole optimizer step is taken at once",
    "zero_optimization.ignore_unused_parameters": "a parameter that got no gradient is never an error",
    "zero_optimization.offload_optimizer.ratio": "all of the optimizer's states are offloaded, or none",
    "zero_optimization.offload_optimizer.super_offload": "it needs kernels that aren't here",
    # Memory
    "activation_checkpointing.partition_activations": "what is kept isn't split over tp's ranks; "
    "parallel.sequence_parallel does that for what lies between layers",
    "activation_checkpointing.cpu_checkpointing": "what is kept stays on the GPU; use mode",
    "activation_checkpointing.contiguous_memory_optimization": "torch's allocator does that; use mode",
    "activation_checkpointing.number_checkpoints": "use every: of how many layers one is recomputed",
    "activation_checkpointing.synchronize_checkpoint_boundary": "no device waits for the host; use mode",
    "activation_checkpointing.profile": "use torch.profiler",
    "compile.deepcompile": "torch.compile compiles each layer; write enabled",
    "graph_harvesting": 'CUDA graphs are torch.compile\'s: "compile": {"mode": "reduce-overhead"}',
    # Checkpoints
    "checkpoint.use_node_local_storage": "a checkpoint lies in one place that all ranks see",
    "nebula": "checkpoints are written in the background already",
    "datastates_ckpt": "checkpoints are written in the background already",
    # What is trained, on what
    "sparse_attention": "attention is the model's own",
    "progressive_layer_drop": "which layers are computed is the model's own",
    "curriculum_learning": _OTHER_DATA,
    "data_efficiency": _OTHER_DATA,
    "compression_training": _INSIDE,
    "quantize_training": _INSIDE,
    "weight_quantization": _INSIDE,
    "hybrid_engine": "there is no inference engine",
}
"""Keys that are refused unless their value says that they are off, and why."""

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
"""Values with which such a key says what holds anyway. null, false and an `enabled` false do for all."""

OFF_BY_FALSE_ONLY = {
    "bf16.check_grad_overflow",
    "managed_gradient_accumulation",
    "zero_optimization.ignore_unused_parameters",
}
"""Keys whose false asks for something."""


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
    **_zero("no module is changed for ZeRO", "memory_efficient_linear", "override_module_apply"),
    **_zero("the momentum is a state like any other", "save_muon_momentum_buffer_in_memory"),
    **_zero(
        "save_16bit_model always gathers",
        "stage3_gather_16bit_weights_on_model_save",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
    ),
    **_zero(
        "every checkpoint loads at any topology, each rank its own parts in fp32",
        *("load_from_fp32_weights", "elastic_checkpoint", "pipeline_loading_checkpoint"),
    ),
    **_zero("offloaded memory is pinned wherever there is a GPU", "cpu_offload_use_pin_memory"),
    **_zero(
        "offloaded memory is pinned wherever there is a GPU",
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
    **_zero("torch uses the threads that OMP_NUM_THREADS says", "offload_optimizer.cpuadam_cores_perc"),
    "aio": _NO_DISK,
    "zero_allow_untested_optimizer": "optimizers that can't train sharded parameters are refused by name",
    "zero_force_ds_cpu_optimizer": "torch's optimizers step where their parameters lie",
    "prescale_gradients": "gradients are summed in communication_data_type, then divided once",
    "gradient_predivide_factor": "gradients are summed in communication_data_type, then divided once",
    "disable_allgather": _BY_LAYER,
    "seq_parallel_communication_data_type": "there is no Ulysses sequence parallelism",
    "vocabulary_size": "it only checks an alignment",
    "log_level": "set Python's own logging",
    "timers": "throughput timers aren't here",
    "optimizer.legacy_fusion": "optimizers are torch's",
    "fp16.auto_cast": "floating-point inputs are always cast",
    "bf16.immediate_grad_update": "gradients are accumulated as data_types.grad_accum_dtype says",
    "tensor_parallel.tp_overlap_comm": "DTensor overlaps where it can",
    "tensor_parallel.tp_grain_size": "sizes are split evenly",
    "tensor_parallel.dtype": "bf16 and fp16 say in which type is computed",
    "tensor_parallel.keep_module_on_host": "each rank keeps its own parts only",
    "pipeline.pipe_partitioned": "activations are sent whole between stages",
    "pipeline.grad_partitioned": "activations are sent whole between stages",
    "pipeline.use_reentrant": "recomputation never is",
    "checkpoint.load_universal": "every checkpoint is universal",
    "checkpoint.tag_validation": "ranks that are given different tags are an error",
    "checkpoint.parallel_write": "all ranks write, each its part",
    "checkpoint.writer": "all ranks write, each its part",
    "checkpoint.checkpoint_serialization": "nothing is pickled",
    **{
        f"compile.{key}": "it is DeepCompile's"
        for key in (
            *("free_activation", "free_activation_threshold", "offload_activation", "passes", "debug_log"),
            *("offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory"),
            *("offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather"),
            *("sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors"),
        )
    },
}
"""Keys that are accepted with any value, and why they change nothing."""

READ_AS: dict[str, str] = {
    "bfloat16": "bf16",
    "tensor_parallel.autotp_size": "parallel.tp",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
}
"""Keys that are read as one of ours."""


class Sifted(NamedTuple):
    """A config without the keys above."""

    values: dict[str, Any]
    problems: list[str]
    """What is refused."""
    without_meaning: dict[str, str]
    """The keys that were given and change nothing, with the reason."""


def by_reason(keys: Mapping[str, str]) -> dict[str, list[str]]:
    """The keys that share a reason, in order."""
    grouped: dict[str, list[str]] = {}
    for key, reason in keys.items():
        grouped.setdefault(reason, []).append(key)
    return grouped


def sift(values: Mapping[str, Any]) -> Sifted:
    """Take DeepSpeed's keys that aren't ours out of a config; `values` itself stays as it is."""
    left = copy.deepcopy(dict(values))
    problems: list[str] = []
    without_meaning: dict[str, str] = {}
    if isinstance(left.get("zero_optimization"), bool):
        problems.append(
            f"zero_optimization is {left.pop('zero_optimization')!r}, the old form; "
            'write {"stage": 0}, or 1, 2 or 3'
        )
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
    for section in ("tensor_parallel", "pipeline"):  # all of their known keys have been taken
        if left.get(section) == {}:
            del left[section]
    problems += _autos(left)
    return Sifted(left, problems, without_meaning)


def _take(values: dict[str, Any], key: str) -> Iterator[Any]:
    """Remove a key, if it is there, and give its value."""
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if not isinstance(inner, dict):
            return
        values = inner
    if last in values:
        yield values.pop(last)


def _put(values: dict[str, Any], key: str, value: Any, target: str) -> list[str]:
    """Set the key that `key` is read as."""
    if key.startswith("zero_optimization.cpu_offload"):
        if not isinstance(value, bool):
            return [f"{key} is {value!r}: expected true or false"]
        value = {"device": "cpu" if value else "none"}
    if key == "tensor_parallel.autotp_size" and value in (0, 1):  # then it is off
        return []
    *sections, last = target.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            return []  # which is an error of its own
    if last in values and values[last] != value:
        return [f"{key} is {value!r}, but {target}, which is the same, is {values[last]!r}; give one"]
    values[last] = value
    return []


def _is_off(key: str, value: Any) -> bool:
    """Whether a refused key's value asks for nothing."""
    if any(value == neutral and type(value) is type(neutral) for neutral in NEUTRAL.get(key, ())):
        return True
    if isinstance(value, dict):
        return not value or value.get("enabled", True) is False
    return value is None or (value is False and key not in OFF_BY_FALSE_ONLY)


def _autos(values: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The values that are left for a trainer to fill in."""
    for name, value in values.items():
        key = f"{within}{name}"
        if isinstance(value, Mapping):
            yield from _autos(value, f"{key}.")
        elif value == "auto" and not within.startswith("parallel."):
            yield (
                f'{key} is "auto", which Hugging Face\'s Trainer fills in before training; '
                "write a value, or leave the key out for its default"
            )
