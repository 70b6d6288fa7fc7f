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


AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": 1e-4},
    },
}


def test_values_that_a_trainer_fills_in_are_named_in_one_line(tmp_path: Path) -> None:
    path = written(tmp_path, AUTO)
    found = answer("config", path, "--world-size", 8)
    config, left = found["config"], found["trainer"]["left"]
    assert [config[name] for name in ("train_batch", "micro_batch", "accumulation", "precision")] == [
        "auto"
    ] * 4
    assert config["optimizer"] | {"lr": "auto", "betas": "auto"} == config["optimizer"]
    assert config["scheduler"]["params"]["total_num_steps"] == "auto"
    assert config["scheduler"]["params"]["warmup_max_lr"] == 1e-4
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == "auto"
    assert config["gradient_clipping"] == 1.0
    line = run("config", path, "--world-size", 8).stdout.splitlines()[0]
    assert line.startswith("Hugging Face's Trainer fills in train_micro_batch_size_per_gpu, gradient_acc")
    assert all(key in line for key in left)
    assert line.endswith("add --fill, with --training-args ARGS.json unless its defaults hold")
    assert len(left) == 9


def test_filling_in_and_saving(tmp_path: Path) -> None:
    path, arguments, model = written(tmp_path, AUTO), tmp_path / "args.json", tmp_path / "model.json"
    given = {
        "per_device_train_batch_size": 2,
        "bf16": True,
        "max_steps": 500,
        "warmup_steps": 0.1,
        "other": "x",
    }
    arguments.write_text(json.dumps(given))
    model.write_text('{"hidden_size": 64}')
    options = ("--world-size", 8, "--fill", "--training-args", arguments, "--model-config", model)
    found = answer("config", path, *options, "--save", tmp_path / "new.json")
    config, trainer = found["config"], found["trainer"]
    assert [config[name] for name in ("train_batch", "micro_batch", "accumulation", "precision")] == [
        16,
        2,
        1,
        "bf16",
    ]
    assert (config["optimizer"]["lr"], config["optimizer"]["betas"]) == (1e-4, [0.9, 0.999])
    assert config["scheduler"]["params"]["warmup_num_steps"] == 50
    assert trainer["left"] == {}
    assert trainer["filled"]["optimizer.params.lr"] == {
        "value": 1e-4,
        "from": "learning_rate as in the config",
    }
    again = answer("config", tmp_path / "new.json", "--world-size", 8)
    assert again["config"] == config
    assert again["trainer"] == {"filled": {}, "left": {}}
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 640
    assert "exists; give another name" in refused("config", path, *options, "--save", tmp_path / "new.json")
    line = run("config", path, "--fill").stdout.splitlines()[0]
    assert (
        "train_batch_size 8 (per_device_train_batch_size and gradient_accumulation_steps by default)" in line
    )
    assert "still auto: " in line
    assert "scheduler.params.total_num_steps (give max_steps in --training-args)" in line
    arguments.write_text(json.dumps(given | {"learning_rate": 0.5}))
    error = refused("config", path, *options)
    assert error.startswith("a Trainer refuses this config: scheduler.params.warmup_max_lr is 0.0001, but")
    assert "are for --fill; add it" in refused("config", path, "--save", tmp_path / "other.json")
    model.write_text('{"n_embd": 64}')
    assert "model.json has no hidden_size" in refused("config", path, *options)


def test_ranks_that_share_a_model_arent_more_processes_of_a_trainer(tmp_path: Path) -> None:
    path = written(tmp_path, AUTO | {"parallel": {"tp": 2}})
    assert answer("config", path, "--world-size", 8, "--fill")["config"]["train_batch"] == 4 * 8


def test_a_narrow_terminal_shows_everything(tmp_path: Path) -> None:
    text = run("config", written(tmp_path, FILE), "--world-size", "8").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "scheduler.params.cycle_first_step_size" in text
    assert " ".join(text.split()).endswith("at every ZeRO stage")


def test_mistakes(tmp_path: Path) -> None:
    unknown = refused("config", written(tmp_path, {"zero_optimisation": {}}))
    assert (
        "config.json: unknown key 'zero_optimisation'; delete it, or did you mean 'zero_optimization'?"
        in unknown
    )
    sizes = written(tmp_path, {"train_batch_size": 8})
    assert "= 2 doesn't divide the world size 3" in refused("config", sizes, "--world-size", 3, "--pp", 2)
    assert "train_batch_size(8) = train_micro_batch_size_per_" in refused("config", sizes, "--world-size", 3)
    grouped = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "mics_shard_size": 3}}
    error = refused("config", written(tmp_path, grouped), "--world-size", 4)
    assert "a shard group of 3 doesn't divide dp(4)" in error
