"""Training by plain PyTorch and FSDP2, saved and loaded by DCP with uni3d's storage."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Batch, OwnLoss, adamw, global_batches, seeded
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import uni3d

STEPS = 3
BATCHES = global_batches(STEPS + 1)
"""Global batches of the steps before the checkpoint, and of the one after it."""
NESTED, FLAT = ("model", "optim", False), ("", "optimizer", True)
"""Forms of a state_dict: the tutorial's, and torchtitan's, whose weights have no key of their own."""

Form = tuple[str, str, bool]
Sharded = bool | tuple[int, int]
"""True if all ranks shard a model, or the groups of ranks that hold the same and the ranks of a group."""
Run = tuple[nn.Module, torch.optim.Optimizer]


def make_run(*, sharded: Sharded = False, seed: int = 3, kind: type[nn.Module] = OwnLoss) -> Run:
    """Return a model and its optimizer, without a step taken."""
    model = seeded(kind) if seed == 3 else kind()
    if sharded:
        axes = ("replicate", "shard")
        mesh = None if sharded is True else init_device_mesh("cpu", sharded, mesh_dim_names=axes)
        fully_shard(model, mesh=mesh)
    return model, adamw([p for p in model.parameters() if p.requires_grad])


def take_step(run: Run, batch: Batch) -> float:
    """Take a step on this rank's part of a global batch; return the whole batch's loss."""
    model, optimizer = run
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    loss = model(*(part.chunk(ranks)[rank] for part in batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / ranks


def trained(*, sharded: Sharded = False) -> Run:
    run = make_run(sharded=sharded)
    for batch in BATCHES[:STEPS]:
        take_step(run, batch)
    return run


def state_of(run: Run, form: Form = NESTED) -> dict[str, Any]:
    """Return the state_dict for DCP."""
    model, optim, flat = form
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, states = get_state_dict(*run, options=options)
    return {**({model: weights} if model else weights), optim: states}


@contextmanager
def one_process() -> Iterator[None]:
    """Silence DCP's warning that there is one process."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        yield


def save(state: dict[str, Any], run: Any, tag: str | None = None, **how: Any) -> uni3d.dcp.StorageWriter:
    writer = uni3d.dcp.StorageWriter(run, tag, **how)
    with one_process():
        dcp.save(state, storage_writer=writer)
    return writer


def load(state: dict[str, Any], run: Any, tag: str | None = None) -> dict[str, Any]:
    with one_process():
        dcp.load(state, storage_reader=uni3d.dcp.StorageReader(run, tag))
    return state


def loaded(source: Any, *, sharded: Sharded = False, form: Form = NESTED) -> Run:
    """Return a run with other weights, filled from a checkpoint."""
    run, (model, optim, flat) = make_run(sharded=sharded, seed=7), form
    state = load(state_of(run, form), source)
    states = state.pop(optim)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights = state[model] if model else state
    set_state_dict(*run, model_state_dict=weights, optim_state_dict=states, options=options)
    return run


def everything(run: Run) -> dict[str, Any]:
    """Return copies of the weights, buffers and states, whole, and of the hyperparameters."""
    model, optimizer = run
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, Any] = {f"model/{name}": full(t) for name, t in model.state_dict().items()}
    for parameter, states in optimizer.state.items():
        found |= {f"{key}/{names[parameter]}": full(value) for key, value in states.items()}
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"{i}/{key}": value for key, value in group.items() if key != "params"}
    return found


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check that both have the same names, values and bits."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert (type(found[name]), found[name]) == (type(value), value), name
