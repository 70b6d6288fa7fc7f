"""The training script and the demo, as a user starts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "megatron_gpt"
BIN = Path(sys.executable).parent


def train(
    run: Path, steps: int, *flags: str, processes: int = 1, device: str = "cpu", config: Path | None = None
) -> subprocess.CompletedProcess[str]:
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(processes), "--"]
    command = [*(torchrun if processes > 1 else [sys.executable]), str(EXAMPLE / "train.py")]
    command += ["--config", str(config or EXAMPLE / "configs" / "tiny.json")]
    command += ["--steps", str(steps), "--run", str(run), "--metrics", str(metrics_file(run)), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def metrics_file(run: Path) -> Path:
    return run.parent / "metrics" / f"{run.name}.jsonl"  # a folder that train.py must create


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics_file(run).read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a config that trains in an instant."""
    config = json.loads((EXAMPLE / "configs" / "tiny.json").read_text())
    config["model"] |= {"hidden_size": 32, "num_layers": 2}
    config["uni3d"] |= {"train_batch_size": 24}
    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(config | {"seq_len": 16}))
    return path


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, small: Path) -> tuple[Path, Any]:
    """Train two steps on one rank and two on a pipeline of two; return the run, and how that ended."""
    run = tmp_path_factory.mktemp("resumed") / "run"
    first = train(run, 2, config=small)
    assert first.returncode == 0, first.stderr
    return run, train(run, 4, "--pp", "2", processes=2, config=small)


@pytest.mark.slow
def test_bad_degrees_are_one_line(tmp_path: Path) -> None:
    result = train(tmp_path / "run", 1, "--pp", "2", "--dp", "2", "--tp", "3")
    assert result.returncode == 1
    assert result.stderr == "error: pp(2) * dp(2) * tp(3) = 12, but the world size is 1; change one of them\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_on_from_its_newest_checkpoint(resumed: Any) -> None:
    run, result = resumed
    assert result.returncode == 0, result.stderr
    assert "step 4: saved; validation loss " in result.stdout
    phases = re.findall(r"start-up: (.+) \d+\.\d s\n", result.stdout)
    expected = ["imports", "process group", "data, model and optimizer at step 2"]
    assert phases == expected, "of rank 0"
    assert "global_step2: 60 arrays restored, 0 defaulted, 0 dropped" in result.stderr
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["pp"] for row in rows] == [1, 1, 2, 2]
    assert [row["samples"] for row in rows] == [24, 48, 72, 96]
    assert [row["tokens"] for row in rows] == [row["samples"] * 16 for row in rows]


@pytest.mark.slow
def test_it_is_the_run_without_an_interruption(resumed: Any, tmp_path: Path, small: Path) -> None:
    whole, (run, _) = tmp_path / "whole", resumed
    result = train(whole, 4, "--save-every", "2", config=small)
    assert result.returncode == 0, result.stderr
    for key in ("loss", "grad_norm", "lr"):
        expected = [row[key] for row in metrics(whole)]
        assert [row[key] for row in metrics(run)] == pytest.approx(expected, rel=1e-5), key
    again = train(run, 4, config=small)
    assert again.returncode == 0, again.stderr
    assert f"nothing to do: {run} is at step 4, and --steps is 4\n" in again.stdout
    assert len(metrics(run)) == 4


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, str(EXAMPLE / "demo.py"), "--out", str(out), "--steps", "40"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (out / "loss.png").stat().st_size > 10_000
    assert "largest relative difference" in result.stdout
    assert "\nAt noon the " in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_run_resumes_on_cpus(tmp_path: Path, small: Path) -> None:
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    assert train(moved, 3, device="cuda", config=small).returncode == 0
    assert train(moved, 6, "--dp", "2", processes=2, config=small).returncode == 0
    assert train(whole, 6, config=small).returncode == 0
    expected = [row["loss"] for row in metrics(whole)]
    assert [row["loss"] for row in metrics(moved)] == pytest.approx(expected, rel=1e-4)
