"""`uni3d config`: the resolved config, and its differences from DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from commands import answer, refused, run

FILE: dict[str, Any] = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
    "optimizer": {"type": "adam", "params": {"lr": 3e-4, "torch_adam": True}},
    "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0, "cycle_max_lr": 1e-3}},
    "parallel": {"pp": 2},
}


def written(folder: Path, values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder / "config.json"


def asked(tmp_path: Path, values: Any, *options: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    found = answer("config", written(tmp_path, values), *options)
    differences: dict[str, list[str]] = {}
    for row in found["differences"]:
        differences.setdefault(row["key"], []).append(row["difference"])
    return found["config"], differences


def test_everything_is_resolved_for_a_world_size(tmp_path: Path) -> None:
    config, _ = asked(tmp_path, FILE, "--world-size", "8")
    assert (config["pp"], config["dp"], config["tp"]) == (2, 4, 1)
    assert (config["train_batch"], config["micro_batch"], config["accumulation"]) == (32, 4, 2)
    assert (config["precision"], config["communication_data_type"]) == ("bf16", "fp32")
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload": True,
        "shard_group": None,
        "stage3_param_persistence_threshold": 0,
    }
    assert config["optimizer"] == {
        "is": "torch.optim.AdamW",
        "lr": 3e-4,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
    }
    assert config["scheduler"]["params"]["cycle_first_step_size"] == 2000
    assert "fp16" not in config
    config, _ = asked(tmp_path, FILE, "--world-size", "8", "--pp", "1", "--tp", "2")
    assert (config["pp"], config["dp"], config["tp"], config["accumulation"]) == (1, 4, 2, 2)


def test_differences_from_deepspeed_depend_on_the_config(tmp_path: Path) -> None:
    _, found = asked(tmp_path, FILE, "--world-size", "8")
    assert found["zero_optimization.stage"] == ["stage 3 with 2 pipeline stages; DeepSpeed refuses this"]
    assert "offloaded together" in found["zero_optimization.offload_optimizer"][0]
    assert "fp32 by default; DeepSpeed's default is the type of computation (bf16)" in str(found)
    assert found["zero_optimization.overlap_comm"][0].startswith("no effect: ")
    assert "before June 2026 its default was 0" in found["gradient_clipping"][0]
    assert any("skips the step" in text for text in found["bf16"])
    _, plain = asked(tmp_path, {"train_batch_size": 8, "gradient_clipping": 0.0})
    assert set(plain) == {"train_batch_size", "checkpoint"}
    others = {
        "train_batch_size": 8,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2},
        "optimizer": {"type": "Muon"},
        "scheduler": {"type": "WarmupLR"},
        "activation_checkpointing": {"mode": "full"},
    }
    config, found = asked(tmp_path, others, "--world-size", "4")
    assert config["fp16"]["initial_scale_power"] == 16
    assert config["optimizer"]["muon_lr"] == 0.02
    assert "second copy" in found["zero_optimization.zero_hpz_partition_size"][0]
    assert {"fp16", "optimizer", "scheduler", "activation_checkpointing"} < set(found)


def test_a_narrow_terminal_shows_everything(tmp_path: Path) -> None:
    text = run("config", written(tmp_path, FILE), "--world-size", "8").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "scheduler.params.cycle_first_step_size" in text
    assert " ".join(text.split()).endswith("at every ZeRO stage")


def test_mistakes(tmp_path: Path) -> None:
    unknown = refused("config", written(tmp_path, {"zero_optimisation": {}}))
    assert "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?" in unknown
    sizes = written(tmp_path, {"train_batch_size": 8})
    assert "= 2 doesn't divide the world size 3" in refused("config", sizes, "--world-size", 3, "--pp", 2)
    assert "train_batch_size(8) = train_micro_batch_size_per_" in refused("config", sizes, "--world-size", 3)
    grouped = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "mics_shard_size": 3}}
    error = refused("config", written(tmp_path, grouped), "--world-size", 4)
    assert "a shard group of 3 doesn't divide dp(4)" in error
