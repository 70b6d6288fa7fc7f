"""Weights in safetensors files, from which each rank reads its parts of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ckpt
from ckpt.format import MANIFEST
from ckpt.tags import committed_tags
from ckpt.threads import for_each
from parallel import HostComm, ParallelModel
from parallel.tensors import persistent_buffers
from uni3d import state
from uni3d.checkpoint.background import threads_per_rank
from uni3d.importers.detect import check_exists
from uni3d.importers.source import FLOATS, FilePlace, ForeignArray, Options
from uni3d.importers.state_dicts import read_safetensors
from uni3d.importers.tensor_parts import Slices, read_parts
from uni3d.state import Inventory


class _Part(NamedTuple):
    """Part of a stored tensor, and the memory that it belongs in."""

    place: FilePlace
    box: Slices
    memory: Tensor


_ByFile = dict[Path, list[_Part]]


class FileWeights:
    """Parameters and persistent buffers of a whole model in a safetensors file, or a folder of them."""

    def __init__(self, comm: HostComm, path: str | Path, model: nn.Module) -> None:
        """Collective: compare the files with the unsplit model. Rank 0 reads their headers for all.

        Raises:
            ckpt.CheckpointError: the files can't be read, or have other tensors than the model; the same on
                all ranks.
        """
        self._comm = comm
        self._path = path
        self._places: dict[str, list[FilePlace]] = ckpt.from_rank_0(comm, lambda: _places(self._path, model))
        self.bytes_read = 0
        """Bytes that this rank has read."""

    def fill(self, model: ParallelModel) -> None:
        """Read this rank's parts of the model. Collective.

        Raises:
            ckpt.CheckpointError: a file can't be read, or has other values under another name of a tied
                weight; the same on all ranks.
        """
        ckpt.agreed(self._comm, lambda: self._fill(model))
        if self._comm.rank == 0:
            print(f"uni3d: read the weights in {self._path}", file=sys.stderr, flush=True)

    def _fill(self, model: ParallelModel) -> None:
        copied: _ByFile = {}
        compared: _ByFile = {}  # the same weights under further names
        for array in Inventory(model).arrays(None):
            if array.tensor.numel() == 0:
                continue
            for nth, place in enumerate(self._places[array.spec.key.atom]):
                part = _Part(place, array.spec.box.slices, array.tensor)
                (compared if nth else copied).setdefault(place.file, []).append(part)
        threads = threads_per_rank(self._comm.size)
        for parts, use in ((copied, _copy), (compared, _compare)):
            self.bytes_read += sum(for_each(partial(_read, use), parts.items(), threads))


def _read(use: Callable[[_Part, Tensor], None], parts: tuple[Path, list[_Part]]) -> int:
    """Read parts of one file; return the bytes that were read."""
    file, wanted = parts
    size = 0
    arrays = read_parts(file, [(part.place.name, part.box) for part in wanted])
    for part, values in zip(wanted, arrays, strict=True):
        use(part, state.to_torch(values))
        size += values.nbytes
    return size


@torch.no_grad()
def _copy(part: _Part, values: Tensor) -> None:
    part.memory.copy_(values)


def _compare(part: _Part, values: Tensor) -> None:
    memory = part.memory.detach().cpu()
    if not torch.equal(memory, values.to(memory.dtype)):
        raise ckpt.CheckpointError(
            f"{part.place.file} has other values in {part.place.name} than under another name of the weight, "
            "which the model ties; untie it in the model, or save the tied model again"
        )


def _places(path: str | Path, model: nn.Module) -> dict[str, list[FilePlace]]:
    """Return the places of each parameter and persistent buffer, by all of its names in the model.

    Raises:
        ckpt.CheckpointError: the tensors aren't those of the model; lists all differences.
    """
    if "://" in str(path):
        raise ckpt.CheckpointError(f"weights={path}: weights are read from files, not from URLs; copy them")
    stored = _stored(Path(path))
    tensors = chain(model.named_parameters(remove_duplicate=False), persistent_buffers(model))
    names: dict[int, list[str]] = {}
    wanted: dict[str, Tensor] = {}
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
        wanted[name] = tensor
    problems = {
        "missing": [group[0] for group in names.values() if not stored.keys() & group],
        "not in the model": [name for name in stored if name not in wanted],
        "of another shape or type": [
            f"{name} is {array.dtype}{list(array.shape)}, in the model {_text(wanted[name])}"
            for name, array in stored.items()
            if name in wanted and not _fits(array, wanted[name])
        ],
    }
    if any(problems.values()):
        listed = [f"{len(each)} {what}: {_some(each)}" for what, each in problems.items() if each]
        raise ckpt.CheckpointError(f"weights in {path} don't fit the model: {'; '.join(listed)}")
    places: dict[str, list[FilePlace]] = {}
    for group in names.values():
        # One stored tensor may have several of the names.
        own = [*dict.fromkeys(_place(stored[name]) for name in group if name in stored)]
        places |= dict.fromkeys(group, own)
    return places


def _stored(path: Path) -> dict[str, ForeignArray]:
    """Return the files' tensors by all of their names."""
    try:
        check_exists(path, "weights=")
    except ckpt.CheckpointError as error:
        advice = "give a safetensors file, or a folder with one set of them, that all ranks see"
        raise ckpt.CheckpointError(f"{error}; {advice}") from None
    if path.is_dir() and ((path / MANIFEST).exists() or committed_tags(path)):
        raise ckpt.CheckpointError(
            f"weights={path} is a run of uni3d, not a folder of safetensors; give it as resume=, or make one "
            "of it by `uni3d export`"
        )
    source = read_safetensors(path, Options())
    stored = {array.name: array for array in source.arrays}
    return stored | {alias: stored[name] for alias, name in source.aliases.items()}


def _place(array: ForeignArray) -> FilePlace:
    assert array.place is not None, "the reader of safetensors knows it"
    return array.place


def _fits(array: ForeignArray, tensor: Tensor) -> bool:
    same = array.dtype == str(tensor.dtype).removeprefix("torch.")
    floats = array.dtype in FLOATS and tensor.is_floating_point()
    return tuple(tensor.shape) == array.shape and (same or floats)


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
