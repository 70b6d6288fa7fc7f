"""`uni3d export --format hf` writes a folder that transformers loads, with the live model's outputs."""

import errno
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import commands
import oracle
import pytest
import torch
from marks import slow
from model import GPT, GPTConfig
from models import OwnLoss, make_engine, save_and_wait
from ranks import Ranks
from safetensors import safe_open
from safetensors.torch import load_file
from tied_gpt import save_case
from torch import Tensor

import ckpt
import uni3d
from ckpt.stores import files

# Weights so large, and numbers so far from any default, that each entry of the config shows in the logits.
SIZES = oracle.MODEL | {"init_std": 0.4, "rope_base": 50.0, "norm_eps": 0.02}
MODELS = {
    "untied": SIZES,
    "tied": SIZES | {"tied_head": True},
    "grouped": SIZES | {"num_kv_heads": 1, "tied_head": True},
}
TOKENS = torch.randint(0, SIZES["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(3))
LAYER = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
NAMES = {f"layers.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for i in range(3) for a, b in LAYER.items()}
NAMES |= {"embed.tokens.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
NAMES |= {"head.weight": "lm_head.weight"}


@pytest.fixture(scope="module")
def hf() -> Any:
    """The library, loaded in this process but not on the ranks: that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(str(Path(__file__).parents[2] / "models"))
        import hf_models
    return hf_models


export, answer = partial(commands.run, "export"), partial(commands.answer, "export")
refused = partial(commands.refused, "export")


def case(place: tuple[int, int, int, int], kind: str, folder: str) -> dict[str, Tensor]:
    return save_case(place, folder, sizes=MODELS[kind])


@pytest.fixture(scope="module")
def tied_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Return a checkpoint of the tied model, and the live weights."""
    folder = tmp_path_factory.mktemp("tied")
    return folder, ranks.run(1, case, (1, 1, 1, 0), "tied", str(folder))[0]


def load(hf: Any, folder: Path, kind: str = "AutoModelForCausalLM") -> Any:
    """Load a folder with transformers; no key may be missing or unexpected."""
    model, info = getattr(hf.hf, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def gpt_logits(kind: str, weights: dict[str, Tensor]) -> Tensor:
    model = GPT(GPTConfig(**MODELS[kind]))
    model.load_state_dict(weights)
    with torch.no_grad():
        out: Tensor = model(TOKENS)
    return out


def hf_logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(TOKENS).logits
    return out


PLACES = [
    slow("tied", (1, 1, 1, 0)),
    slow("tied", (2, 1, 2, 1)),
    ("untied", (1, 1, 2, 2)),
    slow("grouped", (2, 2, 1, 3)),
]


@pytest.mark.parametrize(("kind", "place"), PLACES, ids=lambda x: x if isinstance(x, str) else str(x))
def test_transformers_computes_the_same(
    hf: Any, ranks: Ranks, tmp_path: Path, kind: str, place: tuple[int, int, int, int]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    live: dict[str, Tensor] = {}
    for part in ranks.run(place[0] * place[1] * place[2], case, place, kind, str(run)):
        live |= part
    code, said, error = export(run, out, "--format", "hf")
    assert code == 0, error
    assert said.startswith(f"{out}: {30 - (kind != 'untied')} tensors, ")
    assert said.endswith(" in 2 files, from global_step1\n"), "and nothing is left out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    model = load(hf, out)
    assert [type(model).__name__] == model.config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == torch.float32
    torch.testing.assert_close(hf_logits(model), gpt_logits(kind, live), rtol=1e-5, atol=1e-5)
    stored = load_file(out / "model.safetensors")
    whole = uni3d.get_fp32_state_dict_from_zero_checkpoint(run)
    assert stored.keys() == {NAMES[n] for n in whole if n != "head.weight" or kind == "untied"}
    assert all(torch.equal(stored[new], whole[old]) for old, new in NAMES.items() if new in stored)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind != "untied")
    with safe_open(out / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "tag": "global_step1"}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_several_files_of_a_smaller_type(hf: Any, tied_run: Any, tmp_path: Path, dtype: str) -> None:
    (run, live), out = tied_run, tmp_path / "new" / "out"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    row = answer(run, out, "--format", "hf", "--max-shard-size", "8KB", "--dtype", dtype)
    assert sorted(row["files"]) == sorted(map(str, out.iterdir()))
    assert row["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert (row["tensors"], row["left_out"]) == (29, [])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {k: v for file in sorted(out.glob("*.safetensors")) for k, v in load_file(file).items()}
    assert len(set(index["weight_map"].values())) > 2
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in stored.values())
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(kind).removeprefix("torch.")
    model = load(hf, out)
    rounded = {name: tensor.to(kind) for name, tensor in live.items()}
    assert model.dtype == kind
    assert all(torch.equal(stored[new], rounded[old]) for old, new in NAMES.items() if new in stored)
    expected = gpt_logits("tied", {name: tensor.float() for name, tensor in rounded.items()})
    torch.testing.assert_close(hf_logits(model.float()), expected, rtol=1e-5, atol=1e-5)


HF_MODELS: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    "llama": ("llama", {}, "AutoModelForCausalLM", {"lm_head.weight"}),
    "untied llama": ("llama", {"tie_word_embeddings": False}, "AutoModelForCausalLM", set()),
    "gpt2": ("gpt2", {}, "AutoModelForCausalLM", {"lm_head.weight"}),
    "mixtral": ("mixtral", {}, "AutoModelForCausalLM", set()),
    "bert": ("bert", {}, "AutoModelForSequenceClassification", set()),
}
"""Model, its options, the class that loads it, and the weights that class ties."""


@pytest.mark.parametrize("case", HF_MODELS)
def test_a_model_of_transformers_says_it_by_itself(hf: Any, alone: None, tmp_path: Path, case: str) -> None:
    kind, options, auto, tied = HF_MODELS[case]
    engine = hf.make_engine(hf.make(kind, **options), 1)
    batch = hf.batches(kind)[0]
    engine.train_batch(iter([hf.rows(batch, 0, 4), hf.rows(batch, 4, 4)]))
    save_and_wait(engine, tmp_path / "run")
    answer(tmp_path / "run", tmp_path / "out", "--format", "hf")
    loaded, live = load(hf, tmp_path / "out", auto), hf.make(kind, **options).eval()
    trained, before = engine.module_state_dict(), live.state_dict()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trained.items())
    live.load_state_dict(trained)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, live(**batch).logits)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == before.keys() - tied
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(live).__name__] == [type(loaded).__name__]


def says_nothing(folder: Path) -> None:
    """Return a checkpoint of a model with a buffer unknown to Hugging Face."""
    engine = make_engine(OwnLoss())
    save_and_wait(engine, folder)


def test_a_model_that_says_nothing(alone: None, tmp_path: Path) -> None:
    says_nothing(tmp_path / "run")
    error = refused(tmp_path / "run", tmp_path / "out", "--format", "hf")
    assert "has no Hugging Face config for its model (OwnLoss); give --hf-config FILE" in error
    assert "--name-map FILE" in error
    names = tmp_path / "names.json"
    names.write_text("{}")
    error = refused(tmp_path / "run", tmp_path / "out", "--format", "hf", "--name-map", names)
    assert "give --hf-config FILE" in error
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_frozen_parameters(alone: None, tmp_path: Path) -> None:
    engine = make_engine(OwnLoss())
    save_and_wait(engine, tmp_path / "run", exclude_frozen_parameters=True)
    error = refused(tmp_path / "run", tmp_path / "out", "--format", "hf")
    assert "was saved without frozen parameters (fixed.weight, fixed.bias)" in error


def test_settings_that_llama_has_not() -> None:
    for other in ({"norm": "layernorm"}, {"positions": "learned"}, {"activation": "gelu"}):
        assert GPT(GPTConfig(**(SIZES | other))).hugging_face is None


def test_files_in_place_of_what_the_checkpoint_says(hf: Any, tied_run: Any, tmp_path: Path) -> None:
    run, live = tied_run
    config, names = tmp_path / "config.json", tmp_path / "names.json"
    kept = ckpt.open_checkpoint(run).manifest["model"]["declared"]["hugging_face"]["config"]
    untied = kept | {"tie_word_embeddings": False, "torch_dtype": "float16"}
    config.write_text(json.dumps(untied | {"part": {"dtype": "float16", "torch_dtype": None}}))
    names.write_text(json.dumps({old.replace(".", r"\."): new for old, new in NAMES.items()}))
    code, said, error = export(
        run, tmp_path / "out", "--format", "hf", "--hf-config", config, "--name-map", names
    )
    assert code == 0, error
    assert said.startswith(f"{tmp_path / 'out'}: 30 tensors, "), "the tied one by both its names"
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == json.loads(config.read_text()) | {
        "dtype": "float32",
        "torch_dtype": "float32",
        "part": {"dtype": "float32", "torch_dtype": None},
    }
    model = load(hf, tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    torch.testing.assert_close(hf_logits(model), gpt_logits("tied", live), rtol=1e-5, atol=1e-5)
    # The same names beside the config that the checkpoint has: tied, and given twice.
    answer(run, tmp_path / "tied", "--format", "hf", "--name-map", names)
    model = load(hf, tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_a_name_map_leaves_out_is_said(alone: None, tmp_path: Path) -> None:
    says_nothing(tmp_path / "run")
    config, names = tmp_path / "config.json", tmp_path / "names.json"
    config.write_text('{"model_type": "own"}')
    names.write_text('{"calls": null, "fixed.(.*)": "frozen.\\\\1"}')
    given = ("--format", "hf", "--hf-config", config, "--name-map", names)
    code, said, error = export(tmp_path / "run", tmp_path / "out", *given)
    assert code == 0, error
    assert said.splitlines()[1:] == ["left out by the name map: calls"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    whole = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    assert stored.keys() == {n.replace("fixed", "frozen") for n in whole if n != "calls"}
    assert torch.equal(stored["frozen.weight"], whole["fixed.weight"])
    names.write_text('{".*": null}')
    assert "names.json leaves out every tensor in" in refused(tmp_path / "run", tmp_path / "none", *given)


BAD_FILES = [
    ("--name-map", r'{"layers\\.\\d+\\.(.*)": "x.\\1"}', "layers.0.attn.k.weight and layers.1.attn.k.weight"),
    ("--name-map", '{"(": "a"}', "the pattern '(' isn't a regular expression"),
    ("--hf-config", "{", "can't be read as JSON"),
    ("--hf-config", '{"hidden_size": 4}', 'must be a JSON object with a "model_type"'),
    ("--hf-config", '{"model_type": "llama", "quantization_config": {}}', "has a quantization_config"),
]


@pytest.mark.parametrize(("option", "text", "message"), BAD_FILES)
def test_what_is_wrong_in_a_file(tied_run: Any, tmp_path: Path, option: str, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    error = refused(tied_run[0], tmp_path / "out", "--format", "hf", option, tmp_path / "file")
    assert message in error
    assert f"{tmp_path / 'file'}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


BAD_OPTIONS = [
    (["--format", "hf", "--include", "layers.*"], "writes whole models"),
    (["--format", "hf", "--exclude", "layers.*"], "writes whole models"),
    (["--format", "hf", "--max-shard-size", "5 parsecs"], "'5 parsecs' isn't a number"),
    (["--max-shard-size", "5GB", "--hf-config", "c.json"], "--hf-config needs --format hf"),
    (["--max-shard-size", "5GB", "--name-map", "n.json"], "--name-map needs --format hf or megatron"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_contradict(tied_run: Any, tmp_path: Path, options: list[str], message: str) -> None:
    assert message in refused(tied_run[0], tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


FOLDERS = [["--format", "hf"], ["--max-shard-size", "20KB"], ["--max-shard-size", "5GB", "--format", "torch"]]


@pytest.mark.parametrize("options", FOLDERS, ids=" ".join)
def test_nothing_is_replaced(tied_run: Any, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "file", "link"):
        assert f"{tmp_path / name} exists; delete it" in refused(tied_run[0], tmp_path / name, *options)
    (tmp_path / ".out.tmp").mkdir()
    error = refused(tied_run[0], tmp_path / "out", *options)
    assert f"{tmp_path / '.out.tmp'} exists: another process writes {tmp_path / 'out'}" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.tmp", "empty", "file", "link"]
    assert not any((tmp_path / "empty").iterdir())
    assert not any((tmp_path / ".out.tmp").iterdir())


@pytest.mark.parametrize("at", ["tensors", "config.json", "sync"])
def test_a_full_disk_leaves_nothing(tied_run: Any, tmp_path: Path, monkeypatch: Any, at: str) -> None:
    (tmp_path / "mine").write_text("mine")
    seen = []

    def full(*arguments: Any, **_: Any) -> None:
        seen.append([p.name for p in tmp_path.iterdir()])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_at, write_text = files.write_at, Path.write_text
    if at == "tensors":  # a half of one, in the midst
        monkeypatch.setattr(files, "write_at", lambda fd, b, o: (write_at(fd, b[: len(b) // 2], o), full()))
    elif at == "config.json":
        monkeypatch.setattr(
            Path, "write_text", lambda p, *a, **k: full() if p.name == at else write_text(p, *a, **k)
        )
    else:
        monkeypatch.setattr(files, "sync_tree", full)
    assert "No space left on device" in refused(tied_run[0], tmp_path / "out", "--format", "hf")
    assert seen, "it was full"
    assert all("out" not in names for names in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
