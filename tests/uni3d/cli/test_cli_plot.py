"""`uni3d plot`: its pictures, output and errors."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
from marks import slow
from matplotlib.image import imread
from models import save_and_wait
from ranks import Ranks
from tied_gpt import gpt_engine
from whole_arrays import save_whole

from uni3d.state import Inventory

PLACES = [(1, 2, 1, 1), (2, 1, 1, 1), (1, 1, 2, 3)]
"""pp, dp, tp and ZeRO stage of the checkpoints global_step1 to 3."""


def train_case(place: tuple[int, int, int, int], run: str) -> dict[str, Any]:
    """Train one more step, save, and return the boxes that this rank holds."""
    engine = gpt_engine(*place)
    engine.resume(run)
    loss = engine.train_batch().item()
    save_and_wait(engine, run)
    held = Inventory(engine.model).arrays(engine.optimizer)
    boxes = {
        s.key.atom: {"offset": [*s.box[0]], "shape": [*s.box[1]]} for s, *_ in held if s.key.state == "fp32"
    }
    degrees = dict(zip(("pp", "dp", "tp", "zero"), place, strict=True))
    row = {"step": engine.global_steps, "loss": loss, "lr": engine.get_lr()[0], **degrees}
    return {"row": row, "boxes": boxes}


@pytest.fixture(scope="module")
def trained(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was resized twice, and the boxes that each of its ranks held."""
    run = tmp_path_factory.mktemp("plot") / "run"
    found = [ranks.run(place[0] * place[1] * place[2], train_case, place, str(run)) for place in PLACES]
    lines = [json.dumps(ranks_of_place[0]["row"]) + "\n" for ranks_of_place in found]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "lo')
    return run, [[rank["boxes"] for rank in ranks_of_place] for ranks_of_place in found]


plot = partial(commands.answer, "plot")


def refused(*arguments: object) -> str:
    done = commands.run("plot", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr.splitlines()[-1].removeprefix("error: ")  # after notes on the run's metrics


def boxes_of(side: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(rank): box for rank, box in side["boxes"].items()}


# --- curves --------------------------------------------------------------------------------------------


def test_a_runs_curves(trained: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run, _ = trained
    monkeypatch.chdir(tmp_path)
    done = commands.run("plot", run, "--json")
    row = json.loads(done.stdout)
    assert row["output"] == "run.png"
    assert imread("run.png").shape[2] == 4
    assert row["sources"] == [str(run / "metrics.jsonl")]
    assert {k: (c["points"], c["abandoned"]) for k, c in row["curves"].items()} == {
        "loss": (3, 0),
        "lr": (3, 0),
    }
    named = [dict(zip(("pp", "dp", "tp", "zero"), place, strict=True)) for place in PLACES]
    assert row["resizes"] == [{"after": n, "from": named[n - 1], "to": named[n]} for n in (1, 2)]
    assert row["checkpoints"] == [{"tag": f"global_step{n}", "at": n} for n in (1, 2, 3)]
    assert row["left_out"] == 1
    assert done.stderr == f"{run / 'metrics.jsonl'}: skipped 1 line (truncated, or not of a step)\n"


def test_csv_curves_take_their_resizes_from_the_checkpoints(trained: Any, tmp_path: Path) -> None:
    run, _ = trained
    table = tmp_path / "Train_Samples_train_loss.csv"
    table.write_text("step,train_loss\n12,3\n24,2.5\n36,2.25\n")
    done = commands.run("plot", run, tmp_path / "a.png", "--metrics", tmp_path, "--json")
    row = json.loads(done.stdout)
    assert row["x"] == "samples"
    assert row["resizes_from"] == "checkpoints"
    assert [(r["after"], r["from"]["dp"], r["to"]["pp"], r["to"]["tp"]) for r in row["resizes"]] == [
        (12, 2, 2, 1),
        (24, 1, 1, 2),
    ]
    assert not done.stderr
    shown = commands.run("plot", run, tmp_path / "b.png", "--metrics", table).stdout
    assert shown.splitlines() == [
        f"{tmp_path / 'b.png'}: points: 3 of loss; from {table}",
        "after samples 12: pp1 dp2 tp1 zero1 → pp2 dp1 tp1 zero1",
        "after samples 24: pp2 dp1 tp1 zero1 → pp1 dp1 tp2 zero3",
    ]


def test_another_run_is_compared(trained: Any, tmp_path: Path) -> None:
    run, _ = trained
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    plot(run, tmp_path / "alone.png")
    row = plot(run, tmp_path / "both.png", "--compare", other)
    assert row["compare"] == str(other)
    assert not np.array_equal(imread(tmp_path / "alone.png"), imread(tmp_path / "both.png"))
    (other / "metrics.jsonl").write_text('{"step": 1, "lr": 0.5}\n')
    message = refused(run, tmp_path / "c.png", "--compare", other)
    assert message == f"--compare {other}: expected a loss by step, as in {run / 'metrics.jsonl'}"


# --- ranks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [([], 1, 2), (["--tag", "global_step1"], 0, 1), (["--tag", "global_step2"], 1, 2)],
)
@pytest.mark.parametrize(
    "atom", ["embed.tokens.weight", slow("layers.2.ffn.down.weight"), "norm.weight", slow(None)]
)
def test_layouts_match_the_real_ranks(
    trained: Any, tmp_path: Path, arguments: list[str], first: int, second: int, atom: str | None
) -> None:
    run, held = trained
    of_atom = [] if atom is None else ["--atom", atom]
    row = plot(run, tmp_path / "p.png", "--layout", *arguments, *of_atom)
    assert row["atom"] == (atom or "embed.tokens.weight"), "the largest matrix, 61 x 20, is sharded each time"
    for key, place in (("before", first), ("after", second)):
        real = {rank: boxes[row["atom"]] for rank, boxes in enumerate(held[place]) if row["atom"] in boxes}
        assert boxes_of(row[key]) == real
        assert row[key]["tag"] == f"global_step{place + 1}"
    assert imread(tmp_path / "p.png").std() > 0.01


def test_hypothetical_topologies(trained: Any, tmp_path: Path) -> None:
    """Ask for topology (2, 1, 1) from the checkpoint of (1, 2, 1), and compare with the real one."""
    run, held = trained
    asked = [["--pp", "2", "--dp", "1"], ["--pp", "2", "--world-size", "2"]]
    for n, degrees in enumerate(asked):
        arguments = ["--tag", "global_step1", "--atom", "head.weight", *degrees]
        row = plot(run, tmp_path / f"{n}.png", "--layout", *arguments)
        assert row["atom"] == "embed.tokens.weight", "the head is tied to it"
        assert row["after"]["topology"] == {"pp": 2, "dp": 1, "tp": 1, "zero": 1}
        assert row["after"]["tag"] is None
        assert boxes_of(row["after"]) == dict(enumerate(boxes["embed.tokens.weight"] for boxes in held[1]))
        assert row["after"]["notes"][1] == "pipeline rank 1 (rank 1) holds a tied copy, head.weight"
    alone = plot(run / "global_step3", tmp_path / "c.png", "--layout", "--tp", "1", "--zero", "0")
    assert boxes_of(alone["after"])[0]["shape"] == alone["shape"]


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tag", "global_step1"], "--tag needs --layout"),
        (["--pp", "2"], "--pp needs --layout"),
        (["--layout", "--metrics", "x"], "--metrics and --layout are mutually exclusive"),
        (["--layout", "--compare", "x"], "--compare and --layout are mutually exclusive"),
        (["--metrics", "nowhere.jsonl"], "nowhere.jsonl can't be read"),
        (["--layout", "--tag", "global_step3"], "no checkpoint after global_step3 on another topology"),
        (["--layout", "--tag", "global_step9"], "the tags there are: global_step1"),
        (["--layout", "--atom", "x.weight"], "there is no atom 'x.weight'"),
        (
            ["--layout", "--dp", "2", "--world-size", "6"],
            "pp(1) * dp(2) * tp(2) = 4, but the world size is 6",
        ),
        (
            ["--layout", "--dp", "2", "--world-size", "8"],
            "pp(1) * dp(2) * tp(2) = 4, but the world size is 8",
        ),
        (["--layout", "--world-size", "3"], "pp(1) * tp(2) = 2 doesn't divide the world size 3; change"),
        (["--layout", "--zero", "4"], "ZeRO stage 4 doesn't exist"),
        (["--layout", "--dp", "0"], "dp(0) must be at least 1"),
    ],
)
def test_mistakes(trained: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "p.png"
    assert message in refused(trained[0], output, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("degrees", [(1, 1, 3), (7, 1, 1), (1, 5, 1), (7, 5, 3)])
def test_impossible_topologies(trained: Any, tmp_path: Path, degrees: tuple[int, int, int]) -> None:
    """Plot refuses the same topologies as the doctor, with the same message."""
    pp, dp, tp = degrees
    asked = ["--pp", f"{pp}", "--dp", f"{dp}", "--tp", f"{tp}", "--world-size", f"{pp * dp * tp}"]
    report = json.loads(commands.run("doctor", trained[0], *asked, "--json").stdout)
    assert len(report["refused"]) == sum(degree > 1 for degree in degrees)
    message = refused(trained[0], tmp_path / "p.png", "--layout", *asked)
    assert report["reasons"][0].endswith(f": {message}")
    assert not list(tmp_path.iterdir())


def test_bad_paths(trained: Any, tmp_path: Path) -> None:
    run, _ = trained
    output = tmp_path / "p.png"
    assert "is not a folder" in refused(tmp_path / "nowhere", output)
    assert "is the folder of a single checkpoint" in refused(run / "global_step1", output)
    assert "is the folder of one checkpoint, not of a run; give the topology after" in refused(
        run / "global_step1", output, "--layout"
    )
    assert "has no metrics: looked for" in refused(tmp_path, output)
    assert "holds no committed checkpoint" in refused(tmp_path, output, "--layout")
    assert "expected a name that ends in .png" in refused(run, tmp_path / "p.pdf")
    assert "no such folder" in refused(run, tmp_path / "no" / "p.png")


def test_a_picture_is_only_overwritten_with_force(trained: Any, tmp_path: Path) -> None:
    run, _ = trained
    output = tmp_path / "p.png"
    output.write_text("precious")
    assert refused(run, output) == f"{output} exists; give another name, or --force to replace it"
    assert output.read_text() == "precious"
    plot(run, output, "--force")
    assert imread(output).ndim == 3
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def save_by_hand(run: Path, writer: dict[str, Any], model: dict[str, Any]) -> None:
    document = {"step": 1, "created": "2026-01-02T03:04:05+00:00", "writer": writer, "model": model}
    save_whole(run, "t", {("a.weight", "fp32"): np.zeros((4, 4), np.float32)}, **document)


@pytest.mark.parametrize(
    ("writer", "model", "arguments", "message"),
    [
        ((1, 1, 2), {}, ["--tp", "1"], "so the parts that the ranks held are unknown"),
        ((1, 1, 1), {}, ["--tp", "2"], "tp 2 can't be checked: the manifest doesn't say how"),
        (
            (1, 1, 1),
            {"declared": {"class": "Net"}},
            ["--tp", "2"],
            "tp 2 needs a model with a tp_plan, but Net has none",
        ),
        ((1, 1, 1), {"declared": {"class": "Net"}}, ["--pp", "2"], "pipeline_layers, but Net has none"),
        ((2, 1, 1), {}, ["--pp", "1"], "which layers each of the 2 pipeline ranks had"),
        (None, {}, ["--dp", "2"], "doesn't record the topology that wrote the checkpoint"),
        ((1, 1, 1), {"declared": {"tp_plan": {"a": "odd"}}}, ["--tp", "2"], "the style 'odd' of the tp_plan"),
        ((1, 1, 2), {"declared": {"tp_plan": {"a": "odd"}}}, ["--tp", "1"], "the style 'odd' of the tp_plan"),
    ],
)
def test_a_manifest_that_does_not_say_it(
    tmp_path: Path, writer: Any, model: dict[str, Any], arguments: list[str], message: str
) -> None:
    topology = dict(zip(("pp", "dp", "tp"), writer, strict=True)) if writer else None
    run = tmp_path / "run"
    save_by_hand(run, {"topology": topology, "zero_stage": 1} if writer else {}, model)
    assert message in refused(run, tmp_path / "p.png", "--layout", *arguments)


def test_an_old_manifest_says_enough_without_tensor_parallelism(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_by_hand(run, {"topology": {"pp": 1, "dp": 3, "tp": 1}, "zero_stage": 2}, {})
    row = plot(run, tmp_path / "p.png", "--layout", "--dp", "2")
    assert [box["shape"] for box in row["before"]["boxes"].values()] == [[2, 4], [2, 4], [0, 4]]
    assert row["before"]["notes"] == [
        "rank 2 holds an empty part",
        "the manifest has no shard_group; drawn as sharded over all of dp(3)",
    ]
    assert [box["shape"] for box in row["after"]["boxes"].values()] == [[2, 4], [2, 4]]


def test_a_missing_matplotlib_is_a_one_line_error(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('No module named matplotlib')")
    root = Path(__file__).resolve().parents[3]
    command = [str(Path(sys.executable).parent / "uni3d"), "plot", str(trained[0]), str(tmp_path / "p.png")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    message = "drawing needs matplotlib (No module named matplotlib); pip install 'uni3d[plot]'"
    assert done.stderr == f"error: {message}\n"


def test_a_layout_loads_no_torch(trained: Any, tmp_path: Path) -> None:
    arguments = ["plot", str(trained[0]), str(tmp_path / "p.png"), "--layout"]
    code = f"import sys, uni3d.cli\nuni3d.cli.app({arguments!r}, standalone_mode=False)\n"
    code += "assert (tmp := {'torch', 'matplotlib.pyplot'} & set(sys.modules)) == set(), tmp"
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").exists()
