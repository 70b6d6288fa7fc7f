"""DeepSpeed's test files that are counted, and reasons why a test of theirs doesn't pass on uni3d.

Left out: `ops`, `inference`, `hybrid_engine`, `compile` and `v1/compile`, `v1/nvme` (kernels and CUDA),
`autotuning`, `compression`, `elasticity`, `launcher`, `linear`, `module_inject`, `sequence*`, `ulysses_alst`,
`v1/moe` and AutoTP (parts of DeepSpeed that uni3d refuses by name), `zenflow`, `onebit`, `rollout`.
"""

import re

COUNTED = {
    "runtime/test_data.py": 5,
    "runtime/test_ds_config_dict.py": 30,
    "runtime/test_ds_config_model.py": 9,
    "runtime/test_ds_initialize.py": 89,
    "runtime/test_lr_schedulers.py": 82,
    "runtime/test_multi_output_model.py": 2,
    "runtime/test_no_sync_ctxt.py": 25,
    "runtime/test_precision_config_dynamic_scale.py": 28,
    "runtime/test_precision_config_loss_scale.py": 10,
    "runtime/test_runtime_utils.py": 6,
    "runtime/test_autocast.py": 10,
    "runtime/utils/test_partition.py": 14,
    "runtime/pipe/test_pipe.py": 10,
    "runtime/pipe/test_topology.py": 9,
    "runtime/pipe/test_pipe_schedule.py": 17,
    "runtime/half_precision/test_dynamic_loss_scale.py": 6,
    "runtime/half_precision/test_zero_optim_overflow.py": 24,
    "runtime/activation_checkpointing/test_activation_checkpointing.py": 30,
    "runtime/activation_checkpointing/test_activation_checkpointing_non_reentrant.py": 49,
    "runtime/zero/test_ignore_unused_parameters.py": 2,
    "runtime/zero/test_unwrap_model.py": 2,
    "runtime/zero/test_zero_allreduce_fetch_params.py": 2,
    "runtime/zero/test_zero_config.py": 6,
    "runtime/zero/test_zero_context.py": 11,
    "runtime/zero/test_zero_context_ancestry.py": 2,
    "runtime/zero/test_zero_context_return.py": 5,
    "runtime/zero/test_zero_dynamic_class.py": 2,
    "runtime/zero/test_zero_grad_clip.py": 4,
    "runtime/zero/test_zero_late_module_attach.py": 6,
    "runtime/zero/test_zero_leaf_module.py": 23,
    "runtime/zero/test_zero_nesting_init.py": 3,
    "runtime/zero/test_zero_tensor_fragment.py": 182,
    "checkpoint/test_convert_checkpoint.py": 1,
    "checkpoint/test_latest_checkpoint.py": 2,
    "checkpoint/test_lr_scheduler.py": 12,
    "checkpoint/test_mics_optimizer.py": 12,
    "checkpoint/test_other_optimizer.py": 3,
    "checkpoint/test_pipeline.py": 3,
    "checkpoint/test_reshape_checkpoint.py": 8,
    "checkpoint/test_shared_weights.py": 1,
    "checkpoint/test_sparse.py": 9,
    "checkpoint/test_tag_validation.py": 6,
    "checkpoint/test_zero_optimizer.py": 69,
    "comm/test_dist.py": 29,
    "pipe/test_pipe_module.py": 8,
    "monitor/test_monitor.py": 8,
    "utils/test_get_optim_files.py": 4,
    "utils/test_groups.py": 1,
    "utils/test_init_on_device.py": 2,
    "utils/test_partition_balanced.py": 1,
    "model_parallelism/test_configurable_parallel_mp.py": 3,
    "model_parallelism/test_configurable_parallel_pp.py": 7,
}


FURTHER = {
    "runtime/test_multiple_models.py": 150,
    "v1/half_precision/test_bf16.py": 28,
    "v1/half_precision/test_gradient_clipping_default.py": 7,
    "v1/half_precision/test_mixed_precision_dtype.py": 22,
    "v1/half_precision/test_with_autocast.py": 5,
    "v1/zero/test_zero.py": 99,
    "v1/zero/test_zero2_offload_multi_backward.py": 10,
    "v1/zero/test_zero_activation_checkpoint_lifecycle.py": 11,
    "v1/zero/test_zero_autocast.py": 24,
    "v1/zero/test_zero_cpu_offload_grad_accum.py": 1,
    "v1/zero/test_zero_functorch_linear.py": 7,
    "v1/zero/test_zero_torch_func.py": 19,
    "v1/zero/test_zero_user_backward.py": 192,
}
"""Files that `--further` runs instead: grids of the same settings, and DeepSpeed's newer tests of ZeRO."""

CUDA = [
    r"^Skipped: ",
    r"module 'torch.cpu'",
    r"Cannot access accelerator device",
    r"DistributedDataParallel device_ids",
]
"""Left out by DeepSpeed's own conditions on a CPU, or in need of a device's functions."""

REFUSED = [
    r"isn't part of uni3d: ",
    r"is refused: ",
    r"can't be nested",
    r"can't be called inside no_sync",
    r"no_sync\(\) needs whole gradients",
    r"over another optimizer",
    r"is in no list of layers",
    r"was saved by another run",
    r"asked to save different tags",
    r"is not valid JSON",
    r"give the config once",
    r"initialize needs a model",
    r"CheckpointError: the folder is ",
    r"holds no committed checkpoint",
    r"unknown key 'grandient",
    r"warmup_type is 'not_a",
    r"interval=\d+ isn't supported",
    r"must be a number",
    r"FloatingPointError: step",
    r"already called with this",
    r"is a plain tensor, but the parameter is sharded",
]
"""Refusals of uni3d, by their words. Some tests expect a refusal too, but of another type or wording."""

INSIDES = [
    r"isn't part of uni3d; ",
    r"has(n't| no) (an )?attribute",
    r"nor its \w+ has an attribute",
    r"DID NOT RAISE <class '(NotImplementedError|AssertionError|uni3d)",
    r"where False = isinstance\(",
    r"0-sized",
    r"DeepSpeedConfig is read-only",
    r"DeepSpeedZeroConfig|elastic checkpointing|prefetch_bucket_size",  # keys without effect are not kept
    r"aten.allclose.default Sharding",  # two sharded parameters, which are empty in DeepSpeed
]
"""Attributes and classes inside of DeepSpeed's engine, optimizers, schedules, and what they can't do."""

BY_HAND = {
    "TestClientLrScheduler": "insides",  # a schedule that is no LambdaLR
    "TestPipeModuleSequential": "insides",  # a PipelineModule is split by initialize, not by its constructor
    "TestNewClassDeclared": "insides",  # zero.Init shards nothing: initialize does
    "TestNestingInit": "insides",
    "TestReturnParam": "insides",
    "TestShutdownInNestingInit": "insides",
    "TestNestedParallelInit": "insides",
    "test_non_strict_load_sparse": "refused",  # gradients are always summed as dense tensors
    "test_leaf_module_enabled_via_config": "insides",  # the marks of modules; all layers are gathered whole
}


def reason_of(row: dict[str, str]) -> str:
    """Return "passed", or why a test didn't pass."""
    if row["result"] == "passed":
        return "passed"
    if row["result"] == "hang":
        return "not yet"
    for part, reason in BY_HAND.items():
        if part in row["test"]:
            return reason
    for reason, patterns in (("cuda", CUDA), ("refused", REFUSED), ("insides", INSIDES)):
        if any(re.search(pattern, row["error"]) for pattern in patterns):
            return reason
    return "not yet"
