"""A run of uni3d's, exported, goes on in DeepSpeed."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import continues_model
import numpy as np
import pytest
from commands import answer
from foreign_files import expected
from ranks import Ranks
from safetensors.numpy import load_file

import ckpt
import uni3d as package

pytestmark = pytest.mark.peers


def save_case(run: str) -> None:
    settings = continues_model.config() | {"zero_optimization": {"stage": 1}, "parallel": {"device": "cpu"}}
    engine = package.initialize(model=continues_model.model(), config=settings)[0]
    rank, share = engine.model.topology.dp_rank, continues_model.BATCH // engine.world_size
    mine = slice(rank * share, (rank + 1) * share)
    for step in range(continues_model.STEPS_BEFORE):
        inputs, labels = continues_model.batch(step)
        engine.train_batch(iter([(inputs[mine], labels[mine])]))
    engine.save_checkpoint(run, client_state={"mine": ["kept"]})
    engine.wait_for_checkpoint()


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of an engine on two ranks, and its export."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    with warnings.catch_warnings():
        ranks.run(2, save_case, str(folder / "run"))
    answer("export", folder / "run", folder / "out", "--format", "deepspeed-universal")
    return folder


CASES = [
    (1, 1, ""),
    (2, 1, ""),
    (2, 2, ""),
    (4, 2, ""),
    (2, 3, ""),
    (1, 3, ""),
    (2, 1, "bf16"),
    (2, 3, "bf16"),
]


@pytest.mark.parametrize(("world", "zero", "kind"), CASES)
def test_deepspeed_goes_on(run: Path, tmp_path: Path, world: int, zero: int, kind: str) -> None:
    """Bits are those of the checkpoint; losses, norms and rates those of a run that was DeepSpeed's alone."""
    script = Path(__file__).with_name("load_deepspeed.py")
    command = [
        sys.executable,
        script,
        run / "out",
        tmp_path,
        str(world),
        str(zero),
        *([kind] if kind else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    stored = ckpt.open_checkpoint(run / "run")
    held = load_file(tmp_path / "held.safetensors")
    assert {*held} == {f"{key.atom}/{key.state}" for key in stored.arrays}
    for key in stored.arrays:
        found = held[f"{key.atom}/{key.state}"]
        assert found.astype(np.float32).tobytes() == stored.read(*key).tobytes(), key
    facts = json.loads((tmp_path / "after.json").read_text())
    assert facts["global_steps"] == continues_model.STEPS_BEFORE
    assert facts["global_samples"] == continues_model.STEPS_BEFORE * continues_model.BATCH
    assert facts["mine"] == ["kept"]
    if kind == "bf16":
        return  # no uninterrupted run to compare with
    for row, wanted in zip(facts["after"], expected("deepspeed_continues")[1]["after"], strict=True):
        assert row == pytest.approx(wanted, rel=2e-5), row["step"]
