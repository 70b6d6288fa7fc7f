"""DeepSpeed: its ZeRO stages, and its pipeline. Settings that aren't the task's are DeepSpeed's defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

os.environ.setdefault("DS_BUILD_OPS", "0")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.training.task import ADAMW, CLIP, GPT, Batch, Task, mean_loss
from benchmarks.training.trainer import Trainer


def build(task: Task) -> Trainer:
    """Make DeepSpeed's engine. Collective."""
    dist.init_process_group("nccl" if task.device == "cuda" else "gloo")
    deepspeed.init_distributed()
    config = {
        "train_batch_size": task.batch,
        "train_micro_batch_size_per_gpu": task.micro_batch,
        "gradient_clipping": CLIP,
        "steps_per_print": 1_000_000,
        "bf16": {"enabled": task.precision == "bf16"},
        "zero_optimization": {"stage": task.zero},
        "zero_allow_untested_optimizer": True,  # torch's fused AdamW, as everywhere here
    }
    return pipeline(task, config) if task.pp > 1 else zero(task, config)


def zero(task: Task, config: dict[str, Any]) -> Trainer:
    """Train the whole model, sharded by a ZeRO stage."""
    with deepspeed.zero.Init(config_dict_or_path=config) if task.zero == 3 else nullcontext():
        model = GPT(task.config)
    names = [name for name, _ in model.named_parameters()]
    load(model.named_parameters(), task, gather=task.zero == 3)
    if task.compile:
        compile_each(model.layers)
    engine = make_engine(model, config)

    def step(batch: Batch) -> Tensor:
        [(inputs, targets)] = batch
        loss = mean_loss(engine(inputs), targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return Trainer(step=step, norm=engine.get_global_grad_norm, parameters=names)


def pipeline(task: Task, config: dict[str, Any]) -> Trainer:
    """Train the model as a chain of layers. DeepSpeed balances parameters between stages."""
    from model import Block, Embedding, make_norm

    c = task.config
    layers = [
        LayerSpec(Embedding, c),
        *[LayerSpec(Block, c) for _ in range(c.num_layers)],
        LayerSpec(type(make_norm(c)), c.hidden_size, eps=c.norm_eps),
        LayerSpec(nn.Linear, c.hidden_size, c.vocab_size, bias=False),
    ]
    model = PipelineModule(layers, num_stages=task.pp, loss_fn=mean_loss, partition_method="parameters")
    chain = task.meta_model().pipeline_layers
    named = [(whole_name(name, chain), parameter) for name, parameter in model.named_parameters()]
    load(named, task)
    for parameter in model.parameters():
        parameter.model_parallel = True  # or the norm by which it clips is that of the first stage alone
    if task.compile:
        compile_each(layer for layer in model.forward_funcs if isinstance(layer, Block))
    engine = make_engine(model, config)

    def step(batch: Batch) -> Tensor:
        return engine.train_batch(iter(batch)).detach()

    return Trainer(step=step, norm=engine.get_global_grad_norm, parameters=[name for name, _ in named])


def whole_name(name: str, chain: list[str]) -> str:
    """Return a parameter's name in the whole model: a pipeline's begins with the number of its layer."""
    number, _, rest = name.partition(".")
    return f"{chain[int(number)]}.{rest}"


def make_engine(model: nn.Module, config: dict[str, Any]) -> Any:
    optimizer = partial(torch.optim.AdamW, fused=True, **ADAMW)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


@torch.no_grad()
def load(named: Iterable[tuple[str, nn.Parameter]], task: Task, *, gather: bool = False) -> None:
    """Fill the parameters from the task's file. With `gather`, ZeRO has sharded them already."""
    with safe_open(task.weights, "pt") as file:
        for name, parameter in named:
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gathered if gather else nullcontext():
                if not gather or dist.get_rank() == 0:
                    parameter.copy_(file.get_tensor(name))


def compile_each(layers: Iterable[Any]) -> None:
    for layer in layers:
        layer.compile()
