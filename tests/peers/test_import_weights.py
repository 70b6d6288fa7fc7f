"""Imports of weights from files of transformers, safetensors and torch.save."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run
from foreign_files import expected
from imported import atoms, differing, imported, manifest, refused, source
from safetensors.torch import save_file

import uni3d

TORCH = {"weights_bin": "torch", "weights_bin_sharded": "torch"}
SAFETENSORS = dict.fromkeys(("weights_llama", "weights_llama_sharded", "weights_save_model"), "safetensors")
UNTOLD = {"weights_llama_sharded", "weights_bin_sharded"}
"""Fixtures that don't record that a weight is tied: one stores it once, the other twice."""


@pytest.mark.parametrize("name", [*TORCH, *SAFETENSORS])
def test_they_are_what_the_model_held(tmp_path: Path, name: str) -> None:
    said = imported(source(name), tmp_path)
    arrays, facts = expected(name)
    found = atoms(said["url"])
    values = {key.partition("/")[2]: value for key, value in found.items()}
    wanted = {key.partition("/")[2]: value for key, value in arrays.items()}
    for alias, first in facts["aliases"].items() if name in UNTOLD else ():
        assert values.pop(alias, values[first]).tobytes() == values[first].tobytes()
    assert values.keys() == wanted.keys()
    for key, value in wanted.items():
        is_parameter = f"fp32/{key}" in found
        assert is_parameter == (np.issubdtype(value.dtype, np.floating) and "running" not in key), key
        same = values[key].astype(np.float64) == value.astype(np.float64)
        assert same.all(), key
    assert said["from"] == (TORCH | SAFETENSORS)[name]
    assert said["aliases"] == ({} if name in UNTOLD else facts["aliases"])
    assert said["optimizer"] is None
    assert said["scheduler"] is False


def test_the_format_before_1_6_is_refused(tmp_path: Path) -> None:
    told = refused(source("weights_bin_legacy"), tmp_path / "run")
    assert "format of torch before 1.6; load and save it again" in told


def test_what_is_imported_loads_into_an_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    model(torch.randn(8, 5))
    wanted = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "model": wanted, "optimizer": {"state": {}}}, tmp_path / "model.pt")
    said = imported(tmp_path / "model.pt", tmp_path / "run")
    assert {line.partition(":")[0] for line in said["left_out"]} == {"epoch", "optimizer"}
    fresh = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "parallel": {"device": "cpu"}}
    engine = uni3d.initialize(model=fresh, config=config)[0]
    engine.load_checkpoint(tmp_path / "run", load_module_only=True)
    found = engine.module_state_dict()
    torch.distributed.destroy_process_group()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert engine.global_steps == 0


def test_the_way_out_and_back_in(tmp_path: Path) -> None:
    first = imported(source("deepspeed_zero1_bf16"), tmp_path / "run")
    weights = {k: v for k, v in atoms(first["url"]).items() if k.startswith(("fp32/", "value/"))}
    for name in ("model.safetensors", "model.bin"):
        assert run("export", tmp_path / "run", tmp_path / name).returncode == 0
        said = imported(
            tmp_path / name, tmp_path / f"from-{name}", "--buffers", "scale", "--buffers", "*.running_mean"
        )
        assert not differing(atoms(said["url"]), weights)
        assert said["aliases"] == {"head.weight": "embed.weight"}


def test_buffers_are_told_by_name(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3), "rope.inv_freq": torch.ones(2)}, tmp_path / "x.safetensors")
    said = imported(tmp_path / "x.safetensors", tmp_path / "run", "--buffers", "*.inv_freq")
    assert manifest(said["url"])["model"]["buffers"] == ["rope.inv_freq"]
    told = refused(tmp_path / "x.safetensors", tmp_path / "other", "--buffers", "*.inv_frek")
    assert "--buffers *.inv_frek matches no tensor of 2" in told


def test_a_number_that_fp32_has_not_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, 0.1], dtype=torch.float64)}, tmp_path / "x.safetensors")
    assert "w is float64 and has" in refused(tmp_path / "x.safetensors", tmp_path / "run")
    save_file({"w": torch.tensor([1.0, 0.5], dtype=torch.float64)}, tmp_path / "y.safetensors")
    assert atoms(imported(tmp_path / "y.safetensors", tmp_path / "run")["url"])["fp32/w"].tolist() == [
        1.0,
        0.5,
    ]


@pytest.mark.parametrize("name", ["weights_bin_sharded", "weights_llama_sharded"])
def test_an_index_must_be_true(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(source(name), tmp_path / "theirs"))
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    placed = list(content["weight_map"].values())
    full = max(files, key=placed.count)
    moved = next(key for key, file in content["weight_map"].items() if file == full)
    other = next(file for file in files if file != full)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], moved: other}}))
    assert any(
        words in refused(folder, tmp_path / "run")
        for words in (f"lacks {moved}, expected from the index", "which the index doesn't list")
    )
    index.write_text(
        json.dumps({"weight_map": {k: v for k, v in content["weight_map"].items() if k != moved}})
    )
    assert "which the index doesn't list" in refused(folder, tmp_path / "run")
    index.write_text(json.dumps({"weight_map": {moved: "../../etc/passwd"}}))
    assert "isn't a" in refused(folder, tmp_path / "run")
    index.write_text(json.dumps(content))
    (folder / files[-1]).unlink()
    assert "is missing" in refused(folder, tmp_path / "run")
    index.unlink()
    told = refused(folder, tmp_path / "run")
    assert (
        "give one file, or a folder with one index" in told
        or "give the folder, which must have their index" in told
    )
    assert "files; give the folder" in refused(folder / files[0], tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(content)
        told = refused(tmp_path / name, tmp_path / "run")
        assert str(tmp_path / name) in told
    assert "isn't a known kind of checkpoint" in refused(tmp_path / "empty", tmp_path / "run")
    assert "doesn't exist" in refused(tmp_path / "nothing", tmp_path / "run")
    (tmp_path / "x.txt").write_bytes(content or b"x")
    if content[:2] != b"PK":
        assert "neither a safetensors file nor a file written by torch.save" in refused(
            tmp_path / "x.txt", tmp_path / "run"
        )
