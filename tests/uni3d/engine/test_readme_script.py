"""The lines by which the README turns a script of DeepSpeed's into one of uni3d's, run as they stand."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from models import Stack, global_batches, seeded
from ranks import Ranks
from torch.utils.data import TensorDataset

README = (Path(__file__).parents[3] / "README.md").read_text()


def readme_case(folder: str, steps: int) -> tuple[int, list[float]]:
    diff = re.findall(r"^```diff\n(.*?)^```$", README, re.M | re.S)[0]
    script = "\n".join(line[1:] for line in diff.splitlines() if (line or " ")[0] in " +")
    os.chdir(folder)
    (batch,) = global_batches(1, 320)
    names: dict[str, Any] = {"model": seeded(Stack), "dataset": TensorDataset(*batch)}
    exec(script, names)
    engine = names["engine"]
    began = engine.global_steps
    losses = [engine.train_batch().item() for _ in range(steps)]
    engine.save_checkpoint("runs/mine")
    engine.wait_for_checkpoint()
    return began, losses


def test_the_readmes_script_resumes_on_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (config,) = re.findall(r"^```json\n(.*?)^```$", README, re.M | re.S)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    whole = ranks.run(2, readme_case, str(tmp_path / "whole"), 4)[0]
    began, losses = ranks.run(2, readme_case, str(tmp_path / "parts"), 2)[0]
    again, more = ranks.run(4, readme_case, str(tmp_path / "parts"), 2)[0]
    assert (whole[0], began, again) == (0, 0, 2)
    assert losses + more == pytest.approx(whole[1], rel=1e-2)  # in bf16
