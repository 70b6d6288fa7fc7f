"""Helpers for tests of importers: fixtures, and pickles that would run code."""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  safetensors' numpy reader needs it for bfloat16
import numpy as np
import numpy.typing as npt
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file
from torch.distributed.checkpoint import FileSystemWriter

from uni3d.importers.detect import read
from uni3d.importers.source import Options, Source

FIXTURES = Path(__file__).parents[1] / "peers" / "fixtures"


class Runs:
    """An object whose unpickling creates the file `path` through the function `how`."""

    def __init__(self, how: str, path: Path) -> None:
        self.how, self.path = how, path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self.how == "os.system":
            return os.system, (f"touch {self.path}",)
        if self.how == "builtins.eval":
            return eval, (f"open({str(self.path)!r}, 'w')",)
        return Path.touch, (self.path,)


RUNS = {
    "os.system": r"posix\.system",
    "builtins.eval": r"(builtins|__builtin__)\.eval",
    "Path.touch": r"((builtins|__builtin__)\.getattr|pathlib\.Path\.touch)",
}
"""Function -> global in its pickle, which depends on the protocol."""


def source_of(path: Path, **options: Any) -> Source:
    return read(path, "auto", Options(**options))


def values(source: Source) -> dict[str, npt.NDArray[Any]]:
    """Return all arrays in their stored types, named as in `expected.safetensors`."""
    return {f"{a.state}/{a.name}": a.read().astype(a.dtype) for a in source.arrays}


def expected(name: str, fixtures: Path = FIXTURES) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return the live run's tensors by state and name, and its facts."""
    folder = fixtures / name
    return load_file(folder / "expected.safetensors"), json.loads((folder / "expected.json").read_text())


def rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace the data.pkl in a file of torch.save by the result of `change`, leaving the rest as it was."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (n for n in entries if n.endswith("/data.pkl"))
    entries[name] = change(entries[name])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, data in entries.items():
            archive.writestr(key, data)


def assert_bits(found: dict[str, npt.NDArray[Any]], wanted: dict[str, npt.NDArray[Any]]) -> None:
    """Check that both have the same names and the same bits."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


def saved(folder: Path, state: dict[str, Any], **settings: Any) -> Path:
    """Save `state` as a distributed checkpoint from one process."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there is one process
        dcp.save(state, storage_writer=FileSystemWriter(folder, **settings), no_dist=True)
    return folder
