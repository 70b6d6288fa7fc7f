"""Exports are loaded by Megatron-core itself, which goes on from them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import answer
from foreign_files import FIXTURES, expected
from imported import source
from models import global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from safetensors.numpy import load_file
from torch import Tensor, nn

import ckpt

pytestmark = pytest.mark.peers
STEP = "iter_0000003"


@pytest.fixture(scope="module", params=["megatron_fp32", "megatron_distributed"])
def there_and_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron's own checkpoint, imported and exported; its name is that of the fixture."""
    pytest.importorskip("megatron.core")
    folder = tmp_path_factory.mktemp("megatron") / request.param
    answer("import", source(request.param) / STEP, folder / "run")
    answer("export", folder / "run", folder / "out", "--format", "megatron", "--optimizer")
    return folder


def loaded(folder: Path, out: Path, world: int, tp: int, kind: str) -> dict[str, Any]:
    """Load in Megatron and go on; return the next losses."""
    out.mkdir()
    script = Path(__file__).with_name("load_megatron.py")
    command = [sys.executable, script, folder, out, str(world), str(tp), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((out / "after.json").read_text())
    return found


CASES = {
    "megatron_fp32": [(2, 2, "fp32"), (2, 1, "fp32")],
    "megatron_distributed": [(2, 1, "distributed"), (2, 2, "bf16")],
}


@pytest.mark.parametrize("case", range(2))
def test_megatron_goes_on(there_and_back: Path, tmp_path: Path, case: int) -> None:
    """Bits and groups are those of the live run that Megatron saved, losses those after its own load."""
    name = there_and_back.name
    world, tp, kind = CASES[name][case]
    found = loaded(there_and_back / "out", tmp_path / "ours", world, tp, kind)
    held = load_file(tmp_path / "ours" / "expected.safetensors")
    wanted, facts = expected(name)
    assert held.keys() == wanted.keys()
    assert all(held[each].tobytes() == x.tobytes() for each, x in wanted.items())
    holds = json.loads((tmp_path / "ours" / "expected.json").read_text())
    assert holds["parameter_steps"] == facts["parameter_steps"]
    assert holds["opt_param_scheduler"] == facts["opt_param_scheduler"]
    for group, other in zip(holds["groups"], facts["groups"], strict=True):
        # Those of the schedule come from the run's settings.
        assert {**other, **group, "names": {*group["names"]}} == {**other, "names": {*other["names"]}}
    if kind == "bf16":
        return  # Megatron's own checkpoint is in another form
    own = loaded(FIXTURES / name / "checkpoint" / STEP, tmp_path / "own", world, tp, kind)
    assert found == own


class Chain(nn.Module):
    """Alike layers between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 6)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return (self.out(x) - labels).square().mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return Megatron's two groups."""
    parameters = [*model.parameters()]
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]


def save_case(run: str) -> None:
    model = seeded(Chain)
    engine = make_engine(model, zero=2, model_parameters=groups(model))
    train(engine, global_batches(2))
    save_and_wait(engine, run)


def sharded_case(folder: str) -> dict[str, Any]:
    """Load parts of the tensors, as Megatron's models ask for them; return this rank's."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing import ShardedTensor

    rank, world = dist.get_rank(), dist.get_world_size()
    wanted = {}
    for state in ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param."):
        key = f"{state}layers.weight"
        cut = int("exp_avg" in state)  # rows of the weights, columns of the moments
        shape = [2 if dim == cut else 4 for dim in range(2)]
        for layer in range(3):
            wanted[f"{key}[{layer}]"] = ShardedTensor.from_rank_offsets(
                key, torch.zeros(shape), (0, layer, 3), (1 + cut, rank, world), prepend_axis_num=1
            )
        key = f"{state}out.bias"
        wanted[key] = ShardedTensor.from_rank_offsets(key, torch.zeros(6), replica_id=rank)
    with warnings.catch_warnings(action="ignore"):
        loaded = dist_checkpointing.load({"mine": wanted}, folder, validate_access_integrity=False)
    return {"mine": loaded["mine"], "iteration": loaded["iteration"]}


def test_ranks_load_parts(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    ranks.run(2, save_case, str(tmp_path / "run"))
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "megatron", "--optimizer")
    stored = ckpt.open_checkpoint(tmp_path / "run")
    for rank, found in enumerate(ranks.run(2, sharded_case, str(tmp_path / "out"))):
        assert found["iteration"] == 2
        half = slice(2 * rank, 2 * rank + 2)
        for prefix, state in {
            "": "fp32",
            "optimizer.state.param.": "fp32",
            "optimizer.state.exp_avg.": "exp_avg",
        }.items():
            for layer in range(3):
                whole = stored.read(f"layers.{layer}.weight", state)
                part = whole[:, half] if state == "exp_avg" else whole[half]
                assert np.array_equal(found["mine"][f"{prefix}layers.weight[{layer}]"].numpy(), part)
            bias = found["mine"][f"{prefix}out.bias"].numpy()
            assert bias.tobytes() == stored.read("out.bias", state).tobytes()
