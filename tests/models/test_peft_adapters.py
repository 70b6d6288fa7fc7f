"""`uni3d export --format peft`: peft itself loads the folder, and the model computes the same."""

import json
import warnings
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from commands import answer, refused
from marks import slow
from models import make_engine, save_and_wait
from ranks import Ranks
from safetensors.numpy import load_file
from torch import Tensor, nn

import ckpt
import uni3d

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def adapted(kind: str) -> Any:
    """Return a small Llama with adapters, whose tensors aren't those that peft begins with."""
    base: Any = hf_models.make("llama")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(1)
        model = MODELS[kind](base)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return model


def lora(**options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**settings | options)


def two_adapters(base: Any) -> Any:
    model = peft.get_peft_model(base, lora())
    model.add_adapter("second", lora(r=2, target_modules=["o_proj"], bias="lora_only"))
    model.base_model.set_adapter(["default", "second"])
    return model


def transformers_own(base: Any) -> Any:
    base.add_adapter(lora(target_modules=["q_proj", "down_proj"]))
    return base


MODELS: dict[str, Any] = {
    "LoRA": lambda base: peft.get_peft_model(base, lora()),
    "two": two_adapters,
    "modules_to_save": lambda base: peft.get_peft_model(
        base, lora(modules_to_save=["lm_head"], task_type=None)
    ),
    "DoRA": lambda base: peft.get_peft_model(base, lora(use_dora=True, rank_pattern={"layers.0.*q_proj": 2})),
    "embeddings": lambda base: peft.get_peft_model(base, lora(target_modules=["embed_tokens", "q_proj"])),
    "tokens": lambda base: peft.get_peft_model(base, lora(trainable_token_indices=[1, 5])),
    "IA3": lambda base: peft.get_peft_model(
        base,
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "transformers": transformers_own,
    "AdaLoRA": lambda base: peft.get_peft_model(
        base, peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, init_r=4)
    ),
    "prompt tuning": lambda base: peft.get_peft_model(
        base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=torch.arange(24).view(2, 12) % hf_models.VOCABULARY).logits
    return out


def loaded(folder: Path, others: list[str]) -> Any:
    """Load adapters into a new base model, as a user of peft does."""
    with warnings.catch_warnings(action="ignore"):
        model = peft.PeftModel.from_pretrained(hf_models.make("llama"), folder)
        for name in others:
            model.load_adapter(folder / name, name)
        model.base_model.set_adapter(["default", *others])
    return model


@pytest.mark.parametrize(
    "kind",
    [
        "two",
        "modules_to_save",
        "DoRA",
        "transformers",
        *map(slow, ["LoRA", "embeddings", "tokens", "IA3"]),
    ],
)
def test_peft_loads_them(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Files have the names, the bits and the config of peft's own save."""
    # transformers may want a later release of peft than the installed one.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = adapted(kind)
    uni3d.Checkpointer(tmp_path / "run", model=model).save(1)
    row = answer("export", tmp_path / "run", tmp_path / "out", "--format", "peft")
    others = ["second"] if kind == "two" else []
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(tmp_path / "own")
    for place in ["", *others]:
        found = load_file(tmp_path / "out" / place / "adapter_model.safetensors")
        own = load_file(tmp_path / "own" / place / "adapter_model.safetensors")
        assert found.keys() == own.keys()
        assert all(found[name].tobytes() == x.tobytes() for name, x in own.items())
        configs = [
            json.loads((tmp_path / o / place / "adapter_config.json").read_text()) for o in ("out", "own")
        ]
        for config in configs:  # sets, which peft writes in any order
            config["target_modules"] = sorted(config["target_modules"])
        if kind != "transformers":
            assert configs[0] == configs[1]
    assert len(row["files"]) == 2 + 2 * len(others)
    expected = logits(model)
    assert not torch.allclose(expected, logits(hf_models.make("llama")))
    torch.testing.assert_close(logits(loaded(tmp_path / "out", others)), expected)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("AdaLoRA", "an adapter of ADALORA changes its shapes while it trains"),
        ("prompt tuning", "peft computes prompt_embeddings of an adapter of PROMPT_TUNING when it saves it"),
    ],
)
def test_what_cannot_be_exported(alone: None, tmp_path: Path, kind: str, reason: str) -> None:
    uni3d.Checkpointer(tmp_path / "run", model=adapted(kind)).save(1)
    error = refused("export", tmp_path / "run", tmp_path / "out", "--format", "peft")
    assert f"the adapter default can't be exported: {reason}; load the checkpoint into the model" in error
    assert not (tmp_path / "out").exists()


def test_a_model_in_a_module_and_without_frozen_weights(alone: None, tmp_path: Path) -> None:
    """The names in the file don't have the place of peft's model, and the base model isn't needed."""

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted("LoRA")

    task = Task()
    layers = task.model.base_model.model.model.layers
    layers[0] = torch.compile(layers[0])  # leaves no trace
    uni3d.Checkpointer(tmp_path / "run", model=task).save(1)
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "peft", "--dtype", "bf16")
    found = peft.load_peft_weights(str(tmp_path / "out"))
    layers[0] = layers[0]._orig_mod
    wanted = peft.get_peft_model_state_dict(task.model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], x.to(torch.bfloat16)) for name, x in wanted.items())
    told = refused("export", tmp_path / "run", tmp_path / "whole", "--format", "hf")
    assert "its model has adapters of peft, which --format peft writes" in told
    uni3d.Checkpointer(tmp_path / "plain", model=nn.Linear(2, 2)).save(1)
    told = refused("export", tmp_path / "plain", tmp_path / "none", "--format", "peft")
    assert "has no record of adapters of peft in its model (Linear)" in told


REFUSED = {
    "--include x": "--format peft writes whole adapters; leave out --include and --exclude",
    "--max-shard-size 5GB": "--format peft writes a file for each adapter; leave out --max-shard-size",
    "--optimizer": "--optimizer needs --format dcp or megatron",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict(tmp_path: Path, options: str) -> None:
    told = refused("export", tmp_path, tmp_path / "out", "--format", "peft", *options.split())
    assert REFUSED[options] in told


def train_case(run: str) -> dict[str, Tensor]:
    """Take steps with an engine at ZeRO 3 and save; return what peft says the adapter's tensors are."""
    warnings.filterwarnings("ignore")
    model = adapted("LoRA")
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = make_engine(model, zero=3, micro=3, model_parameters=trained)
    ids = torch.arange(3 * 8).view(3, 8) % hf_models.VOCABULARY
    for _ in range(4):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    save_and_wait(engine, run, exclude_frozen_parameters=True)
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return {} if state is None else peft.get_peft_model_state_dict(engine.module, state_dict=state)


@pytest.mark.slow
def test_an_engines_run(hf_ranks: Ranks, tmp_path: Path) -> None:
    wanted = hf_ranks.run(2, train_case, str(tmp_path / "run"))[0]
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "peft")
    found = peft.load_peft_weights(str(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert wanted
    before = peft.get_peft_model_state_dict(adapted("LoRA"))
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, msg=name)
        assert not torch.equal(found[name], before[name])
    assert ckpt.open_checkpoint(tmp_path / "run").manifest["model"]["left_out"]
