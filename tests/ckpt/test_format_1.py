"""Checkpoints of format 1 that were written once are read for ever.

This file and `tests/fixtures/format-1` are never changed: whatever fails here would fail for a user with an
old checkpoint. `tests/fixtures/make_format_1.py` wrote the fixtures.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import ml_dtypes
import numpy as np
import pytest
import zarr

import ckpt

FOLDER = Path(__file__).parents[1] / "fixtures" / "format-1"

SHAPES = {
    ("blocks.0.weight", "fp32"): ("float32", (37, 10)),
    ("blocks.0.weight", "exp_avg"): ("float32", (37, 10)),
    ("blocks.0.bias", "fp32"): ("float32", (37,)),
    ("blocks/1 größe", "fp32"): ("float32", (10, 33)),
    ("empty", "fp32"): ("float32", (0, 4)),
    ("scale", "value"): ("float64", ()),
    ("half", "value"): ("bfloat16", (9,)),
    ("mask", "value"): ("bool", (3, 5)),
    ("count", "value"): ("int64", (2,)),
}
DOCUMENT = {
    "step": 7,
    "aliases": {"head.weight": "blocks.0.weight"},
    "model": {"parameters": {"blocks.0.bias": {"requires_grad": False}}, "buffers": ["scale"]},
    "client_state": {"note": "read for ever"},
}
RUNS = ("array", "writer")


def expected(key: tuple[str, str]) -> np.ndarray[Any, Any]:
    """Return the content of an array: numbers that follow from its place among the names."""
    dtype, shape = SHAPES[key]
    n, first = int(np.prod(shape)), 100 * list(SHAPES).index(key)
    numbers = (np.arange(n) * 37 + first) % 251
    if dtype == "bool":
        return (numbers % 2 == 0).reshape(shape)
    return numbers.astype(getattr(ml_dtypes, dtype, dtype)).reshape(shape)


@pytest.mark.parametrize("run", RUNS)
def test_every_array_is_read(run: str) -> None:
    checkpoint = ckpt.open_checkpoint(FOLDER / run)
    assert checkpoint.tag == "global_step7"
    assert {tuple(key) for key in checkpoint.arrays} == set(SHAPES)
    for key in SHAPES:
        found, wanted = checkpoint.read(*key), expected(key)
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    part = checkpoint.read("head.weight", "fp32", ckpt.Box((5, 3), (30, 2)))
    assert part.tolist() == expected(("blocks.0.weight", "fp32"))[5:35, 3:5].tolist()
    assert {key: checkpoint.manifest[key] for key in DOCUMENT} == DOCUMENT
    assert len(checkpoint.manifest["parts"]) == 2


@pytest.mark.parametrize("run", RUNS)
def test_it_is_sound(run: str) -> None:
    checkpoint = ckpt.open_checkpoint(FOLDER / run)
    assert ckpt.verify(checkpoint) == []
    assert ckpt.absent(checkpoint) == []


def test_what_the_files_hold() -> None:
    pattern = "global_step7/atoms/blocks.0.weight/fp32/c.*"
    assert {run: len(list((FOLDER / run).glob(pattern))) for run in RUNS} == {"array": 1, "writer": 2}


@pytest.mark.parametrize("run", RUNS)
def test_zarr_reads_it(run: str) -> None:
    group = zarr.open_group(FOLDER / run / "global_step7", mode="r")
    for (atom, state), (dtype, _) in SHAPES.items():
        found = np.asarray(group[f"atoms/{quote(atom, safe='')}/{state}"][...])
        assert found.tobytes() == expected((atom, state)).tobytes(), dtype


@pytest.mark.parametrize("run", RUNS)
def test_its_own_script_exports_it(run: str, tmp_path: Path) -> None:
    """Run the script that lies in the checkpoint, which is as old as the checkpoint."""
    script = FOLDER / run / "global_step7" / "zero_to_fp32.py"
    command = [sys.executable, script, FOLDER / run, tmp_path, "--safe_serialization"]
    subprocess.run(command, check=True, capture_output=True)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for (atom, state), (_, shape) in SHAPES.items():
        if state in ("fp32", "value"):
            begin, end = header[atom]["data_offsets"]
            assert header[atom]["shape"] == list(shape)
            assert data[8 + size + begin : 8 + size + end] == expected((atom, state)).tobytes()
    assert json.loads(header["__metadata__"]["aliases"]) == DOCUMENT["aliases"]
