"""`python benchmarks/train.py --peers`: every arm in its table, and none that computes something else."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.training import __main__ as program
from benchmarks.training.arms import Arm, all_arms, chosen
from benchmarks.training.launch import Run
from benchmarks.training.report import differences, largest, saves_table, training_table
from benchmarks.training.task import TINY, Task

ROOT = Path(__file__).parents[2]
OURS = Arm(name="uni3d zero0", library="uni3d", ranks=2)
THEIRS = Arm(name="ddp", library="ddp", ranks=2, beside=(OURS.key,))


def figures(seconds: float, losses: list[float], **others: Any) -> Run:
    times = {"first_step": 3.0, "imports": 1.0, "initialize": 0.5, "wall": 1.0, "cpu": 1.0}
    norms: list[float | None] = [None] * len(losses)
    run = Run(
        seconds=[seconds] * 4, losses=losses, norms=norms, parameters=[], peak=64 << 20, saved=0, **times
    )
    return replace(run, **others)


def task_of(arm: Arm, **settings: Any) -> Task:
    given = ["--tiny", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]
    return program.task_of(arm, program.parse_arguments(given), "folder")


def keys(**settings: Any) -> set[str]:
    return {arm.key for arm in chosen(settings.pop("ranks", [2]), None, **settings)}


# --- the arms ------------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_every_arm_trains_alike(tmp_path: Path) -> None:
    arms = chosen([2], None, deepspeed=False)
    written = tmp_path / "figures.json"
    names = ["--arms", *(arm.name for arm in arms)]
    options = ["--tiny", "--rounds", "1", "--ranks", "2", "--folder", str(tmp_path), "--json", str(written)]
    command = [sys.executable, "benchmarks/train.py", "--peers", *options, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()]
    assert not [arm.name for arm in arms if arm.name not in rows]
    found = {arm["name"]: arm["rounds"][0] for arm in json.loads(written.read_text())["arms"]}
    assert len(found) == len(arms)
    assert largest([run["losses"] for run in found.values()]) < 2e-6  # without clipping it would be 1e-5
    assert largest([run["norms"] for run in found.values()]) < 2e-5
    for run in found.values():
        assert run["losses"][-1] < 0.995 * run["losses"][0]
        assert run["peak"] > 0
        assert min(run["imports"], run["initialize"]) > 0
        assert max(run["imports"], run["initialize"]) < run["first_step"]
        assert all(norm > 0 for norm in run["norms"])
    assert len(found["uni3d saves"]["seconds"]) == 20
    assert {name for name, run in found.items() if run["saved"]} == {"uni3d saves"}
    assert found["uni3d saves"]["saved"] == 3
    first, last = found["uni3d pp2"]["parameters"]
    assert (first[0], last[-1]) == ("embed.tokens.weight", "head.weight")
    assert [path for path in tmp_path.iterdir() if path != written] == []


def test_arms_by_name() -> None:
    every = keys(deepspeed=True)
    assert every == {arm.key for arm in all_arms(2)}
    assert not [key for key in keys(deepspeed=False) if key.startswith("deepspeed")]
    assert every - keys(deepspeed=True, precision="bf16") == {"torch tp2@2", "deepspeed zero0@2"}
    assert every - keys(deepspeed=True, compiled=True) == {"torch tp2@2"}
    with pytest.raises(ValueError, match="'zero9' is unknown here; give some of 'ddp', 'fsdp2'"):
        chosen([1], ["zero9"], deepspeed=False)


def test_arms_beside_others_name_arms_that_exist() -> None:
    arms = [arm for world in (1, 2, 4) for arm in all_arms(world)]
    known = {arm.key: arm for arm in arms}
    assert len(known) == len(arms)
    assert {known[key].library for arm in arms for key in arm.beside} == {"uni3d"}
    assert all(arm.beside for arm in arms if arm.library != "uni3d")


# --- the samples ---------------------------------------------------------------------------------------


def test_samples_are_one_global_order() -> None:
    """Ranks that hold replicas share a step's samples out; those that split a model see all of them."""
    [(inputs, targets)] = task_of(Arm(name="", library="uni3d", ranks=1)).samples(3, rank=0)
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.max() < TINY["vocab_size"]
    replicas = [task_of(Arm(name="", library="ddp", ranks=4)).samples(3, rank) for rank in range(4)]
    assert torch.equal(torch.cat([part for [(part, _)] in replicas]), inputs)
    for split in ({"pp": 2}, {"tp": 2}):
        task = task_of(Arm(name="", library="uni3d", ranks=2, **split))
        for rank in range(2):
            parts = task.samples(3, rank)
            assert len(parts) == (4 if task.pp > 1 else 1)
            assert torch.equal(torch.cat([part for part, _ in parts]), inputs)


# --- the report ----------------------------------------------------------------------------------------


def test_ratios_are_by_round() -> None:
    ours = [figures(seconds, [2.0, 1.0]) for seconds in (1.0, 2.0, 4.0)]
    theirs = [figures(seconds, [2.0, 1.0]) for seconds in (2.0, 6.0, 2.0)]
    table = training_table({OURS: ours, THEIRS: theirs}, tokens=1000).splitlines()
    assert "| 500 | 2000 (1000 to 4000) |  |" in table[2]
    assert "| 500 | 2000 (2000 to 6000) | 2 (0.5 to 3) x (uni3d zero0) | 64 MiB |" in table[3]


def test_time_of_saves_beyond_their_cpu_time() -> None:
    arms = {saves: replace(OURS, saves=saves) for saves in (True, False)}
    runs = {
        arms[True]: [figures(1.0, [1.0], wall=22.0, cpu=24.0)],
        arms[False]: [figures(1.0, [1.0], wall=20.0, cpu=20.0)],
    }
    text = saves_table(runs, cores=2)
    assert text is not None
    assert "a step takes 10 % (10 to 10) longer" in text.replace("\n", " ")
    assert "A save takes 10 s of CPU time" in text
    assert "spread over 2 cores, a step takes 0 % (0 to 0) longer" in text
    assert saves_table({OURS: runs[arms[True]]}, cores=2) is None


def test_another_loss_or_norm_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    args: argparse.Namespace = program.parse_arguments(["--tiny"])
    same = {OURS: [figures(1.0, [2.0, 1.0])], THEIRS: [figures(1.0, [2.0, 1.00005])]}
    assert program.conclude(args, same, None) == 0
    other = {OURS: [figures(1.0, [2.0, 1.0])], THEIRS: [figures(1.0, [2.0003, 1.0])]}
    assert program.conclude(args, other, None) == 1
    assert "didn't train alike" in capsys.readouterr().err
    norms = [figures(1.0, [1.0], norms=[norm]) for norm in (3.0, 3.006, None)]
    assert differences({OURS: norms[:1], THEIRS: norms[1:]}) == (0.0, pytest.approx(2e-3))
    assert program.conclude(args, {OURS: norms[:1], THEIRS: norms[1:2]}, None) == 1
    assert largest([[1.0, math.nan], [1.0, 1.0]]) == math.inf
    assert largest([[1.0], [1.0, 5.0]]) == 0.0
