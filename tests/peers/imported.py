"""Helpers for tests of `uni3d import`: the fixtures, and reading back the checkpoints made of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import commands
import ml_dtypes
import numpy as np
import zarr
from commands import answer
from foreign_files import FIXTURES


def names(prefix: str) -> list[str]:
    """Return the names of fixtures with this prefix."""
    return sorted(path.name for path in FIXTURES.iterdir() if path.name.startswith(prefix))


def source(name: str) -> Path:
    return FIXTURES / name / "checkpoint"


imported, refused = partial(answer, "import"), partial(commands.refused, "import")


def atoms(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """Return every array of a checkpoint by state and name, read by zarr-python."""
    group = zarr.open_group(str(checkpoint), mode="r")
    manifest = json.loads((Path(checkpoint) / "manifest.json").read_text())
    found = {}
    listed = [part["arrays"] for part in manifest["parts"].values()]
    for atom, state in ((a, s) for arrays in listed for a, states in arrays.items() for s in states):
        array = group[f"atoms/{quote(atom, safe='')}/{quote(state, safe='')}"]
        values = np.asarray(array[...])
        if array.attrs.get("dtype") == "bfloat16":
            values = values.view(ml_dtypes.bfloat16)
        found[f"{state}/{atom}"] = values
    return found


def manifest(checkpoint: str | Path) -> dict[str, Any]:
    return json.loads((Path(checkpoint) / "manifest.json").read_text())


def differing(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> list[str]:
    """Return the names whose bits differ or that are only on one side."""
    return sorted(
        name
        for name in found.keys() | wanted.keys()
        if name not in found
        or name not in wanted
        or found[name].dtype != wanted[name].dtype
        or found[name].shape != wanted[name].shape
        or found[name].tobytes() != wanted[name].tobytes()
    )
