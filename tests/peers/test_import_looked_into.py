"""Commands about topologies handle imported checkpoints, which have no writer topology."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run
from imported import expected, imported, source

import ckpt
from uni3d.manifest import RunManifest
from uni3d.plot.metrics import read_marks, resizes_between

NAME = "deepspeed_zero3_fp32"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "run"
    imported(source(NAME), folder)
    return folder


def said(*arguments: object) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_doctor(made: Path) -> None:
    report = said("doctor", made, "--world-size", 2)
    assert (report["written_on"], report["imported_from"]) == (None, "deepspeed")
    best = report["recommended"]
    assert (best["pp"], best["dp"], best["tp"], best["zero"]) == (1, 2, 1, 3), "as the run in DeepSpeed"
    assert best["reads"]["least"] > 0
    told = " ".join(run("doctor", made, "--world-size", 2).stdout.split())
    assert "imported from deepspeed, 20" in told
    assert "pp1" not in told
    assert any("says which of them were guesses" in note for note in report["notes"])
    assert said("inspect", made)[0]["written on"] == "imported from deepspeed"  # type: ignore[index]


def test_the_picture_of_its_ranks(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    row = said("plot", made, tmp_path / "p.png", "--layout", "--dp", 2)
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
    run_of = ckpt.open_store(made)
    spec = ckpt.ShardSpec(ckpt.ArrayKey("embed.weight", "fp32"), "float32", (13, 7), ckpt.Box.whole((13, 7)))
    ckpt.save(
        made,
        "later",
        [ckpt.Shard(spec, np.zeros((13, 7), np.float32))],
        plan=ckpt.make_plan({0: [spec]}),
        comm=ckpt.Solo(),
        document={
            "step": 6,
            "created": "2999-01-02T03:04:05+00:00",
            "writer": {"topology": {"pp": 1, "dp": 2, "tp": 1}, "zero_stage": 1, "shard_group": 2},
        },
        durable=False,
    )
    marks, problems = read_marks(run_of, "step")
    assert not problems
    assert [(mark.tag, mark.at, str(mark.ranks)) for mark in marks] == [
        ("global_step5", 5, "None"),
        ("later", 6, "pp1 dp2 tp1 zero1"),
    ]
    assert resizes_between(marks) == []
    row = said("plot", made, tmp_path / "p.png", "--layout", "--atom", "embed.weight")
    assert row["before"]["imported_from"] == "deepspeed"
    assert len(row["after"]["boxes"]) == 2


def test_what_manifests_say() -> None:
    manifest = {"writer": {"topology": {"pp": 1, "dp": 1, "tp": 1}, "zero_stage": 0}}
    read = RunManifest.read(manifest)
    assert (str(read.written_on), read.imported_from) == ("pp1 dp1 tp1 zero0", None)
    manifest["writer"]["imported"] = {"from": "torch"}
    read = RunManifest.read(manifest)
    assert (read.written_on, read.imported_from) == (None, "torch")
