"""Modules that importing `ckpt` loads: inspecting a checkpoint must not wait for torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ckpt_helpers import save_arrays

import ckpt

REPOSITORY = Path(ckpt.__file__).parents[1]
HEAVY = {"torch", "zarr", "fsspec", "safetensors", "tensorstore", "ml_dtypes", "pydantic", "typer", "rich"}

READ = """
import json, sys
import ckpt
if len(sys.argv) > 1:
    checkpoint = ckpt.open_checkpoint(sys.argv[1])
    for key in checkpoint.arrays:
        checkpoint.read(*key)
    ckpt.export_safetensors(checkpoint, sys.argv[1] + "/out.safetensors")
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


@pytest.mark.parametrize("reads", [False, True], ids=["import", "read-and-export"])
def test_nothing_heavy_is_loaded(tmp_path, reads):
    save_arrays(tmp_path, "t1", {("w", "fp32"): np.ones(3, np.float32)})
    command = [sys.executable, "-c", READ, *([str(tmp_path)] if reads else [])]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(answer))
    assert "ckpt" in loaded
    assert not loaded & (HEAVY | {"parallel", "uni3d"})
