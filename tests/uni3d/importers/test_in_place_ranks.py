"""Ranks load a foreign folder in place: each reads its own part, and all agree."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign_files import saved
from marks import slow
from models import Stack, global_batches, make_engine, seeded, train, whole
from ranks import Ranks
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ckpt
import uni3d

SETTINGS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "eps": 0.01, "foreach": False}
BEFORE, AFTER = 3, 3


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Take a step on this rank's part of a batch; return the loss over all of it."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    loss = (model(x.chunk(world)[rank]) - y.chunk(world)[rank]).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    return total.item() / world


def refusal(*arguments: Any, **given: Any) -> str:
    with pytest.raises(ckpt.CheckpointError) as caught:
        uni3d.load(*arguments, **given)
    return str(caught.value)


Found = tuple[dict[str, Tensor], list[float], list[str]]


def loading_case(folder: str) -> Found:
    """Load DCP's folder into a sharded model, and its weights into another; then what is refused."""
    model = seeded(Stack)
    with torch.no_grad():
        model.out.weight.zero_()  # type: ignore[union-attr, operator]
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    report = uni3d.load(f"{folder}/dcp", model=model, optimizer=optimizer).report
    assert len(report.restored) == 3 * len([*model.parameters()])
    found = held(model, optimizer)
    losses = [step(model, optimizer, *batch) for batch in global_batches(BEFORE + AFTER)[BEFORE:]]
    other = seeded(Stack)
    fully_shard(other)
    report = uni3d.load(f"{folder}/weights.safetensors", model=other).report
    size = sum(p.numel() * 4 for p in other.parameters())
    assert report.bytes_read < 0.7 * size, "a rank reads its part alone"
    assert all(torch.equal(found[f"fp32/{name}"], p) for name, p in whole(other).items())
    place = f"{folder}/dcp" if dist.get_rank() == 0 else f"{folder}/elsewhere"
    told = [refusal(place, model=other)]
    place = f"{folder}/dcp" if dist.get_rank() == 0 else f"{folder}/weights.safetensors"
    told.append(refusal(uni3d.open(place), model=other))
    told.append(refusal(f"{folder}/weights.safetensors", model=model, optimizer=optimizer))
    told.append(refusal(f"{folder}/damaged", model=other))
    return found, losses, told


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of all weights and moments, whole."""
    found = {f"fp32/{name}": p for name, p in whole(model).items()}
    for name, p in model.named_parameters():
        for state in ("exp_avg", "exp_avg_sq"):
            value = optimizer.state[p][state]
            found[f"{state}/{name}"] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with checkpoints of a plain run by DCP and safetensors, and one that is damaged."""
    model = seeded(Stack)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    for batch in global_batches(BEFORE + AFTER)[:BEFORE]:
        step(model, optimizer, *batch)
    weights, states = get_state_dict(model, optimizer)
    saved(tmp_path / "dcp", {"model": weights, "optim": states})
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    saved(tmp_path / "damaged", {"model": weights})
    (file,) = (tmp_path / "damaged").glob("*.distcp")
    data = file.read_bytes()
    at = data.index(model.out.weight.detach().numpy().tobytes())  # type: ignore[union-attr, operator]
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return tmp_path


def uninterrupted() -> tuple[dict[str, Tensor], list[float]]:
    """Train in one process; return what it holds where the others load, and its losses from there on."""
    model = seeded(Stack)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    batches = global_batches(BEFORE + AFTER)
    for batch in batches[:BEFORE]:
        step(model, optimizer, *batch)
    return held(model, optimizer), [step(model, optimizer, *batch) for batch in batches[BEFORE:]]


def test_sharded_ranks_load_it(ranks: Ranks, folder: Path) -> None:
    wanted, losses = uninterrupted()
    results = ranks.run(2, loading_case, str(folder))
    for found, losses_there, _ in results:
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
        assert losses_there == pytest.approx(losses, rel=1e-5)
    told = [errors for _, _, errors in results]
    assert told[0] == told[1], "each rank raises the same"
    for text, words in zip(
        told[0],
        (
            "elsewhere doesn't exist (rank 1)",
            "not the same checkpoint on all ranks",
            "has no optimizer",
            "is damaged",
        ),
        strict=True,
    ):
        assert words in text


def engine_case(folder: str, pp: int, zero: int) -> list[float]:
    engine = make_engine(seeded(Stack), pp=pp, zero=zero)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*doesn't say in which order its samples came")
        url, _ = engine.load_checkpoint(f"{folder}/dcp")
    assert url == f"{folder}/dcp"
    assert engine.global_steps == BEFORE
    return train(engine, global_batches(BEFORE + AFTER)[BEFORE:])


@pytest.mark.parametrize(("pp", "zero"), [(2, 1), slow(1, 3)])
def test_the_engine_goes_on(ranks: Ranks, folder: Path, pp: int, zero: int) -> None:
    _, losses = uninterrupted()
    for found in ranks.run(2, engine_case, str(folder), pp, zero):
        assert found == pytest.approx(losses, rel=1e-5)
