"""DeepSpeed's keys that uni3d doesn't have (as of DeepSpeed 0.19).

A key is *refused*, with the reason, if training without it would compute other numbers, or lose something
that the user asked for. It has *no effect* if it tunes a mechanism that doesn't exist here and training
computes the same without it: it is accepted, so that existing files work, and reported in one line when
training begins and by `uni3d config`. Some are other names for our keys: they are *read as* those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OTHER_DATA = "it changes the samples of a step; delete it, and select them in training_data"
_INSIDE = "it replaces modules of the model; delete it, and do so before initialize"
_BY_LAYER = "fully_shard communicates gradients and parameters layer by layer, at every ZeRO stage"
_QUANTIZED = (
    "communication isn't quantized; delete it, or use communication_data_type to halve gradient traffic"
)
_NO_DISK = "offloading to disk isn't supported"
_FP32 = "parameters and their states are always fp32; delete it"
_RECOMPUTED = "recomputation is set by activation_checkpointing's mode and every"
_PINNED = "offloaded memory is always pinned if there is a GPU"
_SCALED = "bf16 needs no loss scale"

REFUSED: dict[str, str] = {
    # Observation
    "comet": "delete it, and log from your script, with the return value of train_batch",
    # Precision
    "amp": "apex isn't supported; use bf16 or fp16",
    "torch_autocast": "layers compute in a single type; use bf16 or fp16",
    "fp16.fp16_master_weights_and_grads": _FP32,
    "bf16.bf16_master_weights_and_grads": _FP32,
    "bf16.bf16_optimizer_states": _FP32,
    "data_types.param_dtype": "parameters are always fp32; use bf16 or fp16 for the type of computation",
    "data_types.buffer_dtype": "buffers keep the model's type; delete it",
    # Gradients, batches
    "gradient_allreduce_op": "gradients are always those of the mean loss over the global batch; delete it, "
    "and scale the loss",
    "managed_gradient_accumulation": "the engine always counts gradient_accumulation_steps itself; delete it",
    "elasticity": "any checkpoint resumes on any topology; delete it, and set train_batch_size to keep the "
    "global batch",
    # How work is split
    "sequence_parallel_size": "use parallel.sequence_parallel, which uses the tensor-parallel ranks",
    "data_parallel_size": 'use "parallel": {"dp": ...}',
    "expert_parallel": "expert parallelism isn't supported; delete it",
    "use_data_before_expert_parallelism": "expert parallelism isn't supported; delete it",
    "tensor_parallel.tp_size": 'use "parallel": {"tp": ...}',
    "tensor_parallel.tp": 'use "parallel": {"tp": ...}',
    "tensor_parallel.tensor_parallel": 'use "parallel": {"tp": ...}',
    "tensor_parallel.partition_config": "a model is sharded according to its own tp_plan; delete it",
    "tensor_parallel.preset_model": "a model is sharded according to its own tp_plan; delete it",
    "tensor_parallel.injection_policy_tuple": "a model is sharded according to its own tp_plan; delete it",
    "tensor_parallel.replace_with_kernel_inject": _INSIDE,
    "tensor_parallel.kernel_inject": _INSIDE,
    "zero_optimization.zero_quantized_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_optimization.zero_quantized_gradients": _QUANTIZED,
    "zero_optimization.zeropp_loco_param": _QUANTIZED,
    "zero_optimization.zenflow": "optimizer steps aren't split or delayed; delete it",
    # Checkpoints
    "checkpoint.use_node_local_storage": "checkpoints need storage shared by all ranks; delete it",
    "nebula": "checkpoints are already written in the background, to save_checkpoint's folder; delete it",
    # What is trained, on what
    "sparse_attention": "attention is up to the model; delete it",
    "progressive_layer_drop": "skipping layers is up to the model; delete it",
    "curriculum_learning": _OTHER_DATA,
    "data_efficiency": _OTHER_DATA,
    "compression_training": _INSIDE,
    "quantize_training": _INSIDE,
    "weight_quantization": _INSIDE,
    "hybrid_engine": "inference isn't supported; delete it",
}
"""Keys that are refused unless their value turns them off, with the reason."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bf16.check_grad_overflow": (True,),
    "gradient_allreduce_op": ("mean",),
    "managed_gradient_accumulation": (True,),
    "sequence_parallel_size": (1,),
    "tensor_parallel.tp_size": (1,),
    "pipeline.partition": ("best",),
    "zero_optimization.ignore_unused_parameters": (True,),
    "zero_optimization.offload_optimizer.ratio": (1, 1.0),
}
"""Values that ask for the default behavior. null, false and `enabled` false do too."""

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
    "compression_training",
}
"""Sections that DeepSpeed ignores unless they have `enabled` true."""

OFF_BY_FALSE_ONLY = {
    "bf16.check_grad_overflow",
    "managed_gradient_accumulation",
    "zero_optimization.ignore_unused_parameters",
    "compile.disable",
}
"""Keys for which `false` is a request, not a default."""


def _zero(reason: str, *keys: str) -> dict[str, str]:
    return {f"zero_optimization.{key}": reason for key in keys}


_TUNING: dict[str, str] = {
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
    **_zero(
        _PINNED, "cpu_offload_use_pin_memory", "offload_optimizer.pin_memory", "offload_param.pin_memory"
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
    **{
        f"bf16.{key}": _SCALED
        for key in (
            *("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
            *("consecutive_hysteresis", "min_loss_scale", "auto_cast"),
        )
    },
    "fp16.opt_level": "it belongs to apex",
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
"""Keys that tune a mechanism, with the reason why they have no effect."""

_REQUESTS: dict[str, str] = {
    # Observation
    "memory_breakdown": "the line printed by steps_per_print includes peak GPU memory",
    "dump_state": "uni3d config prints the resolved config",
    "comms_logger": "torch.profiler records collectives",
    "autotuning": "nothing searches by running; uni3d plan estimates",
    "eigenvalue": "it steers DeepSpeed's quantization schedules, which aren't supported",
    # Gradients
    "sparse_gradients": "gradients are always reduced as dense tensors, with the same sums",
    "bf16.check_grad_overflow": "a gradient that isn't finite is always an error",
    **_zero("parameters without gradients are never an error", "ignore_unused_parameters"),
    # How work is split
    "pipeline.partition": "a PipelineModule has its own partition_method, other models parallel.balance",
    "pipeline.seed_layers": "each parameter is already seeded by its name",
    **_zero("what is offloaded is offloaded whole, and stepped on the CPU", "offload_optimizer.ratio"),
    **_zero(
        "what is offloaded is offloaded whole, and stepped on the CPU", "offload_optimizer.super_offload"
    ),
    # Memory
    **{
        f"activation_checkpointing.{key}": _RECOMPUTED
        for key in (
            *("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "profile"),
            *("number_checkpoints", "synchronize_checkpoint_boundary"),
        )
    },
    "compile.deepcompile": "layers are compiled by torch.compile, if compile.enabled is true",
    "compile.disable": "layers are compiled by torch.compile, if compile.enabled is true",
    "graph_harvesting": "CUDA graphs need parameters that stay where they are in memory; sharding moves them",
    # Checkpoints
    "datastates_ckpt": "checkpoints are already written in the background",
}
REQUESTS = frozenset(_REQUESTS)
"""Keys of `NO_MEANING` that ask for nothing if their value turns them off: then they aren't reported."""

NO_MEANING = _TUNING | _REQUESTS
"""Keys that are accepted but have no effect, with the reason; `CHOICES` says which can't have any value."""

CHOICES: dict[str, tuple[str, ...]] = {
    "checkpoint.tag_validation": ("Ignore", "Warn", "Fail"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "seq_parallel_communication_data_type": ("fp32", "bf16", "fp16"),
}
"""Values, in any case, that keys of `NO_MEANING` can have: DeepSpeed refuses others, as they are slips."""

READ_AS: dict[str, str] = {
    "bfloat16": "bf16",
    "num_workers": "num_local_io_workers",
    "tensor_parallel.autotp_size": "parallel.tp",
    "pipeline.stages": "parallel.pp",
    "pipeline.activation_checkpoint_interval": "activation_checkpointing.mode",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_params": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
}
"""Other names for keys of ours."""

OFFLOADED: dict[str, tuple[int, str]] = {
    "offload_param": (3, "parameters are sharded, and so can be offloaded, at ZeRO stage 3 only"),
    "offload_optimizer": (1, "ZeRO stage 0 shards nothing, and so offloads nothing"),
}
"""Targets of offloading, with the lowest ZeRO stage at which they offload, and the reason."""

ACCUMULATED = "gradients are accumulated in fp32, at ZeRO stages 0 and 1 in communication_data_type"
"""Why another `data_types.grad_accum_dtype` has no effect."""


def by_reason(keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Group keys by their reason, in order."""
    grouped: dict[str, list[str]] = {}
    for key, reason in keys.items():
        grouped.setdefault(reason, []).append(key)
    return grouped
