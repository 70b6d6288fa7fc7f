"""`uni3d bench`: its figures against formulas by hand and `uni3d plan`, its traces, and its errors."""

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import answer, refused, run
from model import GPT, GPTConfig

from uni3d.bench.collectives import seconds_by_kind
from uni3d.bench.local_ranks import run_ranks
from uni3d.bench.model import BenchGPT, RandomTokens
from uni3d.bench.report import forward_flops
from uni3d.bench.request import read_request
from uni3d.estimate.gpt import from_model_config
from uni3d.plot import schedule

MODEL = {"vocab_size": 64, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
UNI3D = {
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "parallel": {"device": "cpu"},
}
QUICK = ("--steps", 2, "--warmup", 1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model": MODEL, "seq_len": 16, "uni3d": UNI3D | changes}))
    return path


def test_the_figures_of_one_rank(config: Path) -> None:
    row = answer("bench", config, *QUICK, "--peak-tflops", 0.5)
    assert row["tokens_per_step"] == 8 * 16
    # A layer: q and o 32 x 32, k and v 16 x 32, three of 96 x 32; and the head, 64 x 32.
    matrices = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 96 * 32) + 64 * 32
    assert row["flops_per_step"] == 128 * (6 * matrices + 12 * 3 * 32 * 16)
    seconds = row["step_seconds"]
    assert 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
    assert seconds["mean"] == pytest.approx((seconds["least"] + seconds["most"]) / 2), "of two steps"
    assert row["tokens_per_second"] == pytest.approx(128 / seconds["mean"])
    assert row["mfu"] == pytest.approx(row["flops_per_step"] / (seconds["mean"] * 0.5e12))
    assert row["loss"] == pytest.approx(math.log(64), abs=0.3), "it has learned nothing of random tokens"
    (memory,) = row["memory"]
    assert 0 < memory["peak"] < memory["process"]
    planned = answer("plan", config, "--device", "cpu", "--world-size", 1)["training"]["memory_by_stage"]
    assert memory["planned"] == planned[0]["bytes"]
    (phases,) = row["phases"]
    assert [key for key in phases if phases[key] > 0 and key not in ("rank", "stage")][:4] == [
        *("data", "forward", "backward", "step")
    ]
    assert row["traces"] == []


@pytest.mark.slow
def test_two_stages_a_trace_of_each_and_a_picture(tmp_path: Path, config: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "schedule.png"
    done = run("bench", config, *QUICK, "--nproc", 2, "--pp", 2, "--trace", trace, "--schedule", picture)
    assert done.returncode == 0, done.stderr
    for part in ("128 tokens: 2 micro batches of 4 x 16", "pp 2, dp 1, tp 1", "tokens/s", "whole process"):
        assert part in done.words
    assert "phase ms, stage 0 ms, stage 1" in done.words
    assert "in these: send recv" in done.words
    for path in (trace, tmp_path / "trace.rank1.json"):
        names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
        # Two steps of two micro batches.
        assert [names.count(f"uni3d {part}") for part in ("forward", "backward", "step")] == [4, 4, 2]
        assert "aten::scaled_dot_product_attention" in names
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("config.json", "schedule.png", "trace.json", "trace.rank1.json")
    ]
    assert "trace.json exists" in refused("bench", config, "--trace", trace)
    assert "schedule.png exists" in refused("bench", config, "--schedule", picture)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--tp", 2), ("--dp", 2, "--zero", 3), ("--zero", 2)])
def test_other_topologies(config: Path, options: tuple[Any, ...]) -> None:
    row = answer("bench", config, *QUICK, "--nproc", 2, *options, "--micro-batch", 1, "--accumulation", 2)
    assert row["train_batch_size"] == 2 * row["ranks"]["dp"]
    kinds = {kind for rank in row["collectives"] for kind in rank} - {"rank", "stage"}
    shards = row["ranks"]["zero"] > 0 and row["ranks"]["dp"] > 1
    assert kinds >= {"all_reduce", *["all_gather", "reduce_scatter"] * shards}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nproc 0", "--nproc 0 must be at least 1"),
        ("--steps 0", "--steps 0 must be at least 1"),
        ("--warmup -1", "--warmup -1 must be at least 0"),
        ("--peak-tflops 0", "--peak-tflops 0: expected a positive number"),
        ("--nproc 3 --pp 2", "pp(2) * tp(1) = 2 doesn't divide the world size 3"),
        ("--nproc 4 --tp 4", "tp(4) doesn't divide the 2 kv heads"),
        ("--nproc 3", "has no solution in whole numbers"),
        ("--nproc 8 --pp 8", "needs at least 8 layers, but the model has 6"),
        ("--trace nowhere/trace.json", "no such folder: nowhere"),
        ("--schedule picture.svg", "expected a name that ends in .png"),
    ],
)
def test_a_mistake_is_one_line_before_any_rank_starts(config: Path, options: str, message: str) -> None:
    assert message in refused("bench", config, *options.split())


def test_configs_that_are_refused(tmp_path: Path) -> None:
    assert "nowhere.json can't be read" in refused("bench", "nowhere.json")
    assert "has no optimizer" in refused("bench", written(tmp_path, optimizer=None))
    rounds = {"schedule": "interleaved", "virtual_stages": 1}
    assert "nothing to interleave" in refused("bench", written(tmp_path, parallel=rounds))
    plain = written(tmp_path, zero_optimization=True)
    assert "zero_optimization is True; expected a section" in refused("bench", plain, "--zero", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_error_of_the_ranks_is_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, parallel={"device": "cuda"})
    assert "rank 0: ValueError: 1 ranks need as many GPUs, but there are 0" in refused("bench", path)


def fails_on_rank_1(how: str) -> None:
    if os.environ["RANK"] == "0":
        time.sleep(600)
    if how == "raise":
        raise ValueError("rank 1 has had enough")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "rank 1: ValueError: rank 1 has had enough"),
        ("kill", r"rank 1 was ended by SIGKILL \(out of memory\?\)"),
    ],
)
def test_a_rank_that_fails_ends_the_others(how: str, message: str) -> None:
    before = signal.getsignal(signal.SIGTERM), dict(os.environ)
    with pytest.raises(ValueError, match=f"^{message}$"):
        run_ranks(fails_on_rank_1, 2, how)
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ)) == before


def test_nothing_is_printed_written_or_counted_beside_the_training(tmp_path: Path) -> None:
    loud = {
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "csv_monitor": {"enabled": True, "output_path": "logs"},
        "flops_profiler": {"enabled": True, "peak_tflops": 7.0},
    }
    nothing = dict.fromkeys(("pp", "dp", "tp", "zero", "micro_batch", "accumulation"))
    request = read_request(
        written(tmp_path, **loud),
        1,
        given=nothing,
        steps=1,
        warmup=0,
        peak_tflops=None,
        trace=None,
        schedule=False,
    )
    assert request.config == UNI3D | {"steps_per_print": None}
    assert request.peak_tflops == 7.0


@pytest.mark.parametrize(
    "kinds",
    [{}, {"norm": "layernorm", "positions": "learned", "activation": "gelu", "tied_head": True}],
    ids=["Llama-like", "GPT-2-like"],
)
def test_the_model_is_the_examples(kinds: dict[str, Any]) -> None:
    theirs, ours = GPT(GPTConfig(**MODEL, **kinds)), BenchGPT(from_model_config(MODEL | kinds))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(64, (2, 16))
    assert torch.equal(ours(tokens), theirs(tokens))
    assert (ours.tp_plan, ours.tp_units, ours.pipeline_layers) == (
        *(theirs.tp_plan, theirs.tp_units, theirs.pipeline_layers),
    )
    total, number = ours.loss_fn(ours(tokens), tokens)
    assert (total, number) == theirs.loss_fn(theirs(tokens), tokens)


def test_flops_leave_out_all_that_is_looked_up() -> None:
    learned = MODEL | {"positions": "learned", "max_seq_len": 512}
    assert forward_flops(from_model_config(learned), 16) == forward_flops(from_model_config(MODEL), 16)


def test_samples_depend_on_seed_and_index_alone() -> None:
    inputs, targets = RandomTokens(9, 16, 64, seed=0)[5]
    assert torch.equal(inputs[1:], targets[:-1])
    assert torch.equal(inputs, RandomTokens(7, 16, 64, seed=0)[5][0])
    assert not torch.equal(inputs, RandomTokens(9, 16, 64, seed=0)[4][0])
    assert not torch.equal(inputs, RandomTokens(9, 16, 64, seed=1)[5][0])


class Event:
    def __init__(self, name: str, start: float, end: float) -> None:
        self.name = name
        self.time_range = type("Range", (), {"start": start, "end": end})()


def test_collectives_are_told_apart_and_count_once() -> None:
    events = [
        Event("gloo:all_reduce", 0, 10),
        Event("gloo:all_reduce", 5, 20),
        Event("gloo:all_to_all", 10, 14),
        Event("gloo:send", 30, 40),
        Event("gloo:recv", 40, 50),
        Event("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 2),
        Event("ncclKernel_AllGather_RING_LL_Sum_int8_t", 3, 4),
        Event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 45, 60),
        Event("gloo:barrier", 0, 6),
        Event("aten::all_reduce", 0, 1000),
        Event("nccl:all_reduce", 0, 1000),  # what the host does
    ]
    expected = {"all_gather": 1, "reduce_scatter": 6, "all_reduce": 20, "send_recv": 30, "other": 6}
    assert seconds_by_kind(events, 2) == pytest.approx({kind: 1e-6 * n / 2 for kind, n in expected.items()})


def test_the_picture_has_a_box_for_each_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(schedule, "save", lambda figure, *_, **__: figures.append(figure))
    parts = [("data", 0), ("forward", 0), ("backward", 0), ("step", 0)]
    passes = [
        [
            {"part": part, "stage": rank, "micro_batch": number, "begin": t, "end": t + 1.0}
            for t, (part, number) in enumerate(parts, start=2 * rank)
        ]
        for rank in range(2)
    ]
    schedule.draw_schedules({"one": passes}, tmp_path / "never.png")
    (axes,) = figures[0].axes
    boxes = [
        (b.get_x(), b.get_width(), round(b.get_y() + 0.4)) for b in axes.patches if b.get_width() == 1000
    ]
    # The first one drawn begins at 0; data isn't drawn.
    assert boxes == [
        (1000.0 * t, 1000.0, rank) for rank, t in [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]
    ]
    assert [text.get_text() for text in axes.texts] == ["1", "1", "1", "1"]
