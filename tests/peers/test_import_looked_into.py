"""Commands about topologies handle imported checkpoints, which have no writer topology."""

from pathlib import Path

import numpy as np
import pytest
from commands import answer, run
from foreign_files import expected
from imported import imported, source
from whole_arrays import save_whole

import ckpt
from uni3d.plot.metrics import read_marks, resizes_between

NAME = "deepspeed_zero3_fp32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    imported(source(NAME), folder)
    return folder


def test_the_doctor(made: Path) -> None:
    report = answer("doctor", made, "--world-size", 2)
    assert (report["written_on"], report["imported_from"]) == (None, "deepspeed")
    best = report["recommended"]
    assert (best["pp"], best["dp"], best["tp"], best["zero"]) == (1, 2, 1, 3), "as the run in DeepSpeed"
    assert best["reads"]["least"] > 0
    told = " ".join(run("doctor", made, "--world-size", 2).stdout.split())
    assert "imported from deepspeed, 20" in told
    assert "pp1" not in told
    assert any("says which of them were guesses" in note for note in report["notes"])
    assert answer("inspect", made)[0]["written on"] == "imported from deepspeed"


def test_the_picture_of_its_ranks(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = answer("plot", made, tmp_path / "p.png", "--layout", "--dp", 2)
    shape = list(expected(NAME)[0][f"fp32/{row['atom']}"].shape)
    assert row["before"]["imported_from"] == "deepspeed"
    assert row["before"]["topology"] is None
    assert row["before"]["boxes"] == {"0": {"offset": [0, 0], "shape": shape}}
    assert row["after"]["topology"] == {"pp": 1, "dp": 2, "tp": 1, "zero": 3}
    rows = -(-shape[0] // 2)
    assert [box["shape"][0] for box in row["after"]["boxes"].values()] == [rows, shape[0] - rows]
    done = run("plot", made, tmp_path / "q.png", "--layout", "--dp", 2)
    assert "before: imported from deepspeed (global_step5): 1 part on 1 rank" in done.stdout
    refused = run("plot", made, tmp_path / "r.png", "--layout", "--tp", 2)
    assert refused.returncode == 1
    assert "tp 2 can't be checked: the manifest doesn't say how the model may be split" in refused.stderr


def test_it_is_no_resize_of_a_topology(made: Path, tmp_path: Path) -> None:
    """Check the mark and both sides of the picture for a run that resumed on two ranks."""
    pytest.importorskip("matplotlib")
    writer = {"topology": {"pp": 1, "dp": 2, "tp": 1}, "zero_stage": 1, "shard_group": 2}
    arrays = {("embed.weight", "fp32"): np.zeros((13, 7), np.float32)}
    save_whole(made, "later", arrays, step=6, created="2999-01-02T03:04:05+00:00", writer=writer)
    marks, problems = read_marks(ckpt.open_store(made), "step")
    assert not problems
    assert [(mark.tag, mark.at, str(mark.ranks)) for mark in marks] == [
        ("global_step5", 5, "None"),
        ("later", 6, "pp1 dp2 tp1 zero1"),
    ]
    assert resizes_between(marks) == []
    row = answer("plot", made, tmp_path / "p.png", "--layout", "--atom", "embed.weight")
    assert row["before"]["imported_from"] == "deepspeed"
    assert len(row["after"]["boxes"]) == 2
