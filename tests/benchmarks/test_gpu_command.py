"""`python -m benchmarks.gpu`: a row for every part, also for those that fail or are skipped."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.parts import offload_row, stall_row, training_rows, tried
from benchmarks.gpu.report import PartReport, Row, table
from benchmarks.gpu.schedule import Clock, Outcome, Part, PartFailedError, last_error, run, run_parts
from benchmarks.gpu.search import Estimate, Try, estimate, largest, offload_model, search
from benchmarks.training.task import out_of_memory

ROOT = Path(__file__).parents[2]
TRIAL = ["--device", "cpu", "--config", "tiny.json", "--precision", "fp32", "--no-compile", "--rounds", "1"]
SIZES = ["--micro-batches", "1", "2", "--hidden", "64", "--max-layers", "2"]


def command(*options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


# --- the command ---------------------------------------------------------------------------------------


@pytest.mark.matrix
def test_every_part_has_its_row(tmp_path: Path) -> None:
    done = command(*TRIAL, *SIZES, "--out", str(tmp_path / "gpu.json"), "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    names = ["tests", "training, micro batch 1", "stall", "training, micro batch 2", "offload"]
    assert [part["name"] for part in written["parts"]] == names
    assert {part["status"] for part in written["parts"]} == {"done"}
    tests, small, stall, large, offload = [part["rows"] for part in written["parts"]]
    assert tests[0]["figures"].keys() <= {"passed", "skipped"}
    for rows in (small, large):
        assert [row["what"].split(": ")[1] for row in rows] == ["engine", "bare loop"]
        assert all(row["figures"]["parameters"] == 771_200 for row in rows)
    assert stall[0]["figures"]["bytes"] == 3 * 4 * 771_200
    assert len(stall[0]["figures"]["stalls"]) == 3
    assert [each["fits"] for each in offload[0]["figures"]["tries"]][-1]
    for row in (*tests, *small, *stall, *large, *offload):
        assert f"| {row['what']} | {row['measured']} |" in done.stdout
    assert "not for RESULTS.md" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


@pytest.mark.slow
def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    missing = str(tmp_path / "nowhere")
    done = command(*TRIAL, "--parts", "stall", "--out", str(out), "--folder", missing)
    assert done.returncode == 1
    assert "| stall | **failed**: FileNotFoundError: " in done.stdout
    [part] = json.loads(out.read_text())["parts"]
    assert part["status"] == "failed"
    assert missing in part["error"]


@pytest.mark.slow
def test_without_time_all_is_skipped(tmp_path: Path) -> None:
    done = command(*TRIAL, "--minutes", "0", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0
    assert done.stdout.count("**skipped**: not begun: 0 s were left") == 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "gpu.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no GPU: torch ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- the schedule --------------------------------------------------------------------------------------


def test_parts_within_a_budget() -> None:
    given: dict[str, float] = {}
    row = Row(what="a", measured="1")

    def work(name: str, clock: Clock) -> list[Row]:
        given[name] = clock.left
        if name == "fails":
            raise PartFailedError("for a reason", [row])
        if name == "breaks":
            raise KeyError(name)
        return [row]

    def part(name: str, limit: float, least: float) -> Part:
        return Part(name=name, work=lambda clock: work(name, clock), limit=limit, least=least)

    shown: list[PartReport] = []
    parts = [part("fails", 50, 10), part("long", 500, 10), part("breaks", 9, 9), part("late", 50, 200)]
    reports = run_parts(parts, Clock(100), shown.append)
    assert shown == reports
    told = [("failed", 1), ("done", 1), ("failed", 0), ("skipped", 0)]
    assert [(report.status, len(report.rows)) for report in reports] == told
    assert 0 < given["fails"] <= 50
    assert 50 < given["long"] <= 100
    text = table(reports)
    assert "| fails | **failed**: for a reason |" in text
    assert "| breaks | **failed**: KeyError: 'breaks' |" in text
    assert "| late | **skipped**: not begun: " in text


def test_a_process_is_ended_with_its_children(tmp_path: Path) -> None:
    """Figures that it has written until then are kept."""
    figures, child = tmp_path / "figures.json", tmp_path / "child"
    script = (
        "import subprocess, sys, time, pathlib\n"
        f"p = subprocess.Popen(['sleep', '60']); pathlib.Path({str(child)!r}).write_text(str(p.pid))\n"
        f"pathlib.Path({str(figures)!r}).write_text('[1]'); time.sleep(60)"
    )
    done = run(["-c", script], Clock(2.0), figures)
    assert (done.code, done.figures) == (None, [1])
    assert "its time limit" in done.error
    for _ in range(500):  # the kernel ends it when it next would run
        if not runs(child.read_text()):
            break
        time.sleep(0.01)
    assert not runs(child.read_text())


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_last_line_of_an_error() -> None:
    done = run(["-c", "import sys; print('a'); raise ValueError('wrong\\nand more')"], Clock(20))
    assert done.code == 1
    assert done.error == "ValueError: wrong"
    assert last_error("x\ntorch.OutOfMemoryError: CUDA\n[W] NCCL warns\n") == "torch.OutOfMemoryError: CUDA"
    assert run(["-c", "import os; os.kill(os.getpid(), 9)"], Clock(20)).error == "ended by SIGKILL"


# --- rows ----------------------------------------------------------------------------------------------


def arm(seconds: float, mfu: float | None = None) -> dict[str, Any]:
    return {"seconds": [seconds] * 3, "tokens_per_second": 1 / seconds, "mfu": mfu, "peak": 1 << 30}


def test_bars_of_training() -> None:
    engine, bare = training_rows(
        "x", 8, {"engine": {"engine": arm(2.0, 0.5)}, "bare": {"bare": arm(1.9, 0.56)}}
    )
    assert (engine.met, bare.met) == (False, False)
    assert "engine 0.950 x as fast" in bare.beside
    engine, bare = training_rows("x", 8, {"engine": {"engine": arm(2.0, 0.55)}, "bare": {"bare": arm(2.0)}})
    assert (engine.met, bare.met) == (True, True)


def test_out_of_memory_is_a_row() -> None:
    out = {"out_of_memory": "CUDA out of memory"}
    rows = training_rows("x", 16, {"engine": out, "bare": {"bare": arm(1.0)}})
    assert [(row.measured, row.met) for row in rows[:1]] == [("out of memory", None)]
    assert rows[1].met is None


def test_out_of_memory_is_found_behind_other_errors() -> None:
    gathering = RuntimeError("gathering failed")
    gathering.__cause__ = torch.OutOfMemoryError("CUDA out of memory.\nTried")
    assert out_of_memory(gathering) == "CUDA out of memory."
    assert out_of_memory(RuntimeError("another")) is None


def test_the_bar_of_a_stall() -> None:
    found = {"bytes": 1 << 30, "stalls": [1.0, 2.2, 9.0], "copies": [1.0, 2.0, 3.0], "first": 5.0}
    row = stall_row("x", found)
    assert row.met is True
    assert "ratio 1.10" in row.beside
    assert stall_row("x", found | {"stalls": [1.2, 2.4, 3.6]}).met is False


# --- the largest model with offload --------------------------------------------------------------------


def tries(true: int, estimated: int, most: int = 1000, left: float = 1e9) -> list[Try]:
    """Search where `true` layers fit and a try takes a second for each."""
    times = [left]

    def attempt(layers: int) -> Try:
        times[0] -= layers
        fits, limit = layers <= true, "" if layers <= true else "host memory"
        return Try(layers=layers, fits=fits, limit=limit, seconds=layers, figures={})

    return search(attempt, estimated, most, lambda: max(0.0, times[0]))


@pytest.mark.parametrize(
    ("true", "estimated"), [(100, 100), (80, 100), (140, 100), (10, 100), (1, 1), (0, 4), (5, 0)]
)
def test_search_ends_near_the_largest(true: int, estimated: int) -> None:
    found = tries(true, estimated)
    best = max((each.layers for each in found if each.fits), default=0)
    worst = min(each.layers for each in found if not each.fits)
    assert best <= true < worst
    assert worst - best <= max(1, best // 20)
    assert len(found) <= 12
    assert len({each.layers for each in found}) == len(found)


def test_search_within_limits() -> None:
    assert [each.layers for each in tries(100, 2, most=2)] == [1, 2]
    assert [each.layers for each in tries(100, 100, left=80.0)] == [25, 42]  # (80 - 25) / 1.3
    assert [each.layers for each in tries(100, 100, left=26.0)] == [25]


def test_what_became_of_a_try() -> None:
    def outcome(code: int | None, figures: dict[str, Any] | None = None, output: str = "") -> Outcome:
        return Outcome(code=code, output=output, figures=figures, seconds=1.0)

    assert tried(3, outcome(-9)).limit == "host memory"
    assert tried(3, outcome(None)).limit == "time"
    assert tried(3, outcome(0, {"fits": True})).fits
    with pytest.raises(RuntimeError, match="3 layers: KeyError: 1"):
        tried(3, outcome(1, output="KeyError: 1"))


def test_the_estimate_of_offload() -> None:
    document = json.loads((ROOT / "examples" / "megatron_gpt" / "configs" / "1.3b.json").read_text())

    def needs(layers: int) -> Estimate:
        options = offload_model(document["model"], 4096, layers)
        return estimate(options, 2048, precision="bf16", device="cuda")

    layers = largest(needs, 1000, device=80e9, host=128 * 2**30)
    assert needs(layers).host + (3 << 30) <= 128 * 2**30 < needs(layers + 1).host + (3 << 30)
    assert needs(layers).host == 16 * needs(layers).parameters
    assert largest(needs, 5, device=80e9, host=128 * 2**30) == 5
    assert largest(needs, 1000, device=1e9, host=1e15) == 0
    fits = Try(layers=9, fits=True, limit="", seconds=1.0, figures={"peak": 1, "seconds": [1.0], "host": 1})
    fails = Try(layers=12, fits=False, limit="GPU memory", seconds=1.0, figures={})
    row = offload_row(4096, [fits, fails], layers, needs)
    assert "12 layers don't fit: GPU memory" in row.measured
    assert "for want of time" in offload_row(4096, [fits], layers, needs).measured
