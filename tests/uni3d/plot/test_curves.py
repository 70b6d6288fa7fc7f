"""A run's curves, topologies and marks, from its metrics files and checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from whole_arrays import save_whole

import ckpt
from parallel import Ranks
from uni3d.config.sections import CsvMonitorConfig
from uni3d.observe.monitors import CsvMonitor
from uni3d.plot.metrics import CSV_NAMES, find_metrics, read_marks, read_metrics, resizes_between

ONE, TWO, FOUR = (Ranks(pp=p, dp=d, tp=1, zero=1) for p, d in ((1, 1), (2, 1), (2, 2)))


def line(step: int, loss: Any = None, ranks: Ranks | None = ONE, **more: Any) -> str:
    loss = float(step) if loss is None else loss
    return json.dumps({"step": step, "loss": loss, **(vars(ranks) if ranks else {}), **more}) + "\n"


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(lines))
    return str(path)


def test_the_later_line_counts_and_what_it_takes_back_is_abandoned(tmp_path: Path) -> None:
    """The run resumes twice from step 4, and gets further the first time."""
    attempts = [(range(1, 9), 0), (range(5, 8), 10), (range(5, 7), 20)]
    lines = [line(step, step + more) for steps, more in attempts for step in steps]
    curve = read_metrics([write(tmp_path / "m.jsonl", *lines)]).curves["loss"]
    assert curve.points == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 25), (6, 26)], "not step 8 of the first"
    assert curve.abandoned == [[(5, 5), (6, 6), (7, 7), (8, 8)], [(5, 15), (6, 16), (7, 17)]]


def test_a_step_without_a_number_takes_back_too(tmp_path: Path) -> None:
    lines = [line(1), line(2), line(3), json.dumps({"step": 2, "loss": None, "lr": 0.5}) + "\n"]
    metrics = read_metrics([write(tmp_path / "m.jsonl", *lines)])
    assert metrics.curves["loss"].points == [(1, 1)]
    assert metrics.curves["lr"].points == [(2, 0.5)]


@pytest.mark.parametrize(
    ("bad", "left_out"),
    [
        ('{"step": 3, "lo', 1),
        ('{"step": 3, "lo{"step": 4, "loss": 1}\n', 1),
        ('[1]\n"x"\n\n{"loss": 3}\n{"step": true, "loss": 3}\n{"step": NaN, "loss": 1}\n', 5),
        ("\n  \n", 0),
    ],
)
def test_lines_that_say_nothing_are_left_out_and_counted(tmp_path: Path, bad: str, left_out: int) -> None:
    path = write(tmp_path / "m.jsonl", line(1), bad)
    metrics = read_metrics([path])
    assert metrics.curves["loss"].points == [(1, 1)]
    assert metrics.left_out == ({path: left_out} if left_out else {})
    assert metrics.x == "step"


def test_what_is_not_finite_is_kept_as_that(tmp_path: Path) -> None:
    text = line(1) + line(2, math.nan) + line(4, math.inf) + line(5, grad_norm="much")
    metrics = read_metrics([write(tmp_path / "m.jsonl", text)])
    points = metrics.curves["loss"].points
    assert [x for x, _ in points] == [1, 2, 4, 5]
    assert [math.isfinite(y) for _, y in points] == [True, False, False, True]
    assert "grad_norm" not in metrics.curves


def test_resizes_are_where_the_topology_changes(tmp_path: Path) -> None:
    """An abandoned resize doesn't count, and neither does a line without a topology."""
    lines = [line(1), line(2, ranks=None), line(3), line(4, ranks=FOUR), line(5, ranks=FOUR)]
    lines += [line(4, ranks=TWO), line(5, ranks=TWO), line(6, pp=0, ranks=None), line(7, ranks=ONE)]
    found = read_metrics([write(tmp_path / "m.jsonl", *lines)]).resizes()
    assert [(r.at, r.before, r.after) for r in found] == [(3, ONE, TWO), (5, TWO, ONE)]
    assert str(found[0]) == "pp1 dp1 tp1 zero1 → pp2 dp1 tp1 zero1"


def test_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.jsonl", line(1), line(2)), write(tmp_path / "b.jsonl", line(2, 9), line(3))
    assert read_metrics([a, b]).curves["loss"].points == [(1, 1), (2, 9), (3, 3)]


def test_a_monitors_tables_are_read(tmp_path: Path) -> None:
    monitor = CsvMonitor(CsvMonitorConfig(enabled=True, output_path=str(tmp_path), job_name="job"))
    for samples in (8, 16, 24, 16):
        monitor.write({"train_loss": samples / 2, "lr": 0.5, "grad_norm": math.inf, "loss_scale": 1}, samples)
    folder = tmp_path / "job"
    metrics = read_metrics([str(folder)])
    assert metrics.x == "samples"
    assert metrics.curves.keys() == {"loss", "lr", "grad_norm"}
    assert metrics.curves["loss"].points == [(8, 4), (16, 8)]
    assert metrics.curves["loss"].abandoned == [[(16, 8), (24, 12)]]
    alone = read_metrics([str(folder / "Train_Samples_lr.csv")])
    assert alone.curves.keys() == {"lr"}
    assert find_metrics(ckpt.open_store(folder)) == [
        str(folder / f"Train_Samples_{name}.csv") for name in sorted(CSV_NAMES)
    ]


def test_half_a_number_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "Train_Samples_train_loss.csv"
    path.write_text("step,train_loss\n8,3.25\n16,x\n,\n24,3.1")
    metrics = read_metrics([str(path)])
    assert metrics.curves["loss"].points == [(8, 3.25)]
    assert metrics.left_out == {str(path): 3}


def test_a_runs_metrics_are_found_in_its_folder_then_beside_it(tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(
        FileNotFoundError, match=rf"looked for {run}/metrics.jsonl, {run}.jsonl and {run}/Train"
    ):
        find_metrics(ckpt.open_store(run))
    beside = write(tmp_path / "run.jsonl", line(1))
    assert find_metrics(ckpt.open_store(run)) == [beside]
    monkeypatch.chdir(run)
    assert find_metrics(ckpt.open_store(".")) == [beside]
    inside = write(run / "metrics.jsonl", line(1))
    assert find_metrics(ckpt.open_store(run)) == [inside]


def test_a_run_at_a_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/curves/run/metrics.jsonl", line(1).encode())
    (found,) = find_metrics(ckpt.open_store("memory://curves/run"))
    assert read_metrics([found]).curves["loss"].points == [(1, 1)]
    memory.rm("/curves", recursive=True)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["nothing.jsonl"], OSError, "nothing.jsonl can't be read: No such file"),
        (["folder"], OSError, "folder is a folder without Train_Samples_"),
        (["a.jsonl", "Train_Samples_lr.csv"], ValueError, "of two kinds"),
        (["other.csv"], ValueError, "unknown curve"),
        (["empty.jsonl"], ValueError, "no line with a number of loss, grad_norm or lr"),
    ],
)
def test_what_can_not_be_read(tmp_path: Path, names: list[str], error: type[Exception], message: str) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "a.jsonl", line(1))
    write(tmp_path / "empty.jsonl")
    for name in ("other", "Train_Samples_lr"):
        write(tmp_path / f"{name}.csv", "step,lr\n1,2\n")
    with pytest.raises(error, match=message):
        read_metrics([str(tmp_path / name) for name in names])


# --- checkpoints ---------------------------------------------------------------------------------------


def save(run: Path, tag: str, step: int, created: int, ranks: Ranks | None, **document: Any) -> None:
    writer = (
        {"topology": {a: getattr(ranks, a) for a in ("pp", "dp", "tp")}, "zero_stage": 1} if ranks else {}
    )
    said = {"step": step, "created": f"2026-01-02T03:{created:02}:00+00:00", "writer": writer, **document}
    save_whole(run, tag, {("a", "fp32"): np.zeros(2, np.float32)}, **said)


def test_checkpoints_are_marks_and_tell_of_resizes(tmp_path: Path) -> None:
    """The run goes back from step 40 to 20, and continues on another topology."""
    written = [(10, ONE), (20, ONE), (30, FOUR), (40, FOUR), (25, TWO), (35, TWO), (45, ONE)]
    for created, (step, ranks) in enumerate(written):
        save(tmp_path, f"t{step}", step, created, ranks, engine={"global_samples": 8 * step})
    marks, problems = read_marks(ckpt.open_store(tmp_path), "samples")
    assert not problems
    assert [(m.tag, m.at, m.ranks) for m in marks] == [(f"t{s}", 8 * s, r) for s, r in written]
    found = resizes_between(marks)
    assert [(r.at, r.before, r.after) for r in found] == [(160, ONE, TWO), (280, TWO, ONE)]
    by_step = resizes_between(read_marks(ckpt.open_store(tmp_path), "step")[0])
    assert [r.at for r in by_step] == [20, 35]


def test_a_checkpoint_that_says_nothing_is_no_mark_and_is_named(tmp_path: Path) -> None:
    save(tmp_path, "good", 1, 1, None)
    save(tmp_path, "bad", 2, 2, ONE)
    manifest = tmp_path / "bad" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"t', b'"T', 1))
    marks, problems = read_marks(ckpt.open_store(tmp_path), "step")
    assert [(m.tag, m.ranks) for m in marks] == [("good", None)]
    assert len(problems) == 1
    assert problems[0].startswith("bad isn't marked: ")
    marks, problems = read_marks(ckpt.open_store(tmp_path), "samples")
    assert not marks
    assert any("good isn't marked" in problem and "samples" in problem for problem in problems)
