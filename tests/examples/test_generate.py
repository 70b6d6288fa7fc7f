"""Generation from exported weights in plain PyTorch: strict loading, errors in one clear line."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model import GPT, GPTConfig
from safetensors.torch import save_file

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_gpt"
MODEL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 16,
}


@pytest.fixture(scope="module")
def script() -> Any:
    """Import generate.py as a module. It imports `model` from its own folder, as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        return importlib.import_module("generate")


def export(script: Any, folder: Path, **options: Any) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """Write the files of a finished run for `generate.py`. Tied weights are stored once."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps({"model": MODEL | options, "seq_len": 8}))
    torch.manual_seed(0)
    model = script.GPT(script.GPTConfig(**(MODEL | options)))
    state = model.state_dict()
    if options.get("tied_head"):
        del state["head.weight"]
    save_file(state, weights)
    return config, weights, state


@pytest.mark.parametrize("tied_head", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_weights_of_the_file_are_the_weights_of_the_model(
    script: Any, tmp_path: Path, tied_head: bool, positions: str
) -> None:
    config, weights, state = export(script, tmp_path, tied_head=tied_head, positions=positions)
    model, _ = script.load_model(config, weights)
    for name, tensor in state.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    if tied_head:
        torch.testing.assert_close(model.head.weight, model.embed.tokens.weight, rtol=0, atol=0)


def test_generation_is_reproducible_and_goes_past_the_window(script: Any, tmp_path: Path) -> None:
    config, weights, _ = export(script, tmp_path, positions="learned")
    model, seq_len = script.load_model(config, weights)
    assert seq_len == 8

    def text(seed: int, prompt: bytes = b"def ", temperature: float = 0.8) -> bytes:
        options = {"seq_len": seq_len, "temperature": temperature, "seed": seed}
        return script.generate(model, prompt, 40, **options)

    assert text(0) == text(0) != text(1)
    assert text(0).startswith(b"def ")
    assert len(text(0, temperature=0)) == 44
    assert text(0, temperature=0) == text(1, temperature=0)
    assert text(0, prompt=b"") == text(0, prompt=b"\n")[1:]


def test_generation_takes_the_most_likely_byte_after_the_last_window(script: Any, tmp_path: Path) -> None:
    config, weights, _ = export(script, tmp_path)
    model, seq_len = script.load_model(config, weights)
    prompt = bytes(range(65, 95))
    with torch.no_grad():
        expected = int(model(torch.tensor([list(prompt[-8:])]))[0, -1].argmax())
    found = script.generate(model, prompt, 1, seq_len=seq_len, temperature=0, seed=0)
    assert found == prompt + bytes([expected])


def test_what_cannot_be_printed_becomes_a_mark(script: Any) -> None:
    assert script.printable("a\tü\n".encode() + b"\x1b[0m\xff\x07") == "a\tü\n\ufffd[0m\ufffd\ufffd"


def test_the_command_prints_the_text(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, weights, _ = export(script, tmp_path, tied_head=True)
    script.main(["--config", str(config), "--weights", str(weights), "--prompt", "def ", "--tokens", "5"])
    assert capsys.readouterr().out.startswith("def ")


def test_missing_weights_and_wrong_shapes_are_one_line(script: Any, tmp_path: Path) -> None:
    config, weights, state = export(script, tmp_path)
    bad = dict(state)
    bad["embed.tokens.weight"] = torch.zeros(256, 8)
    bad["extra"] = bad.pop("norm.weight")
    save_file(bad, weights)
    with pytest.raises(ValueError, match="doesn't fit") as error:
        script.load_model(config, weights)
    assert "embed.tokens.weight has shape (256, 8), expected (256, 32)" in str(error.value)
    assert "norm.weight is missing" in str(error.value)
    assert "extra is unexpected" in str(error.value)


def test_an_untied_head_is_not_replaced_by_the_embedding(script: Any, tmp_path: Path) -> None:
    config, weights, state = export(script, tmp_path)
    save_file({name: tensor for name, tensor in state.items() if name != "head.weight"}, weights)
    with pytest.raises(ValueError, match=r"head\.weight is missing"):
        script.load_model(config, weights)


def test_a_head_beside_a_tied_embedding_is_not_taken_in_silence(script: Any, tmp_path: Path) -> None:
    config, weights, state = export(script, tmp_path, tied_head=True)
    save_file(state | {"head.weight": torch.zeros(256, 32)}, weights)
    with pytest.raises(ValueError, match=r"head\.weight is unexpected"):
        script.load_model(config, weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected model and seq_len"),
        ("{}", "expected model and seq_len"),
        ('{"model": {"hidden": 3}, "seq_len": 8}', "expected model and seq_len"),
        (json.dumps({"model": MODEL}), "expected model and seq_len"),
        (
            json.dumps({"model": MODEL | {"vocab_size": 50304}, "seq_len": 8}),
            r"vocab_size\(50304\).*only models of bytes",
        ),
    ],
)
def test_a_bad_config_is_one_line(script: Any, tmp_path: Path, text: str, message: str) -> None:
    config, weights, _ = export(script, tmp_path)
    config.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        script.load_model(config, weights)
    assert "\n" not in str(error.value)


def test_missing_or_foreign_files_are_one_line(script: Any, tmp_path: Path) -> None:
    config, weights, _ = export(script, tmp_path)
    with pytest.raises(ValueError, match=r"--weights .*other: no such file"):
        script.load_model(config, tmp_path / "other")
    with pytest.raises(SystemExit, match=r"generate\.py: --config .*other: no such file"):
        script.main(["--config", str(tmp_path / "other"), "--weights", str(weights)])
    with pytest.raises(ValueError, match="not a safetensors file"):
        script.load_model(config, config)


def test_a_model_that_has_generated_can_be_trained() -> None:
    """The model caches rotary positions, which must not be inference tensors."""
    model = GPT(GPTConfig(vocab_size=11, hidden_size=12, num_layers=1, num_heads=2))
    tokens = torch.arange(7)[None]  # a length that nothing else here has
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
    assert model.embed.tokens.weight.grad is not None
