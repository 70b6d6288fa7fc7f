"""torch's own pieces, composed by hand: DDP, FSDP2 (`fully_shard`), and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from benchmarks.training.task import ADAMW, CLIP, GPT, Batch, Task, mean_loss
from benchmarks.training.trainer import Trainer


def ddp(task: Task) -> Trainer:
    """Replicate the model with DistributedDataParallel; in bf16 under autocast."""
    start(task)
    model = GPT(task.config).to(task.device)
    load(model, task)
    compile_layers(model, task)
    replicas = DistributedDataParallel(model, gradient_as_bucket_view=True)
    autocast = torch.autocast(task.device, torch.bfloat16, enabled=task.precision == "bf16")

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast:
            logits = replicas(inputs)
        return mean_loss(logits, targets)

    return loop(model, adamw(model), loss_of)


def fsdp2(task: Task) -> Trainer:
    """Shard each layer and the root with `fully_shard`, on the meta device, as torch's tutorial does."""
    start(task)
    mesh = init_device_mesh(task.device, (task.ranks,))
    model = task.meta_model()
    compile_layers(model, task)
    precision = MixedPrecisionPolicy()
    if task.precision == "bf16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    model.to_empty(device=task.device)
    load(model, task)
    return loop(model, adamw(model), lambda inputs, targets: mean_loss(model(inputs), targets))


def tensor_parallel(task: Task) -> Trainer:
    """Split the model by columns, rows and vocabulary, without sequence parallelism; in fp32."""
    start(task)
    mesh = init_device_mesh(task.device, (task.ranks,))
    model = task.meta_model()
    for layer in model.layers:
        whole = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}  # one sum of gradients
        plan = {name: PrepareModuleInput(**whole) for name in ("attn", "ffn")}
        plan |= {name: ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "ffn.gate", "ffn.up")}
        plan |= {name: RowwiseParallel() for name in ("attn.o", "ffn.down")}
        parallelize_module(layer, mesh, plan)
    logits = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    lookup = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"embed.tokens": lookup, "head": logits})
    compile_layers(model, task)
    model.to_empty(device=task.device)
    load(model, task)
    optimizer = torch.optim.AdamW([{"params": kind} for kind in kinds(model)], fused=True, **ADAMW)
    norms: list[Any] = []

    def step(batch: Batch) -> Tensor:
        [(inputs, targets)] = batch
        with loss_parallel():
            loss = mean_loss(model(inputs), targets)
            loss.backward()
        norms[:] = [clip(model)]
        optimizer.step()
        optimizer.zero_grad()
        return whole_tensor(loss.detach())

    return Trainer(step=step, norm=lambda: norms[0], parameters=list(model.state_dict()))


def kinds(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the split parameters and the others: one fused call can't have both."""
    parameters = list(model.parameters())
    split = [p for p in parameters if isinstance(p, DTensor)]
    return [split, [p for p in parameters if not isinstance(p, DTensor)]]


def clip(model: nn.Module) -> Tensor:
    """Clip the gradients of both kinds by their common norm, and return it."""
    split, others = kinds(model)
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in (split, others)]
    norm = torch.linalg.vector_norm(torch.stack([whole_tensor(norm) for norm in norms]))
    for kind in (split, others):
        clip_grads_with_norm_(kind, CLIP, norm)
    return norm


# --- common to all three -------------------------------------------------------------------------------


def start(task: Task) -> None:
    dist.init_process_group("nccl" if task.device == "cuda" else "gloo")


def load(model: nn.Module, task: Task) -> None:
    """Fill the parameters, whole or sharded, from the task's file."""
    with safe_open(task.weights, "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True))


def compile_layers(model: GPT, task: Task) -> None:
    if task.compile:
        for layer in model.layers:
            layer.compile()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Trainer:
    """Make the usual loop: backward, clip, step."""
    norms: list[Any] = []

    def step(batch: Batch) -> Tensor:
        [(inputs, targets)] = batch
        loss = loss_of(inputs, targets)
        loss.backward()
        norms[:] = [clip_grad_norm_(model.parameters(), CLIP)]
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    names = [name for name, _ in model.named_parameters()]
    return Trainer(step=step, norm=lambda: whole_tensor(norms[0]), parameters=names)


def whole_tensor(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
