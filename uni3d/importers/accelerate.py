"""Reader of the folders that accelerate, and transformers' Trainer, write under FSDP, with sharded states.

pytorch_model_fsdp_0/     {"model": ...}, in torch's distributed checkpoint
optimizer_0/              {"optimizer": ...}, likewise
scheduler.bin, ...        see `trainer_files`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.importers.dcp import source_of
from uni3d.importers.dcp.layout import METADATA, ChunkedTensor, Layout
from uni3d.importers.dcp.names import Steps, sort_names
from uni3d.importers.source import Array, Options, Source
from uni3d.importers.trainer_files import with_counters

_MODEL, _OPTIMIZER = "pytorch_model_fsdp_", "optimizer_"


def is_sharded(folder: Path) -> bool:
    """Return whether it is such a folder."""
    return (folder / f"{_MODEL}0" / METADATA).is_file()


def read_accelerate(path: Path, options: Options) -> Source:
    """Read the model and its optimizer."""
    if not is_sharded(path):
        raise CheckpointError(f"{path} has no {_MODEL}0/{METADATA}")
    for kind in (_MODEL, _OPTIMIZER):
        if (path / f"{kind}1").is_dir():
            raise CheckpointError(
                f"{path} has several {'models' if kind == _MODEL else 'optimizers'}; give one of its folders "
                f"{kind}<N>, which torch's distributed checkpoint wrote"
            )
    folders = [each for each in (path / f"{_MODEL}0", path / f"{_OPTIMIZER}0") if each.is_dir()]
    content = _Together(path, [Layout(folder, options) for folder in folders])
    source = source_of(content, sort_names(content), options)
    source = replace(source, kind="accelerate", left_out=content.left_out, files=content.files)
    return with_counters(source, path, options)


class _Together:
    """Several folders as one state_dict (`dcp.names.Content`)."""

    def __init__(self, path: Path, layouts: list[Layout]) -> None:
        self.where, self.without = str(path), layouts[0].without
        self.left_out = [line for layout in layouts for line in layout.left_out]
        self.files = frozenset(file for layout in layouts for file in layout.files)
        self.steps: dict[str, Steps] = {}
        self.tensors: Mapping[str, ChunkedTensor] = {k: v for la in layouts for k, v in la.tensors.items()}
        self._home: dict[str, Layout] = {}
        for layout in layouts:
            if twice := sorted(layout.steps.keys() & self.steps.keys()):
                raise CheckpointError(f"{path} has {twice[0]} in two of its folders")
            self.steps |= layout.steps
            self._home |= dict.fromkeys(layout.steps, layout)

    def read(self, name: str) -> Array:
        return self._home[name].read(name)

    def read_part(self, name: str, part: tuple[slice, ...]) -> Array:
        return self._home[name].read_part(name, part)

    def number(self, name: str) -> Any:
        return self._home[name].number(name)

    def object(self, name: str) -> Any:
        return self._home[name].object(name)

    def tied(self, name: str, owner: str) -> bool:
        return self._home[name].tied(name, owner)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(f"{name}: {reason}")

    def note(self, line: str) -> None:
        self.left_out.append(line)
