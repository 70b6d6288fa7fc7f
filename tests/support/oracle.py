"""Reference training in plain PyTorch on one process. Shares no code with uni3d, parallel or ckpt.

The rules that uni3d documents (initial weights from seed and name, the order of samples, DeepSpeed's
schedule) are implemented here a second time, so that an error in either shows.
"""

import hashlib
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from initial_draws import drawn
from model import GPT, GPTConfig
from torch import Tensor

SEED = 7
SEQ_LEN = 8
BATCH = 12
N_SAMPLES = 40  # not a multiple of the batch, so that batches straddle epochs
CLIP = 0.5
LR = 1e-2
WARMUP, TOTAL = 3, 20

# Nothing here divides by 3, and the vocabulary by nothing: every split of dp or tp is uneven somewhere.
MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 20,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 2,
    "ffn_size": 26,
    "max_seq_len": 16,
}

SETTINGS: dict[str, Any] = {
    "train_batch_size": BATCH,
    "gradient_clipping": CLIP,
    "seed": SEED,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": LR, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1},
    },
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": {
            "total_num_steps": TOTAL,
            "warmup_num_steps": WARMUP,
            "cos_min_ratio": 0.1,
            "warmup_min_ratio": 0.2,
            "warmup_type": "linear",
        },
    },
}


@dataclass
class Trace:
    """Results of each step, and the states between steps."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    states: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    """States after each step, `{name: {"fp32", "exp_avg", "exp_avg_sq"}}`; entry 0 is before the first."""


def samples(masked: bool = False) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, `(N_SAMPLES, SEQ_LEN)`; `masked` leaves out an uneven number of targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, MODEL["vocab_size"], (N_SAMPLES, SEQ_LEN + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    if masked:
        for i in range(N_SAMPLES):
            targets[i, : i % SEQ_LEN] = -100
    return inputs, targets


def initial_model(config: dict[str, Any]) -> GPT:
    model = GPT(GPTConfig(**config))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                residual = name.endswith(("attn.o.weight", "ffn.down.weight"))
                std = 0.02 / math.sqrt(2 * config["num_layers"]) if residual else 0.02
                parameter.copy_(drawn(SEED, name, tuple(parameter.shape), partial(_normal, std)))
    return model


def _normal(std: float, tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(0.0, std, generator=generator)


def learning_rate(step: int) -> float:
    """Return the rate of step `step`, counted from 1: DeepSpeed's WarmupCosineLR at iteration step - 2."""
    iteration = step - 2
    if iteration < 0:
        return 0.0
    if iteration < WARMUP:
        return LR * (0.2 + 0.8 * iteration / WARMUP)
    progress = min(1.0, (iteration - WARMUP + 1) / (TOTAL - WARMUP))
    return LR * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


def batch_indices(step: int) -> list[int]:
    """Return the samples of global batch `step`, counted from 0."""
    return [sample_at(*divmod(place, N_SAMPLES)) for place in range(step * BATCH, (step + 1) * BATCH)]


def sample_at(epoch: int, index: int, n: int = N_SAMPLES, seed: int = SEED) -> int:
    """Return a sample of an epoch, by the definition of the order in docs/format.md."""
    keys = hashlib.shake_256(f"{seed}:epoch {epoch}".encode()).digest(96)
    columns = max(4, math.isqrt(n) // 2 * 2)
    while columns**2 < n:
        columns += 2
    rows = max(4, math.ceil(n / columns))
    while True:
        row, column = index // columns, index % columns
        for i in range(12):
            key = int.from_bytes(keys[8 * i : 8 * i + 8], "little")
            if i % 2 == 0:
                column = (column + mixed(row + key) // 2) % columns
            else:
                row = (row + mixed(column + key) // 2) % rows
        index = row * columns + column
        if index < n:
            return index


def mixed(z: int) -> int:
    z %= 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def make_optimizer(model: GPT) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-6,
        foreach=False,
    )


def train(config: dict[str, Any], steps: int, masked: bool = False) -> Trace:
    """Train for `steps` steps in one process, a global batch at once."""
    model = initial_model(config)
    optimizer = make_optimizer(model)
    inputs, targets = samples(masked)
    trace = Trace(states=[_state(model, optimizer)])
    for step in range(steps):
        index = batch_indices(step)
        logits = model(inputs[index])
        loss = F.cross_entropy(logits.flatten(0, 1), targets[index].flatten(), ignore_index=-100)
        loss.backward()
        trace.losses.append(loss.item())
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        trace.states.append(_state(model, optimizer))
    return trace


def _state(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    states = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        states[name] = {"fp32": parameter.detach().clone()} | {
            k: v.clone() for k, v in moments.items() if k != "step"
        }
    return states


def train_mixed(config: dict[str, Any], steps: int, dtype: torch.dtype, micro: int, factor: float) -> Trace:
    """Train in mixed precision in one process: fp32 masters, each micro batch in `dtype`.

    Casts: the parameters before each micro batch; the logits before the loss, to fp32; the gradients before
    their sum, to fp32. The loss is multiplied by `factor` before the backward pass.
    """
    model = initial_model(config)
    masters = dict(model.named_parameters())
    optimizer = make_optimizer(model)
    inputs, targets = samples()
    trace = Trace()
    for step in range(steps):
        index, total = batch_indices(step), 0.0
        for parameter in masters.values():
            parameter.grad = torch.zeros_like(parameter)
        for start in range(0, BATCH, micro):
            part = index[start : start + micro]
            low = {name: p.detach().to(dtype).requires_grad_() for name, p in masters.items()}
            logits = torch.func.functional_call(model, low, (inputs[part],)).float()
            loss = F.cross_entropy(logits.flatten(0, 1), targets[part].flatten(), reduction="sum")
            (loss * factor).backward()
            total += loss.item()
            for name, parameter in masters.items():
                parameter.grad += low[name].grad.float()
        tokens = BATCH * SEQ_LEN
        for parameter in masters.values():
            parameter.grad /= tokens * factor
        trace.losses.append(total / tokens)
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
    trace.states.append(_state(model, optimizer))
    return trace
