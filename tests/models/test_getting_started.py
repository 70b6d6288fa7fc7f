"""DeepSpeed's getting-started script runs with only its import changed."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uni3d as deepspeed

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "getting_started"


def test_the_readmes_command_learns(tmp_path: Path) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    command = re.search(r"```sh\n(.*?)```", readme, re.DOTALL)
    line = command[1].replace("torchrun", str(Path(sys.executable).parent / "torchrun"))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    losses = [float(x) for x in re.findall(r"^epoch \d: mean loss (\S+)$", result.stdout, re.MULTILINE)]
    assert len(losses) == 4, "one line an epoch, from one rank"
    assert losses[0] > 0.3
    assert losses[-1] < 0.1
    config = json.loads((EXAMPLE / "ds_config.json").read_text())
    assert config["zero_optimization"] == {"stage": 2}


def test_the_arguments_that_deepspeed_adds() -> None:
    parser = argparse.ArgumentParser()
    assert deepspeed.add_config_arguments(parser) is parser
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds.json"])
    assert (given.deepspeed, given.deepspeed_config) == (True, "ds.json")
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None}


def test_arguments_of_init_distributed_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^dist_backend is 'mpi'; expected 'nccl', 'gloo' or None$"):
        deepspeed.init_distributed("mpi")
    with pytest.raises(ValueError, match=r"doesn't support rank, world_size; start the processes"):
        deepspeed.init_distributed(rank=0, world_size=1)
