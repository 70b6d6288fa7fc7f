"""The loop of plain PyTorch that `docs/integrations.md` shows, run as it stands; imports of the package."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import Stack, global_batches, seeded
from page_diffs import PAGE, script
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

STEPS = 4


def page_case(folder: str, changed: bool, steps: int) -> list[float]:
    model, losses, ranks = seeded(Stack), [], dist.get_world_size()

    def train_step(model: nn.Module, optimizer: Any, step: int) -> None:
        x, y = global_batches(STEPS)[step]
        size = len(x) // ranks
        rows = slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)
        total, count = model.loss_fn(model(x[rows]), y[rows])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = (total / count).detach()
        dist.all_reduce(mean)
        losses.append(mean.item() / ranks)

    os.chdir(folder)
    names = {"torch": torch, "fully_shard": fully_shard, "model": model, "steps": steps}
    exec(script("Your own loop", changed=changed), names | {"train_step": train_step})
    return losses


@pytest.mark.slow
def test_the_pages_script(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(1, page_case, str(tmp_path), False, STEPS)[0]
    assert not list(tmp_path.iterdir())
    found = ranks.run(2, page_case, str(tmp_path), True, 2)[0]
    found += ranks.run(3, page_case, str(tmp_path), True, STEPS)[0]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_pages_names_of_a_stage() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    names: dict[str, Any] = {"re": re}
    exec(block, names)
    assert names["whole_name"]("layers.3.weight") == "layers.15.weight"
    assert names["whole_name"]("norm.weight") == "norm.weight"


def test_the_package_loads_no_library() -> None:
    code = (
        "import sys, uni3d.integrations; print({'torch', 'transformers', 'accelerate'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
