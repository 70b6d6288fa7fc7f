"""Run `uni3d doctor` as a user would: its report and its exit code."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import commands
import numpy as np
import oracle
import pytest
from ranks import Ranks
from resharding_cases import Place, build
from tied_gpt import TIED
from whole_arrays import save_whole

from uni3d.doctor.topologies import _zero_refusal

doctor = partial(commands.run, "doctor")


def save_case(run: str) -> None:
    engine = build(Place("gpt", 2, 2, 1, 1))
    for _ in range(2):
        engine.train_batch()
        engine.save_checkpoint(run)
    engine.wait_for_checkpoint()


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints of the tied GPT: 3 layers, 2 heads, global batch 12."""
    folder = tmp_path_factory.mktemp("doctor") / "run"
    ranks.run(4, save_case, str(folder))
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """Copy of the run, for a test to damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        path = tmp_path / "config.json"
        values = oracle.SETTINGS | {"train_micro_batch_size_per_gpu": 3} | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


# --- it would resume -------------------------------------------------------------------------------------


def test_it_would_resume(saved: Path, config: Callable[..., Path]) -> None:
    result = doctor(saved, "--world-size", 3, "--config", config())
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 110 or len(str(saved)) > 60
    assert " ".join(lines[0].split()).startswith(f"YES {saved}/global_step2 on 3 ranks as")
    assert "on 3 ranks as pp 1, dp 3, tp 1, ZeRO 1" in result.words
    assert '"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2' in result.words, "of 4 samples"
    assert '"parallel": {"pp": 1, "dp": 3, "tp": 1}, "zero_optimization": {"stage": 1}' in result.words
    assert "latest is global_step2" in result.words
    assert "ACTIVATIONS ARE NOT INCLUDED" in result.stdout
    assert "tp 3 doesn't divide the 26 features of layers.0.ffn.gate (colwise)" in result.words
    assert "warning" not in result.stdout


def test_json(saved: Path, config: Callable[..., Path]) -> None:
    report = json.loads(doctor(saved, "--world-size", 4, "--config", config(), "--json").stdout)
    assert report["would_resume"] is True
    assert (report["step"], report["samples"], report["train_batch_size"]) == (2, 24, 12)
    assert report["written_on"] == {"pp": 2, "dp": 2, "tp": 1, "zero": 1}
    found = [(t["pp"], t["dp"], t["tp"], t["micro_batch"], t["accumulation"]) for t in report["topologies"]]
    assert found == [(1, 4, 1, 3, 1), (2, 2, 1, 3, 2), (4, 1, 1, 3, 4), (1, 2, 2, 3, 2), (2, 1, 2, 3, 4)]
    assert report["recommended"]["config"]["parallel"] == {"pp": 1, "dp": 4, "tp": 1}
    (reason,) = report["refused"]
    assert (reason["axis"], reason["degrees"]) == ("tp", [4])
    assert report["config_as_it_is"]["starts_as"]["dp"] == 4
    assert report["whole"]["problems"] == []
    assert report["whole"]["other_tags"] == ["global_step1"]


def test_the_zero_stage_is_the_options_the_configs_or_the_runs(saved: Path, config: Any) -> None:
    assert "ZeRO 1" in doctor(saved, "--world-size", 2).stdout.split("\n\n")[0]
    three = config(zero_optimization={"stage": 3})
    assert "ZeRO 3" in doctor(saved, "--world-size", 2, "--config", three).stdout.split("\n\n")[0]
    one = config(zero_optimization=True)  # DeepSpeed's old form
    assert "ZeRO 1" in doctor(saved, "--world-size", 2, "--config", one).stdout.split("\n\n")[0]
    asked = doctor(saved, "--world-size", 2, "--config", three, "--zero", 2)
    assert "ZeRO 2" in asked.stdout.split("\n\n")[0]


def test_memory_decides(saved: Path) -> None:
    report = json.loads(doctor(saved, "--world-size", 4, "--json").stdout)
    needs = {
        (t["pp"], t["dp"], t["tp"], int(zero)): need["total"]
        for t in report["topologies"]
        for zero, need in t["memory_by_zero_stage"].items()
    }
    by_preference = sorted(needs, key=lambda k: (k[2], k[0], k[3] != 1, k[3]))
    for limit in sorted({*needs.values()})[:: max(1, len(needs) // 6)]:
        found = json.loads(doctor(saved, "--world-size", 4, "--memory", f"{limit}", "--json").stdout)
        best = found["recommended"]
        first = next(key for key in by_preference if needs[key] <= limit)
        assert (best["pp"], best["dp"], best["tp"], best["zero"]) == first
    result = doctor(saved, "--world-size", 4, "--memory", f"{min(needs.values()) - 1}")
    assert result.returncode == 1
    assert "nothing fits" in result.words
    assert "per rank: the minimum is" in result.words


def test_activations_of_a_known_model(saved: Path, config: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model.json"
    document = {"model": TIED, "seq_len": 8, "uni3d": json.loads(config().read_text())}
    model.write_text(json.dumps(document))
    bare = json.loads(doctor(saved, "--world-size", 2, "--config", config(), "--json").stdout)
    known = json.loads(doctor(saved, "--world-size", 2, "--model", model, "--json").stdout)
    assert known["activations_counted"]
    assert known["recommended"]["config"] == bare["recommended"]["config"], "the file's own config counts"
    without, having = bare["recommended"]["memory"], known["recommended"]["memory"]
    assert having["other"] > 0
    assert (having["optimizer"], having["buffers"]) == (without["optimizer"], without["buffers"])
    assert "ACTIVATIONS" not in doctor(saved, "--world-size", 2, "--model", model).stdout
    model.write_text(json.dumps(document | {"model": TIED | {"num_layers": 4}}))
    other = doctor(saved, "--world-size", 2, "--model", model)
    assert other.returncode == 2
    assert "isn't the checkpoint's: layers.3.attn.k.weight is [20, 20], and missing in" in other.stderr


# --- it wouldn't resume ----------------------------------------------------------------------------------


def test_numbers_of_ranks_nearby(saved: Path) -> None:
    result = doctor(saved, "--world-size", 11)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.words.startswith(f"NO {saved}/global_step2 on 11 ranks there is no topology of 11 ranks: ")
    for reason in (
        "dp 11 doesn't divide the global batch of 12",
        "pp 11 needs more layers than the 6 pipeline_layers of GPT",
        "tp 11 doesn't divide the 26 features of layers.0.ffn.gate (colwise)",
    ):
        assert reason in result.words
    nearby = json.loads(doctor(saved, "--world-size", 11, "--json").stdout)["nearby_world_sizes"]
    possible = {pp * dp * tp for pp in range(1, 7) for dp in (1, 2, 3, 4, 6, 12) for tp in (1, 2)}
    below, above = (sorted(n for n in possible if side(n)) for side in (lambda n: n < 11, lambda n: n > 11))
    assert nearby == [*below[-3:], *above[:3]]
    assert f"nearby numbers of ranks that work: {', '.join(map(str, nearby))}" in result.words


def test_given_degrees(saved: Path) -> None:
    result = doctor(saved, "--world-size", 4, "--tp", 4)
    assert result.returncode == 1
    assert "with tp 4: tp 4 doesn't divide the 26 features" in result.words
    assert "without these degrees it would resume as pp 1, dp 4, tp 1, ZeRO 1" in result.words
    assert doctor(saved, "--world-size", 4, "--tp", 2, "--pp", 2).returncode == 0


def test_files_that_are_missing(run: Path) -> None:
    chunk = next((run / "global_step2/atoms").glob("layers.1.*/exp_avg/c*"))
    chunk.unlink()
    result = doctor(run, "--world-size", 2)
    assert (result.returncode, result.stderr) == (1, "")
    assert "the checkpoint is incomplete: layers.1." in result.words
    assert "is missing; other tags: global_step1" in result.words
    assert doctor(run, "--world-size", 2, "--tag", "global_step1").returncode == 0
    chunk.write_bytes(b"short")
    assert "has 5 bytes instead of" in doctor(run, "--world-size", 2).words


def test_another_optimizer(saved: Path, config: Callable[..., Path]) -> None:
    result = doctor(saved, "--world-size", 2, "--config", config(optimizer={"type": "SGD"}))
    assert result.returncode == 1
    assert "the checkpoint's optimizer is AdamW, but the config's is SGD" in result.words
    assert "set " not in result.stdout, "no topology would help"


def test_warnings(saved: Path, config: Callable[..., Path]) -> None:
    accept = {"accept_changes": ["seed"]}
    result = doctor(
        saved, "--world-size", 2, "--config", config(seed=8, train_batch_size=24, checkpoint=accept)
    )
    assert result.returncode == 0
    assert "warning seed is 8 in the config, 7 in the checkpoint" in result.words
    assert "warning train_batch_size is 24 in the config, 12 in the checkpoint" in result.words
    assert '"train_batch_size": 12' in result.words, "the run's own is proposed"


def test_weights_alone_are_no_run(tmp_path: Path) -> None:
    save_whole(tmp_path, "t", {("w", "fp32"): np.ones(4, np.float32)}, step=1)
    result = doctor(tmp_path, "--world-size", 2)
    assert result.returncode == 1
    assert "the manifest has no global_steps: it holds weights, not a run" in result.words
    assert "the checkpoint has no optimizer" in result.words
    for axis in ("tp", "pp"):
        why = "can't be checked: the manifest doesn't say how the model may be split"
        assert f"{axis} 2 {why}" in result.words


# --- errors ----------------------------------------------------------------------------------------------


def test_unreadable_checkpoints(tmp_path: Path, run: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "half/.saving.global_step5/atoms").mkdir(parents=True)
    (run / "global_step2/manifest.json").write_text("{}")
    cases = {
        ("empty",): "holds no committed checkpoint",
        ("file",): "is not a folder",
        ("nowhere",): "is not a folder",
        ("half",): "(not committed, so they can't be loaded: .saving.global_step5)",
        ("run", "--tag", "global_step3"): "no committed checkpoint 'global_step3'; the tags there",
        ("run",): "no crc32c (committed tags: global_step2, global_step1)",
    }
    for (name, *options), message in cases.items():
        result = doctor(tmp_path / name, "--world-size", 2, *options)
        assert (result.returncode, result.stdout) == (2, ""), name
        assert result.stderr.startswith("error: ")
        assert message in " ".join(result.stderr.split()), name


def test_invalid_options(saved: Path, config: Callable[..., Path]) -> None:
    for options, message in {
        ("--pp", 3): "pp(3) doesn't divide the world size 4",
        ("--pp", 2, "--dp", 1, "--tp", 1): "pp(2) * dp(1) * tp(1) = 2, but the world size is 4",
        ("--memory", "lots"): "--memory lots: expected a positive number",
        ("--config", "nowhere.json"): "--config nowhere.json can't be read",
        ("--config", config(optimiser={})): "optimizer",
    }.items():
        result = doctor(saved, "--world-size", 4, *options)
        assert (result.returncode, result.stdout) == (2, ""), options
        assert message in " ".join(result.stderr.split())
        assert result.stderr.count("\n") == 1


def test_leftovers_and_latest_are_reported(run: Path) -> None:
    (run / ".saving.global_step9").mkdir()
    assert "running save: .saving.global_step9 (see uni3d clean)" in doctor(run, "--world-size", 2).words
    (run / "latest").unlink()
    assert doctor(run, "--world-size", 2).returncode == 2
    result = doctor(run, "--world-size", 2, "--tag", "global_step2")
    assert result.returncode == 0
    assert "has no file 'latest'" in result.words
    own = doctor(run / "global_step2", "--world-size", 2)
    assert own.returncode == 0
    assert "latest is" not in own.words


@pytest.mark.parametrize(
    ("zero", "refused"),
    [
        ({"stage": 2}, set()),
        ({"stage": 2, "offload_optimizer": True}, {0}),
        ({"stage": 3, "offload_param": True}, {0, 1, 2}),
        ({"stage": 2, "offload_param": True}, {3}),
        ({"stage": 0, "offload_optimizer": True}, {1, 2, 3}),
    ],
)
def test_a_stage_that_offloads_otherwise_isnt_offered(zero: dict[str, Any], refused: set[int]) -> None:
    """Memory is estimated with the offloading of the run so far."""
    found = {stage: _zero_refusal({"zero_optimization": zero}, stage) for stage in range(4)}
    assert {stage for stage in found if found[stage]} == refused
    assert all("at stage" in str(found[stage]) for stage in refused)
