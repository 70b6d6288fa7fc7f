"""`uni3d export`: formats, types, sharded output, selected tensors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import answer, refused
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from whole_arrays import save_whole

VALUES = {
    "layers.0.w": torch.randn(300, 40, generator=torch.Generator().manual_seed(0)),
    "layers.1.w": torch.tensor([1.00390625, 1.01171875, 6e-8, -0.0, float("nan"), float("-inf")]),  # ties
    "norm": torch.randn(7),
}


def save(folder: Path, values: dict[str, Tensor]) -> None:
    arrays = {(name, "fp32"): tensor.numpy() for name, tensor in values.items()}
    arrays["count", "value"] = np.array(7)
    arrays["norm", "exp_avg"] = np.zeros(7, np.float32)
    save_whole(folder, "t1", arrays, step=1, aliases={"head": "layers.0.w"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", VALUES)
    return tmp_path / "run"


def same(found: Tensor, expected: Tensor) -> bool:
    """Compare bit for bit, treating all NaNs as equal."""
    nan = expected.isnan()
    if (found.dtype, found.shape) != (expected.dtype, expected.shape) or not torch.equal(found.isnan(), nan):
        return False
    found, expected = found[~nan], expected[~nan]
    return torch.equal(found.signbit(), expected.signbit()) and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rounding_matches_torch(folder: Path, tmp_path: Path, dtype: str) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    expected = {name: tensor.to(kind) for name, tensor in VALUES.items()} | {"count": torch.tensor(7)}
    for name in ("m.safetensors", "m.bin"):
        answer("export", folder, tmp_path / name, "--dtype", dtype)
    found = load_file(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    found = torch.load(tmp_path / "m.bin", weights_only=True)
    assert found.keys() == {*expected, "head"}
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    assert found["head"].data_ptr() == found["layers.0.w"].data_ptr()


def test_values_out_of_range_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "run", VALUES | {"norm": torch.full((7,), 70_000.0)})
    for name in ("m.safetensors", "m.bin"):
        error = refused("export", tmp_path / "run", tmp_path / name, "--dtype", "fp16")
        assert error.startswith("norm has ")
        assert "too large for" in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no partial file is left"


def test_sharded_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    row = answer("export", folder, out, "--max-shard-size", "24KB", "--dtype", "bf16")
    assert (row["tensors"], len(row["files"])) == (4, 4), "three files and their index"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*VALUES, "count"}
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in VALUES.values()) + 8
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert opened.get_tensor(name).dtype == (torch.int64 if name == "count" else torch.bfloat16)
    assert row["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert "exists; delete it" in refused("export", folder, out, "--max-shard-size", "24KB")
    answer("export", folder, tmp_path / "bin", "--max-shard-size", "1GB", "--format", "torch")
    as_torch = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert as_torch.keys() == {*VALUES, "count", "head"}


def test_include_and_exclude(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    answer("export", folder, out, "--include", "layers.*", "--include", "norm", "--exclude", "*.0.*")
    assert load_file(out).keys() == {"layers.1.w", "norm"}
    with safe_open(out, "pt") as opened:
        assert "aliases" not in opened.metadata(), "their tensor isn't exported"
