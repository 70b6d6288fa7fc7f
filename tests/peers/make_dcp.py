"""Make the fixtures of torch.distributed.checkpoint: `python tests/peers/make_dcp.py [OUT [NAME ...]]`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peers_common import destination, hyperparameters, make, new_folder, wanted, write_expected
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS = 4
STATES = ("exp_avg", "exp_avg_sq")


class Block(nn.Module):
    """Model with two linear layers that tensor parallelism can split, and odd sizes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7, bias=False)
        self.up = nn.Linear(7, 10)
        self.down = nn.Linear(10, 7, bias=False)
        self.register_buffer("running_mean", torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean.add_(0.125)  # what any data gives, so that ranks agree
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Small(nn.Module):
    """Model with a tied weight, a frozen parameter, a scalar parameter and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.blocks = nn.ModuleList([Block()])
        self.gain = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, 7), requires_grad=False)
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        self.seen += 1
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x * self.frozen) * self.gain.sum(), labels)


def built(meshes: dict[str, DeviceMesh]) -> tuple[Small, torch.optim.AdamW]:
    """Train a model on its mesh for some steps; matrices and the rest are separate groups."""
    torch.manual_seed(11)
    model = Small()
    for block in model.blocks:
        if "tp" in meshes:
            parallelize_module(block, meshes["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=meshes["dp"])
    fully_shard(model, mesh=meshes["dp"])
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": 2e-3},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), foreach=False)


def train(model: Small, optimizer: torch.optim.Optimizer, scheduler: Any, dp_rank: int) -> None:
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + dp_rank)
        model(*torch.randint(0, 13, (2, 6), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def expect(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, more: dict[str, Any]) -> None:
    """Gather the live run's tensors and write them with its facts."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"fp32/{name}": full(p).float() for name, p in model.named_parameters()}
    steps = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors.update({f"{state}/{names[p]}": full(optimizer.state[p][state]) for state in STATES})
            steps[names[p]] = full(optimizer.state[p]["step"]).item()
    kept = model.state_dict()
    tensors.update({f"value/{name}": full(b) for name, b in model.named_buffers() if name in kept})
    every = model.named_parameters(remove_duplicate=False)
    facts = {
        "framework": f"torch {torch.__version__}",
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "step": STEPS,
        "groups": [
            {**hyperparameters(g), "names": [names[p] for p in g["params"]]} for g in optimizer.param_groups
        ],
        "parameter_steps": steps,
        "frozen": [name for name, p in model.named_parameters() if not p.requires_grad],
        "aliases": {name: names[p] for name, p in every if names[p] != name},
        **more,
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_expected(folder, tensors, facts)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def nested(folder: Path, sizes: tuple[int, ...], axes: tuple[str, ...]) -> None:
    """Save `{"model": ..., "optim": ...}`, like PyTorch's tutorial, with the script's own counters."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=axes)
    data_axes = tuple(axis for axis in axes if axis != "tp")
    meshes = {"dp": mesh[data_axes]} | ({"tp": mesh["tp"]} if "tp" in axes else {})
    model, optimizer = built(meshes)
    dp_rank = dist.get_rank() // (sizes[-1] if "tp" in axes else 1)
    train(model, optimizer, decay(optimizer), dp_rank)
    weights, states = get_state_dict(model, optimizer)
    mine = {"epoch": 3, "note": "from the script", "tokens": torch.tensor(480)}
    dcp.save({"model": weights, "optim": states, **mine}, checkpoint_id=folder / "checkpoint")
    expect(folder, model, optimizer, {"client_state": mine, "mesh": dict(zip(axes, sizes, strict=True))})


def titan(folder: Path) -> None:
    """Save torchtitan's layout: weights at the top level, a flat optimizer, scheduler, counters, data."""
    model, optimizer = built({"dp": init_device_mesh("cpu", (2,))})
    scheduler = decay(optimizer)
    train(model, optimizer, scheduler, dist.get_rank())
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    counters = {"step": torch.tensor(STEPS, dtype=torch.int32), "ntokens_seen": torch.tensor(480)}
    state = {
        **get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=flat),
        "lr_scheduler": scheduler.state_dict(),
        "train_state": counters,
        "dataloader": {f"dp_rank_{dist.get_rank()}": b"opaque", "world_size": 2},
    }
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    expect(folder, model, optimizer, {"train_state": counters, "last_epoch": scheduler.last_epoch})


def weights_only(folder: Path) -> None:
    """Save a bf16 model's own state_dict from one process without ranks."""
    torch.manual_seed(11)
    model = Small().bfloat16()
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint", no_dist=True)
    tensors = {f"fp32/{name}": p.float() for name, p in model.named_parameters()}
    tensors |= {f"value/{n}": b for n, b in model.named_buffers() if n in model.state_dict()}
    facts = {"framework": f"torch {torch.__version__}", "aliases": {"head.weight": "embed.weight"}}
    write_expected(folder, tensors, facts)


def main() -> None:
    out = destination()
    make(out, "dcp_fsdp", 2, nested, (2,), ("shard",))
    make(out, "dcp_fsdp_tp", 4, nested, (2, 2), ("shard", "tp"))
    make(out, "dcp_torchtitan", 2, titan)
    if wanted("dcp_weights"):
        weights_only(new_folder(out, "dcp_weights"))


if __name__ == "__main__":
    main()
