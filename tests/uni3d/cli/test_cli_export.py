"""`uni3d export`: formats, types, sharded output, selected tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import ckpt

VALUES = {
    "layers.0.w": torch.randn(300, 40, generator=torch.Generator().manual_seed(0)),
    "layers.1.w": torch.tensor([1.00390625, 1.01171875, 6e-8, -0.0, float("nan"), float("-inf")]),  # ties
    "norm": torch.randn(7),
}


def save(folder: Path, values: dict[str, Tensor]) -> None:
    arrays = {(name, "fp32"): tensor.numpy() for name, tensor in values.items()}
    arrays["count", "value"] = np.array(7)
    arrays["norm", "exp_avg"] = np.zeros(7, np.float32)
    whole = {key: ckpt.Box.whole(x.shape) for key, x in arrays.items()}
    specs = {
        key: ckpt.ShardSpec(ckpt.ArrayKey(*key), str(x.dtype), x.shape, whole[key])
        for key, x in arrays.items()
    }
    shards = [ckpt.Shard(specs[key], x) for key, x in arrays.items()]
    document = {"step": 1, "aliases": {"head": "layers.0.w"}}
    plan = ckpt.make_plan({0: list(specs.values())})
    ckpt.save(folder, "t1", shards, plan=plan, comm=ckpt.Solo(), document=document, durable=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "run", VALUES)
    return tmp_path / "run"


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("uni3d")), "export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
        result = export(folder, tmp_path / name, "--dtype", dtype)
        assert result.returncode == 0, result.stderr
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
        result = export(tmp_path / "run", tmp_path / name, "--dtype", "fp16")
        assert result.returncode == 1
        assert result.stderr.startswith("error: norm has ")
        assert "too large for" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no partial file is left"


def test_sharded_output(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export(folder, out, "--max-shard-size", "24KB", "--dtype", "bf16", "--json")
    assert result.returncode == 0, result.stderr
    row = json.loads(result.stdout)
    assert (row["tensors"], len(row["files"])) == (4, 4), "three files and their index"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*VALUES, "count"}
    assert index["metadata"]["total_size"] == 2 * sum(t.numel() for t in VALUES.values()) + 8
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as opened:
            assert opened.get_tensor(name).dtype == (torch.int64 if name == "count" else torch.bfloat16)
    assert row["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    again = export(folder, out, "--max-shard-size", "24KB")
    assert again.returncode == 1
    assert "exists; delete it" in again.stderr
    as_torch = export(folder, tmp_path / "bin", "--max-shard-size", "1GB", "--format", "torch")
    assert as_torch.returncode == 0, as_torch.stderr
    assert torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True).keys() == {
        *VALUES,
        "count",
        "head",
    }


def test_include_and_exclude(folder: Path, tmp_path: Path) -> None:
    result = export(
        folder, tmp_path / "m.safetensors", "--include", "layers.*", "--include", "norm", "--exclude", "*.0.*"
    )
    assert result.returncode == 0, result.stderr
    assert load_file(tmp_path / "m.safetensors").keys() == {"layers.1.w", "norm"}
    with safe_open(tmp_path / "m.safetensors", "pt") as opened:
        assert "aliases" not in opened.metadata(), "their tensor isn't exported"
