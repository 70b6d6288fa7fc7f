"""Make the fixtures of Megatron-core: `python tests/peers/make_megatron.py [OUT [NAME ...]]`."""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from peers_common import destination, hyperparameters, make, write_expected
from split_model import merged
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LAYERS = 2
SEQUENCE = 5
VOCABULARY = 14
STEPS = 3
NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Megatron's names of norms: part of the linear layer after them, as in its fused layers."""
STATES = ("exp_avg", "exp_avg_sq")


class OnCpu(TorchFunctionMode):
    """Redirect Megatron's requests for CUDA tensors to the CPU."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Run Megatron without a GPU; the saved files don't depend on it."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()  # no dropout here
    with OnCpu():
        yield


def built(bf16: bool) -> tuple[GPTModel, TransformerConfig]:
    torch.manual_seed(17)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=8,
        ffn_hidden_size=6,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        activation_func=nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )
    return (model.bfloat16() if bf16 else model), config


def batches(step: int) -> Iterator[dict[str, Tensor]]:
    rank = parallel_state.get_data_parallel_rank()
    ids = torch.randint(
        0, VOCABULARY, (3, SEQUENCE), generator=torch.Generator().manual_seed(10 * step + rank)
    )
    places = torch.arange(SEQUENCE).expand(3, SEQUENCE)
    yield {"input_ids": ids, "position_ids": places, "labels": ids.roll(-1, 1)}


def forward(data: Iterator[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
    causal = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)

    def loss(output: Tensor) -> tuple[Tensor, dict[str, float]]:
        mean = output.float().mean()
        return mean, {"loss": mean.item()}

    return model(**next(data), attention_mask=causal), loss


def run(folder: Path, tp: int, pp: int, sharding: str | None) -> None:
    """Train, save like Megatron-LM and write the expected tensors. With `sharding`: bf16, distributed."""
    parallel_state.initialize_model_parallel(tp, pp)
    with on_cpu():
        train_and_save(folder, sharding)
    parallel_state.destroy_model_parallel()


def train_and_save(folder: Path, sharding: str | None) -> None:
    module, model, optimizer, scheduler = prepared(
        bf16=sharding is not None, distributed=sharding is not None
    )
    for step in range(STEPS):
        take_step(model, optimizer, scheduler, step)
    save(folder, model, optimizer, scheduler, sharding)
    expect(folder, module, optimizer, scheduler, sharding)


def prepared(*, bf16: bool, distributed: bool) -> tuple[GPTModel, DistributedDataParallel, Any, Any]:
    """Return the module, its wrapper, the optimizer and the schedule of a new run."""
    module, config = built(bf16=bf16)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=bf16)
    model = DistributedDataParallel(config, ddp, module)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=distributed,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    config.finalize_model_grads_func = finalize_model_grads
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-3,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=10,
        wd_incr_style="constant",
    )
    return module, model, optimizer, scheduler


def take_step(model: Any, optimizer: Any, scheduler: Any, step: int) -> list[dict[str, float]]:
    """Take a step; return the loss, on the last pipeline stage."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses: list[dict[str, float]] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches(step),
        model=[model],
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=3,
    )
    optimizer.step()
    scheduler.step(1)
    return losses


def save(folder: Path, model: Any, optimizer: Any, scheduler: Any, sharding: str | None) -> None:
    """Return the state under the keys that Megatron-LM's training saves."""
    metadata = {"distrib_optim_sharding_type": sharding, "singleton_local_shards": False}
    metadata["chained_optim_avoid_prefix"] = True
    weights = model.module.sharded_state_dict(metadata=metadata)
    state = {
        "args": argparse.Namespace(
            num_layers=LAYERS, hidden_size=8, padded_vocab_size=VOCABULARY, iteration=STEPS
        ),
        "checkpoint_version": 3.0,
        "iteration": STEPS,
        "num_floating_point_operations_so_far": 12345.0,
        "model": weights,
        "optimizer": optimizer.sharded_state_dict({"model": weights}, metadata=metadata),
        "opt_param_scheduler": scheduler.state_dict(),
    }
    path = folder / "checkpoint" / f"iter_{STEPS:07d}"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (folder / "checkpoint" / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    dist.barrier()
    dist_checkpointing.save(state, str(path), content_metadata=metadata)


def whole(optimizer: Any, parameter: nn.Parameter, state: str | None, sharding: str | None) -> Tensor:
    """Return a tensor-parallel rank's shard of a parameter or state, gathered over data-parallel ranks."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if sharding is None:
        master = getattr(parameter, "main_param", parameter)
        return (inner.optimizer.state[master][state] if state else master).detach().clone()
    flat = torch.zeros(parameter.numel())
    if parameter in inner.model_param_group_index_map:
        group, order = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][order]
        where = inner._get_model_param_range_map(parameter)["param"]
        flat[where.start : where.end] = inner.optimizer.state[main][state] if state else main.detach()
    dist.all_reduce(flat, group=parallel_state.get_data_parallel_group())
    return flat.view_as(parameter)


def group_of(optimizer: Any, parameter: nn.Parameter) -> int | None:
    """Return a parameter's group in the optimizer; None if another data-parallel rank steps it."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    if hasattr(inner, "model_param_group_index_map"):
        return inner.model_param_group_index_map.get(parameter, (None, 0))[0]
    groups = enumerate(inner.optimizer.param_groups)
    master = getattr(parameter, "main_param", parameter)
    return next(index for index, group in groups if any(p is master for p in group["params"]))


def expect(folder: Path, module: nn.Module, optimizer: Any, scheduler: Any, sharding: str | None) -> None:
    """Merge the ranks' live tensors, under the stored names with the layer's number inserted."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first = stage * (LAYERS // parallel_state.get_pipeline_model_parallel_world_size())
    mine: dict[str, tuple[Tensor, Any]] = {}
    where: dict[str, tuple[str, int | None]] = {}
    members: dict[str, int] = {}
    for name, p in module.named_parameters():
        key = name
        for norm, stored in NORMS.items():
            key = key.replace(norm, stored)
        parts, layer = key.split("."), None
        if parts[:2] == ["decoder", "layers"]:
            layer = int(parts.pop(2)) + first
        stored_as = (".".join(parts), layer)
        if layer is not None:
            parts.insert(2, str(layer))
        where[".".join(parts)] = stored_as
        group = group_of(optimizer, p)
        if group is not None:
            members[".".join(parts)] = group
        cut = (p.partition_dim if getattr(p, "tensor_model_parallel", False) else None, 1)
        cut = (cut[0], 2) if "linear_fc1" in name else cut
        for state in (None, *STATES):
            tensor = whole(optimizer, p, state, sharding)
            assert state or torch.equal(tensor.to(p.dtype), p), f"{name} isn't what the model uses"
            mine[f"{state or 'fp32'}/{'.'.join(parts)}"] = (tensor.float(), cut)
    ranks: list[Any] = [None] * dist.get_world_size()
    place = (stage, parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank())
    dist.all_gather_object(ranks, (place, mine, where, members))
    if dist.get_rank() != 0:
        return
    stored = {name: key for _, _, of, _ in ranks for name, key in of.items()}
    groups = {name: group for *_, of in ranks for name, group in of.items() if name != "output_layer.weight"}
    ordered = sorted(ranks, key=lambda rank: rank[0])
    tensors = joined([of for (_, _, dp), of, *_ in ordered if dp == 0])
    stored.pop("output_layer.weight", None)
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    (step,) = {float(state["step"]) for state in inner.optimizer.state.values()}
    facts = {
        "framework": f"megatron-core {megatron.core.__version__}, torch {torch.__version__}",
        "world_size": dist.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "sharding": sharding,
        "step": STEPS,
        "groups": [
            {**hyperparameters(group), "names": [name for name, of in groups.items() if of == index]}
            for index, group in enumerate(inner.optimizer.param_groups)
        ],
        "parameter_steps": dict.fromkeys(stored, float(step)),
        "frozen": [],
        "opt_param_scheduler": scheduler.state_dict(),
        "stored": stored,
        "aliases": {"output_layer.weight": "embedding.word_embeddings.weight"},
    }
    write_expected(folder, tensors, facts)


def joined(ranks: list[dict[str, tuple[Tensor, Any]]]) -> dict[str, Tensor]:
    """Merge the tensor-parallel parts, given in the order of the ranks."""
    tensors: dict[str, Tensor] = {}
    for name in {name for of in ranks for name in of}:
        parts = [of[name] for of in ranks if name in of]
        tensors[name] = merged([part for part, _ in parts], parts[0][1])
    for state in ("fp32", *STATES):  # the last stage has the tied weight too
        head = tensors.pop(f"{state}/output_layer.weight", None)
        assert head is None or torch.equal(head, tensors[f"{state}/embedding.word_embeddings.weight"])
    return tensors


def main() -> None:
    out = destination()
    make(out, "megatron_fp32", 4, run, 2, 2, None)
    make(out, "megatron_distributed", 4, run, 2, 1, "fully_reshardable")
    make(out, "megatron_dp_reshardable", 4, run, 2, 1, "dp_reshardable")


if __name__ == "__main__":
    main()
