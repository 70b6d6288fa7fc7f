"""The function for Ray Train's workers that `docs/integrations.md` shows, run by the real Ray unchanged."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from page_diffs import script
from torch import nn

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,  # Ray takes ten seconds to start
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray isn't installed"),
]

STEPS, SAMPLES = 4, 12
SECTION = "Ray Train: the workers' function"

SETUP = """
import json, sys
import ray, torch
import ray.train.torch
import torch.nn.functional as F
from ray.train.torch import TorchTrainer

workers, steps, losses = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ray.init(num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)

def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))

def train_step(model, optimizer, step):
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(step))
    loss = F.mse_loss(model(inputs[rank::ranks]), torch.ones(12 // ranks, 1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    if rank == 0:
        with open(losses, "a") as file:
            file.write(json.dumps([step, mean.item() / ranks]) + "\\n")
"""


def fit(folder: Path, workers: int, steps: int, *, changed: bool) -> dict[int, float]:
    """Run the page's script; return the loss of each step that it took."""
    losses = folder / f"losses{workers}.jsonl"
    page = script(SECTION, changed=changed).replace("/shared/runs/mine", str(folder / "runs" / "mine"))
    (folder / "train.py").write_text(f"{SETUP}\n{page}\nray.shutdown()\n")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # of the workers, too
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HOME": str(folder),  # Ray Train keeps its own records below it
    }
    command = [sys.executable, "train.py", str(workers), str(steps), str(losses)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads(line) for line in losses.read_text().splitlines())


def alone() -> dict[int, float]:
    torch.manual_seed(0)
    model, losses = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(step))
        loss = F.mse_loss(model(inputs), torch.ones(SAMPLES, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.item()
    return losses


def test_the_pages_function_goes_on_with_more_workers(tmp_path: Path) -> None:
    expected = alone()
    first = fit(tmp_path, 2, 2, changed=True)
    then = fit(tmp_path, 3, STEPS, changed=True)
    assert list(then) == [2, 3], "the steps that were left"
    assert first | then == pytest.approx(expected, rel=1e-5)


def test_the_page_changes_nothing_else(tmp_path: Path) -> None:
    found = fit(tmp_path, 2, 2, changed=False)
    assert found == pytest.approx({step: alone()[step] for step in range(2)}, rel=1e-5)
    assert not (tmp_path / "runs").exists()
