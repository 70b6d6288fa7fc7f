"""The names of DeepSpeed: where each is defined here, or why it isn't.

`PROVIDED` maps DeepSpeed's modules to their names, and each name to the module that defines it, with the name
there after a colon if it is another one. `REFUSED` has full names of modules and of what is in them; the
reason says what to use instead. An empty module with a reason is there for the reasons of what is in it.
"""

from __future__ import annotations

VERSION = "0.19.6"
"""The release of DeepSpeed whose names these are."""

_HERE = "uni3d.deepspeed"


def _names(home: str, text: str) -> dict[str, str]:
    return dict.fromkeys(text.split(), home)


_TRAINING = _names(f"{_HERE}.training", "initialize init_distributed add_config_arguments tp_model_init")
_ENGINE = {"DeepSpeedEngine": "uni3d.engine.engine:Engine"}
_PIPELINE = {
    **_names("uni3d.pipe", "PipelineModule LayerSpec TiedLayerSpec"),
    "PipelineEngine": f"{_HERE}.engines",
}
_SCHEDULES = {
    **_names("uni3d.optim.schedule_classes", "WarmupLR WarmupDecayLR WarmupCosineLR OneCycle LRRangeTest"),
    **_names(f"{_HERE}.schedules", "VALID_LR_SCHEDULES add_tuning_arguments get_config_from_args"),
    **_names(
        f"{_HERE}.constants",
        "LR_SCHEDULE LR_RANGE_TEST ONE_CYCLE WARMUP_LR WARMUP_DECAY_LR WARMUP_COSINE_LR LR_RANGE_TEST_MIN_LR "
        "LR_RANGE_TEST_STEP_RATE LR_RANGE_TEST_STEP_SIZE LR_RANGE_TEST_STAIRCASE CYCLE_FIRST_STEP_SIZE "
        "CYCLE_FIRST_STAIR_COUNT CYCLE_SECOND_STEP_SIZE CYCLE_SECOND_STAIR_COUNT DECAY_STEP_SIZE "
        "CYCLE_MIN_LR CYCLE_MAX_LR DECAY_LR_RATE CYCLE_MIN_MOM CYCLE_MAX_MOM DECAY_MOM_RATE "
        "WARMUP_MIN_LR WARMUP_MAX_LR "
        "WARMUP_NUM_STEPS WARMUP_TYPE WARMUP_LOG_RATE WARMUP_LINEAR_RATE WARMUP_MIN_RATIO COS_MIN_RATIO "
        "TOTAL_NUM_STEPS",
    ),
}
_GATHERING = {
    **_names(f"{_HERE}.gathering", "Init GatheredParameters MiCS_Init register_external_parameter"),
    **_names(f"{_HERE}.gathering", "unregister_external_parameter"),
    **_names(f"{_HERE}.engines", "ZeroParamStatus unwrap_model_for_generation"),
}
_PARTITION = {
    **_GATHERING,
    **_names(f"{_HERE}.helpers", "zero_wrapper_for_fp_tensor_constructor _orig_torch_arange"),
    "get_accelerator": f"{_HERE}.devices",
}
_FRAGMENTS = _names(
    f"{_HERE}.fragments",
    "safe_get_full_fp32_param safe_set_full_fp32_param safe_get_full_optimizer_state "
    "safe_set_full_optimizer_state safe_get_full_grad safe_set_full_grad safe_update_full_grad_vectorized "
    "safe_get_local_fp32_param safe_set_local_fp32_param safe_get_local_optimizer_state "
    "safe_set_local_optimizer_state safe_get_local_grad safe_set_local_grad",
)
_LEAVES = _names(
    f"{_HERE}.leaf_modules",
    "set_z3_leaf_modules unset_z3_leaf_modules get_z3_leaf_modules z3_leaf_module set_z3_leaf_module "
    "set_z3_leaf_modules_by_name set_z3_leaf_modules_by_suffix",
)
_LOG = _names(
    f"{_HERE}.log", "logger log_dist log_dist_once print_dist warning_once set_log_level_from_string"
)
_GROUPS = {
    **_names(
        f"{_HERE}.parallel_groups",
        "get_data_parallel_group get_data_parallel_world_size get_data_parallel_rank "
        "get_tensor_model_parallel_group get_tensor_model_parallel_world_size "
        "get_tensor_model_parallel_rank get_tensor_model_parallel_src_rank",
    ),
    **{
        f"{private}get_{old}": f"{_HERE}.parallel_groups:get_{name}"
        for private in ("", "_")
        for old, name in {
            "data_parallel_group": "data_parallel_group",
            "data_parallel_world_size": "data_parallel_world_size",
            "data_parallel_rank": "data_parallel_rank",
            "model_parallel_group": "tensor_model_parallel_group",
            "model_parallel_world_size": "tensor_model_parallel_world_size",
            "model_parallel_rank": "tensor_model_parallel_rank",
        }.items()
    },
}
_COMM = {
    **_names(
        "torch.distributed",
        "is_initialized is_available get_rank get_world_size barrier monitored_barrier broadcast "
        "broadcast_object_list all_reduce reduce reduce_scatter all_gather all_gather_object all_to_all "
        "all_to_all_single gather scatter send recv isend irecv destroy_process_group ReduceOp "
        "ProcessGroup gather_object scatter_object_list",
    ),
    **_names(
        f"{_HERE}.collectives",
        "get_local_rank new_group get_world_group get_global_rank get_all_ranks_from_group "
        "all_gather_into_tensor allgather_fn reduce_scatter_tensor reduce_scatter_fn inference_all_reduce "
        "has_all_gather_into_tensor has_reduce_scatter_tensor initialize_mesh_device "
        "get_local_rank_from_launcher get_world_rank_from_launcher get_world_size_from_launcher",
    ),
    "init_distributed": f"{_HERE}.training",
}
_ACCELERATOR = _names(f"{_HERE}.devices", "get_accelerator is_current_accelerator_supported")
_RECOMPUTE = _names(f"{_HERE}.recompute", "configure checkpoint is_configured reset non_reentrant_checkpoint")
_FUSED_ADAM = {"FusedAdam": "uni3d.optim.adam"}
_ADAM = {**_FUSED_ADAM, "DeepSpeedCPUAdam": f"{_HERE}.optimizers"}
_LION = _names(f"{_HERE}.optimizers", "FusedLion DeepSpeedCPULion")
_ADAGRAD = _names(f"{_HERE}.optimizers", "DeepSpeedCPUAdagrad")
_CLONE = {"clone_tensors_for_torch_save": "uni3d.recovery"}
_ZERO_TO_FP32 = _names(
    "uni3d.recovery",
    "get_fp32_state_dict_from_zero_checkpoint load_state_dict_from_zero_checkpoint "
    "convert_zero_checkpoint_to_fp32_state_dict",
)
_LOADER = {"RepeatingLoader": "uni3d.engine.data_loader"}
_CONFIGS = {
    "DeepSpeedConfig": f"{_HERE}.config_values",
    "DeepSpeedConfigError": "uni3d.config:ConfigError",
}
_OPTIMIZER_NAMES = _names(
    f"{_HERE}.constants",
    "ADAGRAD_OPTIMIZER ADAM_OPTIMIZER ADAMW_OPTIMIZER LION_OPTIMIZER MUON_OPTIMIZER",
)
_BUILDERS = _names(
    f"{_HERE}.op_builders",
    "CPUAdamBuilder CPUAdagradBuilder CPULionBuilder FusedAdamBuilder FusedLionBuilder AsyncIOBuilder "
    "FPQuantizerBuilder FusedLambBuilder QuantizerBuilder",
)
_GRIDS = _names(
    f"{_HERE}.process_topology", "ProcessTopology PipeDataParallelTopology PipeModelDataParallelTopology"
)

PROVIDED: dict[str, dict[str, str]] = {
    "": {
        **_TRAINING,
        **_ENGINE,
        **_PIPELINE,
        **_CONFIGS,
        **_names(f"{_HERE}.helpers", "OnDevice"),
        **_names(f"{_HERE}.log", "logger log_dist"),
        "add_tuning_arguments": f"{_HERE}.schedules",
        "get_accelerator": f"{_HERE}.devices",
        "install": f"{_HERE}.modules",
    },
    "accelerator": _ACCELERATOR,
    "accelerator.real_accelerator": _ACCELERATOR,
    "checkpoint": _CLONE,
    "checkpoint.utils": _CLONE,
    "checkpointing": _RECOMPUTE,
    "comm": _COMM,
    "comm.comm": _COMM,
    "git_version_info": _names(f"{_HERE}.op_builders", "torch_info compatible_ops installed_ops")
    | _names(f"{_HERE}.constants", "git_hash git_branch"),
    "moe.utils": _names(
        f"{_HERE}.no_experts",
        "has_moe_layers is_moe_param is_moe_param_group split_params_into_different_moe_groups_for_optimizer",
    ),
    "ops": {"__compatible_ops__": f"{_HERE}.op_builders:compatible_ops"},
    "ops.aio": {"AsyncIOBuilder": f"{_HERE}.op_builders"},
    "ops.op_builder": _BUILDERS,
    "ops.adagrad": _ADAGRAD,
    "ops.adam": _ADAM,
    "ops.adam.cpu_adam": {"DeepSpeedCPUAdam": f"{_HERE}.optimizers"},
    "ops.adam.fused_adam": _FUSED_ADAM,
    "ops.lion": _LION,
    "pipe": {**_PIPELINE, **_GRIDS},
    "runtime": {},
    "runtime.activation_checkpointing": {},
    "runtime.activation_checkpointing.checkpointing": _RECOMPUTE,
    "runtime.config": {**_CONFIGS, **_OPTIMIZER_NAMES},
    "runtime.dataloader": _LOADER,
    "runtime.engine": _ENGINE,
    "runtime.lr_schedules": _SCHEDULES,
    "runtime.pipe": {**_PIPELINE, **_GRIDS},
    "runtime.pipe.engine": {"PipelineEngine": f"{_HERE}.engines"},
    "runtime.pipe.module": _names("uni3d.pipe", "PipelineModule LayerSpec TiedLayerSpec"),
    "runtime.pipe.topology": _GRIDS,
    "runtime.precision_config": {
        "DeepSpeedFP16Config": "uni3d.config.sections:FP16Config",
        "DeepSpeedBF16Config": "uni3d.config.sections:BF16Config",
        **_names(f"{_HERE}.config_values", "get_bfloat16_config get_float16_config"),
    },
    "runtime.swap_tensor": {"MIN_SWAPPABLE_BYTES": f"{_HERE}.constants"},
    "runtime.utils": _names(
        f"{_HERE}.helpers",
        "see_memory_usage memory_status clip_grad_norm_ set_random_seed move_to_device "
        "ensure_directory_exists noop_context partition_uniform partition_balanced prefix_sum_inc "
        "call_to_str",
    ),
    "runtime.zero": _GATHERING,
    "runtime.zero.config": {
        "DeepSpeedZeroConfig": f"{_HERE}.config_values",
        "DeepSpeedZeroOffloadOptimizerConfig": "uni3d.config.sections:OffloadConfig",
        "DeepSpeedZeroOffloadParamConfig": "uni3d.config.sections:OffloadConfig",
        "ZeroStageEnum": f"{_HERE}.constants",
    },
    "runtime.zero.leaf_module_config": _names(
        f"{_HERE}.constants",
        "DEFAULT_LEAF_MODULE_CLASSES DEFAULT_LEAF_MODULE_NAMES DEFAULT_LEAF_MODULE_NAME_SUFFIXES",
    ),
    "runtime.zero.offload_config": _names(f"{_HERE}.constants", "OffloadDeviceEnum OffloadStateTypeEnum"),
    "runtime.zero.partition_parameters": _PARTITION,
    "runtime.zero.stage3": {},
    "runtime.zero.stage_1_and_2": {},
    "runtime.zero.utils": {"ZeRORuntimeException": f"{_HERE}.stand_ins"},
    "utils": {
        **_FRAGMENTS,
        **_LEAVES,
        **_LOADER,
        **_GROUPS,
        **_names(f"{_HERE}.helpers", "OnDevice instrument_w_nvtx"),
        **_names(f"{_HERE}.log", "logger log_dist log_dist_once set_log_level_from_string"),
    },
    "utils.groups": _GROUPS,
    "utils.init_on_device": {"OnDevice": f"{_HERE}.helpers"},
    "utils.logging": _LOG,
    "utils.nvtx": {"instrument_w_nvtx": f"{_HERE}.helpers"},
    "utils.tensor_fragment": _FRAGMENTS,
    "utils.torch": {"required_torch_version": f"{_HERE}.helpers"},
    "utils.z3_leaf_module": _LEAVES,
    "utils.zero_to_fp32": _ZERO_TO_FP32,
    "zero": _GATHERING,
}

STAND_INS: dict[str, list[str]] = {
    "checkpoint.utils": ["get_model_ckpt_name_for_rank"],
    "moe.layer": ["MoE"],
    "monitor.config": ["DeepSpeedMonitorConfig"],
    "runtime.base_optimizer": ["ZeROOptimizer", "DeepSpeedOptimizer"],
    "runtime.bf16_optimizer": ["BF16_Optimizer"],
    "runtime.checkpoint_engine.torch_checkpoint_engine": ["TorchCheckpointEngine"],
    "runtime.config_utils": ["DeepSpeedConfigModel"],
    "runtime.fp16.fused_optimizer": ["FP16_Optimizer"],
    "runtime.fp16.unfused_optimizer": ["FP16_UnfusedOptimizer"],
    "runtime.pipe.topology": ["PipelineParallelGrid"],
    "runtime.utils": ["PartitionedTensor"],
    "runtime.zero.linear": ["LinearModuleForZeroStage3"],
    "runtime.zero.partition_parameters": ["MultipleAllGatherHandles", "partitioned_param_data_shape"],
    "runtime.zero.stage3": ["DeepSpeedZeroOptimizer_Stage3"],
    "runtime.zero.stage_1_and_2": ["DeepSpeedZeroOptimizer"],
}
"""Classes that programs import to ask whether something is one of theirs. Making one raises an error."""

for _module in STAND_INS:
    for _length in range(_module.count(".") + 1):
        PROVIDED.setdefault(_module.rsplit(".", _length)[0], {})

_INFERENCE = (
    "uni3d trains; export the weights by uni3d export --format hf, and serve them by vLLM or the like"
)
_GENERATE = "call engine.module.generate(...): layers are gathered as they run"
_EXPERTS = "expert parallelism isn't supported; experts are sharded by ZeRO and split by the model's tp_plan"
_TOPOLOGY = "engine.grid has the places and groups of the ranks"
_TRUST = "its layer-wise norms aren't implemented for sharded layers; use FusedAdam"
_ONE_BIT = "it needs DeepSpeed's compressed communication; use communication_data_type to halve traffic"
_LAUNCH = "start the processes with torchrun"
_PLAN = "use uni3d plan, which estimates memory for any topology"
_KERNELS = "DeepSpeed's kernels aren't part of uni3d; use torch.nn, whose attention is fused"
_CONFIG = "use uni3d.config.load_config, which reads the same file"
_CHECKPOINTS = "every checkpoint loads at any topology; uni3d import reads those of DeepSpeed"
_IN_MEMORY = "parameters and states stay in memory; offload_optimizer with device cpu is supported"
_ESTIMATE = "estimate_zero{}_model_states_mem_needs_all_{}"

REFUSED: dict[str, str] = {
    "init_inference": _INFERENCE,
    "InferenceEngine": _INFERENCE,
    "DeepSpeedInferenceConfig": _INFERENCE,
    "default_inference_config": _INFERENCE,
    "inference": _INFERENCE,
    "module_inject": _INFERENCE,
    "model_implementations": _INFERENCE,
    "replace_transformer_layer": _INFERENCE,
    "revert_transformer_layer": _INFERENCE,
    "moe": _EXPERTS,
    "sequence": "use parallel.sequence_parallel, which uses the tensor-parallel ranks",
    "runtime.sequence_parallel": "use parallel.sequence_parallel, which uses the tensor-parallel ranks",
    "DeepSpeedHybridEngine": _GENERATE,
    "runtime.hybrid_engine": _GENERATE,
    "runtime.config_utils": _CONFIG,
    "DeepSpeedOptimizer": "optimizers are torch's own: use torch.optim.Optimizer",
    "ZeROOptimizer": "optimizers are torch's own: use torch.optim.Optimizer",
    "runtime.base_optimizer": "optimizers are torch's own: use torch.optim.Optimizer",
    "runtime.bf16_optimizer": "optimizers are torch's own, over fp32 parameters",
    "runtime.precision_config": _CONFIG,
    "runtime.fp16": f"engine.scaler is the loss scale; 1-bit optimizers aren't supported: {_ONE_BIT}",
    "DeepSpeedDataLoader": "use training_data of initialize, or engine.loader(dataset)",
    "runtime.dataloader.DeepSpeedDataLoader": "use training_data of initialize, or engine.loader(dataset)",
    "DeepSpeedTransformerLayer": _KERNELS,
    "DeepSpeedTransformerConfig": _KERNELS,
    "ops.transformer": _KERNELS,
    "ops.sparse_attention": _KERNELS,
    "ops.fp_quantizer": _KERNELS,
    "ops.op_builder": "there are no extensions to build",
    "ops.aio": _IN_MEMORY,
    "nvme": _IN_MEMORY,
    "ops.lamb": _TRUST,
    "ops.adam.ZenFlowCPUAdam": "optimizer steps aren't split or delayed; use DeepSpeedCPUAdam",
    "runtime.comm": _ONE_BIT,
    "runtime.compression": _ONE_BIT,
    "compression": "compressed and quantized training isn't supported",
    "launcher": _LAUNCH,
    "elasticity": "any checkpoint resumes on any topology; set train_batch_size to keep the global batch",
    "autotuning": _PLAN,
    "monitor": "set tensorboard, wandb, comet or csv_monitor in the config",
    "profiling": "set flops_profiler in the config, or use torch.profiler",
    "runtime.pipe.topology": _TOPOLOGY,
    "checkpoint.DeepSpeedCheckpoint": _CHECKPOINTS,
    "checkpoint.ds_to_universal": _CHECKPOINTS,
    "checkpoint.universal_checkpoint": _CHECKPOINTS,
    "checkpoint.utils.get_model_ckpt_name_for_rank": _CHECKPOINTS,
    "runtime.checkpoint_engine": _CHECKPOINTS,
    "runtime.swap_tensor": _IN_MEMORY,
    "runtime.zero.linear": "layers are torch's own: use nn.Linear",
    "runtime.zero.stage_1_and_2": "ZeRO stages are settings of one mechanism; set zero_optimization.stage",
    "runtime.zero.stage3": "ZeRO stages are settings of one mechanism; set zero_optimization.stage",
    "runtime.zero.config": _CONFIG,
    "runtime.zero.partition_parameters.MultipleAllGatherHandles": "use zero.GatheredParameters",
    "runtime.zero.partition_parameters.partitioned_param_data_shape": "use zero.GatheredParameters",
    "runtime.utils.PartitionedTensor": "use torch.distributed.tensor.DTensor",
    "zero.TiledLinear": "split the layer, or use tensor parallelism: parallel.tp in the config",
    **{
        f"{module}.{_ESTIMATE.format(stages, when)}": _PLAN
        for module, stages in (("runtime.zero.stage_1_and_2", "2"), ("runtime.zero.stage3", "3"))
        for when in ("live", "cold")
    },
    "utils.timer": "set wall_clock_breakdown in the config",
    "comm.configure": "use torch.profiler, which records collectives",
    "comm.log_summary": "use torch.profiler, which records collectives",
    "accelerator.set_accelerator": "set parallel.device in the config",
    "checkpointing.get_cuda_rng_tracker": "dropout draws from the seed, the step and the rank; leave it out",
    "checkpointing.model_parallel_cuda_manual_seed": "set seed in the config; dropout draws from it",
    "checkpointing.CheckpointFunction": "use deepspeed.checkpointing.checkpoint",
    "git_version_info": "deepspeed.__version__ names the release",
    "linear": "LoRA is up to the model, such as peft's",
    "compile": "set compile in the config; layers are compiled by torch.compile",
    "runtime.compiler": "set compile in the config; layers are compiled by torch.compile",
    "runtime.data_pipeline": "order and curricula of samples are up to the dataset",
    "runtime.domino": "overlap is left to DTensor; set parallel.tp in the config",
    "domino": "overlap is left to DTensor; set parallel.tp in the config",
    "env_report": "use python -m torch.utils.collect_env",
}
