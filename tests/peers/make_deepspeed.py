"""Make the fixtures of DeepSpeed's ZeRO: `python tests/peers/make_deepspeed.py [OUT [NAME ...]]`."""

import copy
import itertools
from pathlib import Path
from typing import Any

import continues_model
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from peers_common import destination, hyperparameters, make, write_expected
from safetensors.torch import save_file
from split_model import groups
from torch import Tensor, nn

STATES = ("exp_avg", "exp_avg_sq")
ADAMW = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "betas": [0.9, 0.95], "eps": 1e-8}}
FUSED = {"optimizer": {"type": "AdamW", "params": {**ADAMW["params"], "torch_adam": False}}}
"""DeepSpeed's own Adam: `FusedAdam`, or `DeepSpeedCPUAdam` if states are offloaded to the CPU."""
WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 1e-4, "warmup_max_lr": 5e-3, "warmup_num_steps": 10, "warmup_type": "linear"},
}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 19, "loss_scale_window": 100, "hysteresis": 1}}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0_fp32": (2, {"zero_optimization": {"stage": 0}}),
    "zero0_fp16": (2, {"zero_optimization": {"stage": 0}, **FP16}),
    "zero0_fp16_fused_adam": (2, {"zero_optimization": {"stage": 0}, **FUSED, **FP16}),
    "zero1_fp32": (2, {"zero_optimization": {"stage": 1}}),
    "zero1_bf16": (2, {"zero_optimization": {"stage": 1}, **BF16}),
    "zero1_bf16_fp32_gradients": (
        2,
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}, **BF16},
    ),
    "zero1_fused_adam": (2, {"zero_optimization": {"stage": 1}, **FUSED}),
    "zero2_fp16": (2, {"zero_optimization": {"stage": 2}, **FP16}),
    "zero2_round_robin": (3, {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, **BF16}),
    "zero2_aligned": (2, {"zero_optimization": {"stage": 2, "parameter_alignment": True}, **BF16}),
    "zero2_cpu_adam": (
        2,
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, **FUSED},
    ),
    "zero3_fp32": (2, {"zero_optimization": ZERO3}),
    "zero3_bf16_subgroups": (2, {"zero_optimization": {"stage": 3, "sub_group_size": 40}, **BF16}),
}
"""Ranks and config of each fixture."""


class RunningNorm(nn.Module):
    """BatchNorm for mixed dtypes, since DeepSpeed leaves buffers in fp32."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(dim=0)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), 0.1)
        self.num_batches_tracked += 1
        return (x - mean) * self.weight + self.bias


class Small(nn.Module):
    """Model with odd sizes, a tied weight, frozen parameters and buffers of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.norm = RunningNorm(7)
        self.hidden = nn.Linear(7, 10)
        self.frozen = nn.Linear(10, 7)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 7))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.register_parameter("gain", nn.Parameter(torch.full((1,), 1.25)))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        hidden = torch.tanh(
            self.hidden(self.norm(self.embed(tokens)) * self.scale.to(self.norm.weight.dtype))
        )
        logits = self.head(self.frozen(hidden) * self.gain)
        return nn.functional.cross_entropy(logits.float(), labels)


def whole(engine: Any, parameter: nn.Parameter, state: str | None) -> Tensor:
    """Return a parameter's fp32 value, or one of its states, from the live run. Collective."""
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return round_robin(engine.optimizer, parameter, state)
    if engine.zero_optimization():
        asked = (
            safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
        )
        return asked.detach().float().clone()
    master, start = masters(engine)[parameter]
    source = base_optimizer(engine).state[master][state] if state else master
    return source.detach().flatten()[start : start + parameter.numel()].view_as(parameter).clone()


def round_robin(optimizer: Any, parameter: nn.Parameter, state: str | None) -> Tensor:
    """Return a tensor from the ranks' live partitions, in DeepSpeed's order.

    `safe_get_full_fp32_param` looks in the order of the groups, which isn't that of the partitions here, and
    so mixes parameters up; `param_slice_mappings` in the checkpoint does as well.
    """
    for index, group in enumerate(optimizer.round_robin_bit16_groups):
        for p, start in zip(group, optimizer.round_robin_bit16_offsets[index], strict=True):
            if p is parameter:
                master = optimizer.single_partition_of_fp32_groups[index]
                part = optimizer.optimizer.state[master][state] if state else master
                parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, part.detach())
                return torch.cat(parts)[start : start + p.numel()].view_as(p).clone()
    raise AssertionError("a parameter of no group")


def masters(engine: Any) -> dict[nn.Parameter, tuple[Tensor, int]]:
    """Return the tensor that holds a parameter in fp32 without ZeRO, and the offset in it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat"):  # half precision, an Adam that is fused: one tensor a group
        found = {}
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            starts = itertools.accumulate((p.numel() for p in group), initial=0)
            found.update({p: (flat, start) for p, start in zip(group, starts, strict=False)})
        return found
    if hasattr(optimizer, "fp32_groups"):  # half precision, another Adam: a tensor for each
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {p: (master, 0) for half, full in pairs for p, master in zip(half, full, strict=True)}
    return {p: (p, 0) for group in optimizer.param_groups for p in group["params"]}


def truth(engine: Any) -> dict[str, Tensor]:
    """Return every tensor of the live run by name. Buffers are those of rank 0, which are saved."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed links states once, after the first group's first step, when other groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"fp32/{name}"] = whole(engine, parameter, None)
        with deepspeed.zero.GatheredParameters([parameter]):
            used = parameter.detach().clone()
        assert torch.equal(tensors[f"fp32/{name}"].to(used.dtype), used), f"{name} isn't what the model uses"
        if parameter.requires_grad:
            tensors.update({f"{state}/{name}": whole(engine, parameter, state) for state in STATES})
    persistent = engine.module.state_dict(keep_vars=True)
    for name, buffer in engine.module.named_buffers():
        if name in persistent:
            tensors[f"value/{name}"] = buffer
    return tensors


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the Adam inside DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def facts(engine: Any, names: list[list[str]], client_state: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the live run."""
    adam = base_optimizer(engine)
    states = [state for state in adam.state.values() if "exp_avg" in state]
    steps = {float(state["step"]) for state in states}
    assert len(steps) == 1, steps
    found = [{**hyperparameters(g), "lr": g["lr"]} for g in adam.param_groups][: len(names)]
    trained = {id(p): n for n, p in engine.module.named_parameters()}
    every = engine.module.named_parameters(remove_duplicate=False)
    scaler = getattr(engine.optimizer, "loss_scale", None)
    return {
        "framework": f"deepspeed {deepspeed.__version__}",
        "world_size": dist.get_world_size(),
        "step": engine.global_steps,
        "samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scale": float(scaler) if scaler is not None else None,
        "groups": [{**group, "names": of} for group, of in zip(found, names, strict=True)],
        "parameter_steps": dict.fromkeys((n for group in names for n in group), steps.pop()),
        "frozen": [n for n, p in engine.module.named_parameters() if not p.requires_grad],
        "aliases": {name: trained[id(p)] for name, p in every if trained[id(p)] != name},
        "lr_scheduler": engine.lr_scheduler.state_dict(),
        "client_state": client_state,
    }


def small_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return tuple(torch.randint(0, 13, (2, 6), generator=generator).unbind())


def zero(folder: Path, config: dict[str, Any]) -> None:
    """Train for five batches, save, and write the run's expected tensors."""
    torch.manual_seed(7)
    model = Small()
    shapes = {id(p): n for n, p in model.named_parameters()}
    of = groups(model)
    names = [[shapes[id(p)] for p in group["params"]] for group in of]
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 1.0,
        "optimizer": ADAMW,
        "scheduler": WARMUP,
        **config,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=of, config=config)
    for step in range(5):
        loss = engine(*small_batch(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
    client_state = {"epoch": 3, "note": "from the script", "best": [0.5, 0.25]}
    save(engine, folder, client_state)
    tensors = truth(engine)
    if dist.get_rank() == 0:
        write_expected(folder, tensors, facts(engine, names, client_state))


def save(engine: Any, folder: Path, client_state: dict[str, Any]) -> None:
    """Save with DeepSpeed, without the two scripts that it copies into every run's folder."""
    engine.save_checkpoint(str(folder / "checkpoint"), client_state=client_state)
    if dist.get_rank() == 0:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (folder / "checkpoint" / script).unlink(missing_ok=True)
    dist.barrier()


def continues(folder: Path) -> None:
    """Train, save and continue; an imported run must reproduce the continuation."""
    config = copy.deepcopy(continues_model.config())
    config["optimizer"]["params"]["torch_adam"] = True
    config["zero_optimization"] = {"stage": 2}
    model = continues_model.model()
    names = [[name for name, _ in model.named_parameters()]]
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    curve = [train(engine, step) for step in range(continues_model.STEPS_BEFORE)]
    save(engine, folder, {})
    tensors, found = truth(engine), facts(engine, names, {})
    after = range(continues_model.STEPS_BEFORE, continues_model.STEPS_BEFORE + continues_model.STEPS_AFTER)
    found["before"], found["after"] = curve, [train(engine, step) for step in after]
    final = truth(engine)
    if dist.get_rank() == 0:
        write_expected(folder, tensors, found)
        save_file({name: tensor.contiguous() for name, tensor in final.items()}, folder / "after.safetensors")


def train(engine: Any, step: int) -> dict[str, float]:
    """Take a step on this rank's slice; return global loss, gradient norm before clipping, learning rate."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs, labels = (part.chunk(ranks)[rank] for part in continues_model.batch(step))
    loss, lr = engine(inputs, labels), engine.get_lr()[0]
    engine.backward(loss)
    engine.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return {
        "step": step,
        "loss": mean.item() / ranks,
        "grad_norm": float(engine.get_global_grad_norm()),
        "lr": lr,
    }


def main() -> None:
    out = destination()
    for name, (ranks, config) in CASES.items():
        make(out, f"deepspeed_{name}", ranks, zero, config)
    make(out, "deepspeed_continues", 2, continues)


if __name__ == "__main__":
    main()
