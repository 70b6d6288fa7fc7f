"""Monitoring of a run: printed lines, curves, times, FLOPs."""

from __future__ import annotations

import csv
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from marks import slow
from model import GPT, GPTConfig
from models import OwnLoss, Stack, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from tied_gpt import gpt_engine

from uni3d.observe import flops
from uni3d.observe.times import PhaseTimes

NAMES = ("train_loss", "lr", "grad_norm")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for path in sorted(folder.glob("*.csv")):
        header, *rows = csv.reader(path.read_text().splitlines())
        name = path.stem.removeprefix("Train_Samples_")
        assert header == ["step", name]
        found[name] = [(int(samples), float(value)) for samples, value in rows]
    return found


def csv_case(folder: str, run: str, steps: int) -> tuple[list[float], list[float]]:
    monitor = {"enabled": True, "output_path": folder, "job_name": "job"}
    engine = make_engine(seeded(Stack), config={"csv_monitor": monitor})
    engine.resume(run)
    losses, norms = [], []
    for batch in global_batches(4)[engine.global_steps : engine.global_steps + steps]:
        losses += train(engine, [batch])
        norms.append(engine.get_global_grad_norm())
    save_and_wait(engine, run)
    return losses, norms


@pytest.mark.slow
def test_csv_files_of_a_run_that_is_resumed(ranks: Ranks, tmp_path: Path) -> None:
    folder, run = str(tmp_path / "curves"), str(tmp_path / "run")
    (losses, norms), _ = ranks.run(2, csv_case, folder, run, 3)
    more = ranks.run(2, csv_case, folder, run, 1)[0]
    found = curves(tmp_path / "curves" / "job")
    assert found.keys() == set(NAMES), "by rank 0 alone"
    samples = [12, 24, 36, 48]
    for name, expected in {
        "train_loss": [*losses, *more[0]],
        "grad_norm": [*norms, *more[1]],
        "lr": [0.02] * 4,
    }.items():
        assert [n for n, _ in found[name]] == samples
        assert [value for _, value in found[name]] == pytest.approx(expected)


def test_a_monitor_that_fails_ends_itself_and_not_the_training(alone: None, tmp_path: Path) -> None:
    (tmp_path / "job").write_text("a file where the folder should be")
    monitor = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = make_engine(seeded(Stack), config={"csv_monitor": monitor})
    with pytest.warns(UserWarning, match="CsvMonitor is disabled after an error"):
        assert len(train(engine, global_batches(2))) == 2


class FakeWandb(ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[Any] = []

    def init(self, **given: Any) -> None:
        self.calls.append(given)

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        assert commit, "wandb would keep the last row back"
        self.calls.append((values, step))


def test_weights_and_biases(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    section = {"enabled": True, "team": "t", "group": "g", "project": "p"}
    fp16 = {"enabled": True, "initial_scale_power": 8}
    engine = make_engine(seeded(Stack), config={"wandb": section, "fp16": fp16})
    (loss,) = train(engine, global_batches(1))
    start, (values, samples) = fake.calls
    assert start == {"project": "p", "group": "g", "entity": "t"}
    assert samples == 12
    assert values == {
        "Train/Samples/train_loss": pytest.approx(loss),
        "Train/Samples/lr": 0.02,
        "Train/Samples/grad_norm": pytest.approx(engine.get_global_grad_norm()),
        "Train/Samples/loss_scale": 256.0,
    }


class NotLoggedIn(ModuleType):
    def init(self, **_: Any) -> None:
        raise RuntimeError("no API key")


def not_logged_in_case() -> tuple[int, list[str]]:
    sys.modules["wandb"] = NotLoggedIn("wandb")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = make_engine(seeded(Stack), config={"wandb": {"enabled": True}})
            losses = train(engine, global_batches(2))
    finally:
        del sys.modules["wandb"]
    return len(losses), [str(w.message) for w in caught if "is disabled" in str(w.message)]


def test_a_monitor_that_cannot_be_made_on_rank_0_does_not_leave_the_others_waiting(ranks: Ranks) -> None:
    first, second = ranks.run(2, not_logged_in_case)
    assert first == (2, ["Wandb is disabled after an error: no API key"])
    assert second == (2, [])


class FakeWriter:
    def __init__(self, log_dir: str) -> None:
        self.folder = log_dir
        self.points: list[Any] = []
        self.flushed = 0
        FakeWriter.made = self

    made: FakeWriter

    def add_scalar(self, name: str, value: float, samples: int) -> None:
        self.points.append((name, value, samples))

    def flush(self) -> None:
        self.flushed = len(self.points)


def test_tensorboard(alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    losses = train(make_engine(seeded(Stack), config={"tensorboard": section}), global_batches(2))
    writer = FakeWriter.made
    assert writer.folder == str(tmp_path / "job")
    assert [p for p in writer.points if p[0] == "Train/Samples/train_loss"] == [
        ("Train/Samples/train_loss", pytest.approx(loss), 12 * n) for n, loss in enumerate(losses, 1)
    ]
    assert writer.flushed == len(writer.points) == 6


@pytest.mark.parametrize(("key", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, key: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{key} is enabled, but its package can't be imported.*pip install"):
        make_engine(seeded(Stack), config={key: {"enabled": True}})


def test_lines_and_where_the_time_went(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"steps_per_print": 2, "wall_clock_breakdown": True}
    engine = make_engine(seeded(Stack), config=config)
    losses = train(engine, global_batches(4))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4, "two lines every two steps"
    for line, step in ((lines[0], 2), (lines[2], 4)):
        assert line.startswith(f"uni3d: step {step} | loss {losses[step - 1]:.4f} | lr 0.02 | norm ")
        assert re.search(r"\| [\d.e-]+ s a step \| [\d,.]+ samples/s \| [\d,]+ tokens/s$", line), line
    for line in (lines[1], lines[3]):
        shares = re.findall(r"(data|forward and backward|step) [\d.]+ ms \((\d+)%\)", line)
        assert [name for name, _ in shares] == ["data", "forward and backward", "step"]
        assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=2)


def test_speed_is_of_the_steps_since_the_last_line_also_after_a_load(
    alone: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = make_engine(seeded(Stack), config={"steps_per_print": 2})
    train(engine, global_batches(1))
    engine.save_checkpoint(str(tmp_path))
    train(engine, global_batches(3)[1:])
    engine.load_checkpoint(str(tmp_path))
    train(engine, global_batches(2)[1:])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "step" in line] == ["uni3d: step 2"] * 2
    assert all(re.search(r"\| [\d.e-]+ s a step \| [\d,.]+ samples/s", line) for line in lines), lines


class FakeEvent:
    """Stand-in for a GPU's event: its time is known once the GPU has reached it."""

    clock = 0.0
    computed = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return self.at <= FakeEvent.computed

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query(), "that would be an error"
        return end.at - self.at


def test_a_gpus_times_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    times = PhaseTimes(torch.device("cuda"))
    for _ in range(2):
        for phase in ("data", "step"):
            with times.measure(phase):
                pass
    FakeEvent.computed = 5.0  # both phases of the first step, and the next one's begin
    assert times.take() == {"data": 1e-3, "step": 1e-3}
    FakeEvent.computed = 6.0
    assert times.take() == {"data": 1e-3}
    FakeEvent.computed = 8.0
    assert times.take() == {"step": 1e-3}
    assert times.take() == {}


def test_a_line_every_ten_steps_or_thirty_seconds_by_default(
    alone: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warmup = {"total_num_steps": 30, "warmup_max_lr": 0.02, "warmup_num_steps": 4}
    scheduler = {"type": "WarmupDecayLR", "params": warmup}
    engine = make_engine(seeded(Stack), config={"scheduler": scheduler})
    train(engine, global_batches(1))
    assert capsys.readouterr().out == "", "30 s haven't passed"
    save_and_wait(engine, str(tmp_path))
    train(engine, global_batches(1) * 9)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("uni3d: step 10 | loss ")
    assert re.search(r"\| \d+:\d\d:\d\d left \| saved global_step1$", line), line
    monkeypatch.setattr("uni3d.observe.LINE_SECONDS", 0.0)
    slow = make_engine(seeded(Stack))
    train(slow, global_batches(2))
    steps = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["uni3d: step 1", "uni3d: step 2"]


def test_nothing_is_printed_or_measured_for_null(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine(seeded(Stack), config={"steps_per_print": None})
    train(engine, global_batches(1) * 10)
    assert capsys.readouterr().out == ""
    assert not engine._observer.wanted


# --- FLOPs ---------------------------------------------------------------------------------------------

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 2, 32, 4, 2, 48, 64
SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_heads": HEADS,
    "num_kv_heads": KV_HEADS,
    "ffn_size": FFN,
    "vocab_size": VOCAB,
    "tied_head": True,
}


def by_hand() -> int:
    """Return the FLOPs of one forward pass of a global batch, written out."""
    tokens, seq = oracle.BATCH * oracle.SEQ_LEN, oracle.SEQ_LEN
    kv = HIDDEN // HEADS * KV_HEADS
    block = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * FFN  # q, o; k, v; gate, up, down
    products = 2 * (LAYERS * block + HIDDEN * VOCAB)
    attention = LAYERS * 2 * (2 * seq * HIDDEN)  # queries with keys, and what they weigh
    return tokens * (products + attention)


def profile_case(pp: int, dp: int, tp: int, file: str, recompute: str) -> Any:
    profiler = {"enabled": True, "profile_step": 2, "output_file": file, "peak_tflops": 1e-3}
    recomputing = {"mode": recompute}
    config = {"flops_profiler": profiler, "steps_per_print": 3, "activation_checkpointing": recomputing}
    engine = gpt_engine(pp, dp, tp, 3, sizes=SHAPE, **config)
    losses = [engine.train_batch().item() for _ in range(3)]
    profile = engine._observer._profile
    return losses, profile.forward, profile.flops, profile.parameters


@pytest.mark.parametrize(
    ("place", "recompute"),
    [slow((1, 1, 1), "full"), ((2, 1, 1), "none"), ((1, 1, 2), "none"), ((1, 2, 1), "selective")],
    ids=["one", "pp2", "tp2", "dp2"],
)
def test_flops_are_the_models_on_every_topology(
    ranks: Ranks, tmp_path: Path, place: tuple[int, int, int], recompute: str
) -> None:
    file = tmp_path / "profile.txt"
    results = ranks.run(place[0] * place[1] * place[2], profile_case, *place, str(file), recompute)
    for _, forward, by_module, parameters in results:
        assert forward == by_hand()
        assert parameters[""] == sum(p.numel() for p in GPT(GPTConfig(**SHAPE)).parameters())
        assert by_module["layers.0.ffn"] == oracle.BATCH * oracle.SEQ_LEN * 2 * 3 * HIDDEN * FFN
        assert parameters["layers.1.ffn"] == 3 * HIDDEN * FFN
        assert by_module["layers.0"] == by_module["layers.1"]
    text = file.read_text().splitlines()
    assert text[0].startswith("model FLOPs of a step: ")
    assert any(line.endswith(" layers.1.attn.q") for line in text)


def test_the_formula() -> None:
    kv = HIDDEN // HEADS * KV_HEADS
    matrices = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv + 3 * HIDDEN * FFN) + HIDDEN * VOCAB
    per_token = flops.forward_flops_per_token(matrices, LAYERS, HIDDEN, oracle.SEQ_LEN)
    assert per_token * oracle.BATCH * oracle.SEQ_LEN == by_hand()
    assert flops.utilisation(100.0, seconds=2.0, devices=3, peak=100.0) == pytest.approx(0.5)
    assert flops.peak_flops("NVIDIA H200") == 989e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("NVIDIA GH200 480GB") == 989e12
    assert flops.peak_flops("NVIDIA H200 NVL") == 835e12
    assert flops.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert flops.peak_flops("NVIDIA RTX A1000 Laptop GPU") is None, "not an A100"
    assert flops.peak_flops("a toaster") is None


def test_counting_flops_changes_no_step_and_a_resumed_run_counts_too(alone: None, tmp_path: Path) -> None:
    batches = global_batches(3)
    plain = train(make_engine(seeded(OwnLoss)), batches)
    file = tmp_path / "new" / "profile.txt"
    section = {"enabled": True, "output_file": str(file)}
    first = make_engine(seeded(OwnLoss), config={"flops_profiler": section | {"profile_step": 2}})
    losses = train(first, batches[:1])
    assert not file.exists(), "before its time"
    first.save_checkpoint(str(tmp_path / "run"))
    losses += train(first, batches[1:])
    assert losses == plain
    counted = file.read_text()
    file.unlink()
    resumed = make_engine(seeded(OwnLoss), config={"flops_profiler": section})
    resumed.resume(str(tmp_path / "run"))
    assert train(resumed, batches[1:]) == plain[1:]
    assert file.read_text() == counted


def test_a_profile_that_cannot_be_written_ends_no_training(alone: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_file": str(tmp_path / "file" / "profile.txt")}
    batches = global_batches(2)
    with pytest.warns(UserWarning, match="can't write the FLOPs profile: "):
        losses = train(make_engine(seeded(OwnLoss), config={"flops_profiler": section}), batches)
    assert losses == train(make_engine(seeded(OwnLoss)), batches)


def test_a_profile_by_hand_and_mfu_in_the_line(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    profiler = {"enabled": True, "peak_tflops": 1e-6, "detailed": False, "module_depth": 1}
    engine = make_engine(seeded(Stack), config={"flops_profiler": profiler, "steps_per_print": 2}, micro=4)
    for x, y in [(x[i : i + 4], y[i : i + 4]) for x, y in global_batches(2) for i in (0, 4, 8)]:
        engine.backward(torch.nn.functional.mse_loss(engine(x), y))
        engine.step()
    out = capsys.readouterr().out
    matrices = 4 * 6 * 6 + 6
    assert f"model FLOPs of a step: {3 * 2 * 12 * matrices / 1e3:.3g} K" in out
    assert "MFU" in out.splitlines()[-1]
    assert not any(line.endswith(" layers.0") for line in out.splitlines()), "deeper than was asked for"
