"""State_dicts as torchtitan gives them to DCP, and as the documentation shows them, are saved and loaded."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_runs import STEPS, assert_equal, everything, load, make_run, one_process, save, take_step, trained
from models import global_batches, seeded
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

import ckpt
import uni3d

PAGE = Path(__file__).parents[3] / "docs" / "your-script.md"


class Optimizers:
    """Flat states of a part of the model, as `OptimizersContainer` has them."""

    flat = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.flat)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.model, self.optimizer, state, options=self.flat)


class Keeper:
    """Stateful with a state of its own."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class Part(nn.Module):
    """Layers of one pipeline stage, named as in the whole model."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(stage): nn.Linear(6, 6, bias=stage == 0)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(iter(self.layers.values()))(x)


def titan(stage: int, *, steps: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """Return one stage's model, optimizer and states."""
    model = seeded(Part, stage) if steps else Part(stage)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    for x, _ in global_batches(steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    read = {"next_index": 7 * steps, "sources": [1, {"at": steps}]}
    states = {
        "optimizer": Optimizers(model, optimizer),
        "dataloader": Keeper(
            version=1, **{f"dp_rank_{stage}": read, f"old_rank_{stage}": bytes([stage] * steps)}
        ),
        "lr_scheduler": Keeper(last_epoch=steps),
        "train_state": Keeper(step=steps, ntokens_seen=torch.tensor(100 * steps)),
    }
    return model, optimizer, states


def save_titan(folder: str) -> dict[str, Any]:
    """Save a stage per rank, as torchtitan calls DCP; return what is held."""
    model, optimizer, states = titan(dist.get_rank(), steps=STEPS)
    flat = {**model.state_dict(), **states}
    writer = uni3d.dcp.StorageWriter()
    dcp.save(flat, storage_writer=writer, checkpoint_id=f"{folder}/step-{STEPS}")
    return everything((model, optimizer)) | {
        name: states[name].state for name in states if name != "optimizer"
    }


def load_titan(folder: str, stage: int) -> dict[str, Any]:
    model, optimizer, states = titan(stage, steps=0)
    flat = {**model.state_dict(), **states}
    with one_process():
        dcp.load(flat, storage_reader=uni3d.dcp.StorageReader(), checkpoint_id=f"{folder}/step-{STEPS}")
    model.load_state_dict(flat, strict=False)
    return everything((model, optimizer)) | {
        name: states[name].state for name in states if name != "optimizer"
    }


def test_torchtitan_saves_and_loads_pipeline_stages(tmp_path: Path, ranks: Ranks) -> None:
    held = ranks.run(2, save_titan, str(tmp_path))
    for stage in (1, 0):
        assert_equal(load_titan(str(tmp_path), stage), held[stage])
    manifest = ckpt.open_checkpoint(tmp_path).manifest
    assert (manifest["step"], manifest["tag"]) == (STEPS, f"step-{STEPS}")
    (group,) = manifest["optimizer"]["groups"]
    assert sorted(group["params"]) == ["layers.0.bias", "layers.0.weight", "layers.1.weight"]
    assert manifest["client_state"]["train_state"] == {"step": STEPS, "ntokens_seen": 300}


def test_sixteen_bits_come_back(tmp_path: Path) -> None:
    state = {"w": torch.randn(5, 3).bfloat16(), "n": torch.arange(3), "rng": {"cpu": torch.get_rng_state()}}
    with one_process():
        dcp.save({"model": state, "opaque": b""}, storage_writer=uni3d.dcp.StorageWriter(tmp_path, 1))
        found = {"model": {key: value.clone() for key, value in state.items() if key != "rng"}}
        found["model"]["w"].zero_()
        dcp.load(found, storage_reader=uni3d.dcp.StorageReader(tmp_path))
    assert torch.equal(found["model"]["w"], state["w"])
    assert ckpt.open_checkpoint(tmp_path).read("w").dtype == "float32"


def test_parameters_with_numbers_for_names(tmp_path: Path) -> None:
    """`param_groups.0.lr` of the flat form is of the parameter 0, not of the first group."""
    model = nn.ParameterList([torch.ones(2), torch.ones(3)])
    optimizer = torch.optim.AdamW([{"params": [model[1]], "lr": 0.1}, {"params": [model[0]], "lr": 0.2}])
    flat = Optimizers(model, optimizer)
    save({"model": model.state_dict(), "optim": flat.state_dict()}, tmp_path, "t")
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    flat.load_state_dict(load({"optim": flat.state_dict()}, tmp_path)["optim"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_buffers_by_name(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2), "rope.angles": torch.rand(3, dtype=torch.float64)}}
    save(state, tmp_path, "t", buffers=["*.angles"])
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert checkpoint.atoms == {"w": ["fp32"], "rope.angles": ["value"]}
    assert np.array_equal(checkpoint.read("rope.angles", "value"), state["model"]["rope.angles"].numpy())


VALUES: dict[str, Any] = {
    "nested tuples": (1, (2.5, ["x", ()]), None),
    "a size": torch.Size([2, 3]),
    "a number of numpy": np.float32(0.1),
    "text": "größe / 100%",
    "lists": [[], [True, [1]]],
    "dicts in lists": [{"a": 1, "b.c": [2]}, {"a": (3,)}],
    "bytes": bytes(range(256)),
    "no bytes": b"",
    "a number": torch.tensor(2**53 + 1),
    "a vector of one": torch.tensor([0.1], dtype=torch.float64),
    "a state of random numbers": torch.get_rng_state(),
    "sixteen bits": torch.randn(5).bfloat16(),
}


def blank(value: Any) -> Any:
    """Return something in the place of a value that DCP takes for the same names."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        return [dict.fromkeys(each, 0) for each in value]
    return 0


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("anew", [False, True], ids=["in place", "anew"])
def test_values_beside_come_back_as_they_were(tmp_path: Path, name: str, anew: bool) -> None:
    value = VALUES[name]
    state = {"model": {"w": torch.ones(2)}, "its": {name: value}}
    save(state, tmp_path, "t")
    if anew:  # without a state_dict to load into
        found: dict[str, Any] = {}
        reader = uni3d.dcp.StorageReader(tmp_path)
        _load_state_dict(found, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    else:
        found = load({"model": {"w": torch.zeros(2)}, "its": {name: blank(value)}}, tmp_path)
    assert torch.equal(found["model"]["w"], torch.ones(2))
    there = found["its"][name]
    assert type(there) is type(value)
    if isinstance(value, torch.Tensor):
        assert (there.dtype, there.shape) == (value.dtype, value.shape)
        assert torch.equal(there, value)
    else:
        assert there == value
        assert repr(there) == repr(value), "the types inside, too"


# --- the documentation -----------------------------------------------------------------------------------


def new_lines(block: str) -> str:
    """Return a diff's lines without those that it takes away."""
    return "\n".join(line[1:] for line in block.splitlines() if not line.startswith("-"))


@pytest.mark.usefixtures("alone")
def test_the_lines_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text().partition("## torch's distributed checkpoint\n")[2].partition("\n## ")[0]
    saving, loading = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for form in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        first, second = trained(), make_run(seed=7)
        with one_process():
            exec(new_lines(saving), {"model": first[0], "optimizer": first[1], "epoch": 2, "options": form})
            scope = {"model": second[0], "optimizer": second[1], "epoch": 0, "options": form}
            exec(new_lines(loading), scope)
        assert scope["epoch"] == 2
        assert_equal(everything(second), everything(first))
        batch = global_batches(1, seed=5)[0]
        assert take_step(first, batch) == take_step(second, batch)
    assert ckpt.committed_tags("runs/mine") == [f"global_step{STEPS}"]
    assert set_state_dict.__name__ in loading
