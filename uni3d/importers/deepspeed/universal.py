"""DeepSpeed's universal checkpoints: a folder for each parameter below `zero/`, made by `ds_to_universal`."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ckpt import CheckpointError
from uni3d.importers.deepspeed import assemble, joining
from uni3d.importers.deepspeed.folders import RankFiles, checkpoint_folder, is_universal
from uni3d.importers.deepspeed.tensor_parallel import Rules
from uni3d.importers.deepspeed.zero import Checked, Part, Read
from uni3d.importers.source import PARAMETER, Options, Source
from uni3d.importers.torch_files import TorchFile
from uni3d.importers.torch_tensors import StoredTensor

_STEP = "step"


def read_universal(path: Path, options: Options) -> Source:
    """A universal checkpoint in a run's folder, or in its own.

    Raises:
        CheckpointError: files are missing, damaged or don't fit together, or something in them isn't read.
    """
    folder = checkpoint_folder(path, options.tag)
    if folder is None or not is_universal(folder):
        raise CheckpointError(f"{folder or path} has no folder zero/, so it isn't a universal checkpoint")
    if options.in_model_order:
        raise CheckpointError(f"{folder} says whose its optimizer's states are; leave --in-model-order out")
    ranks = RankFiles(folder, options)
    common = _open(folder / "zero" / "optimizer_state.pt", options)
    inner = common.get("optimizer_state_dict", common)  # ZeRO-3's keeps what is below it
    groups = [dict(group) for group in inner["param_groups"]]
    trained = {
        name: _part(folder, name, group, ranks, inner, options)
        for name, group in _homes(ranks, groups, stage3="optimizer_state_dict" in common).items()
    }
    return assemble(
        "deepspeed-universal",
        folder,
        ranks,
        trained=trained,
        trained_by_tp=[trained] * ranks.tp,
        rules=Rules(joining(ranks), options, str(folder)),
        groups=groups,
        optimizer=common,
        left_out=[],
    )


def _homes(ranks: RankFiles, groups: list[dict[str, Any]], *, stage3: bool) -> dict[str, tuple[int, int]]:
    """Of each trained parameter, its parameter group and the number of the flat group it was in."""
    homes: dict[str, tuple[int, int]] = {}
    for stages in ranks.by_tp:
        for rank in stages:
            for index, shapes in enumerate(rank.models[0].get("param_shapes") or []):
                home = index
                if stage3:
                    home = next(i for i, group in enumerate(groups) if index in group["params"])
                for name in shapes:
                    homes.setdefault(str(name), (home, index))
    if not homes:
        raise CheckpointError(f"{ranks.of_stage[0][0].where} has no param_shapes, which name the parameters")
    return homes


def _part(
    folder: Path,
    name: str,
    home: tuple[int, int],
    ranks: RankFiles,
    inner: Mapping[str, Any],
    options: Options,
) -> Part:
    """A parameter with its states, from the files in its folder."""
    place = folder / "zero" / name
    files = {path.stem: path for path in sorted(place.glob("*.pt"))}
    if PARAMETER not in files:
        raise CheckpointError(f"{place / 'fp32.pt'} is missing")
    group, index = home
    scalars = {_STEP: _number(_load(files.pop(_STEP), options))} if _STEP in files else {}
    if not scalars:  # it isn't in a file of its own, then it is the flat group's
        state = (inner.get("state") or {}).get(index) or {}
        scalars = {_STEP: _number(state[_STEP])} if _STEP in state else {}
    states: dict[str, Read] = {}
    shapes = set()
    for key, path in files.items():
        tensor = _load(path, options)
        if isinstance(tensor, Mapping):
            tensor = tensor.get("param")
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{path} has no tensor under 'param'")
        shape = _shape(tensor, name, ranks)
        states[key] = _Shaped(tensor, shape)
        shapes.add(shape)
    if len(shapes) > 1:
        raise CheckpointError(f"{place} has tensors of several shapes: {sorted(shapes)}")
    weights = ranks.of_stage[0][0].module.get(name)
    if options.verify and ranks.tp == 1 and isinstance(weights, StoredTensor) and weights.shape in shapes:
        states[PARAMETER] = Checked(states[PARAMETER], weights, f"{folder.name}: {name}")
    return Part(shape=shapes.pop(), origin=f"{folder.name}/zero", states=states, group=group, scalars=scalars)


class _Shaped:
    """A tensor in the shape that its parameter has."""

    def __init__(self, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
        self._tensor, self._shape = tensor, shape

    def __call__(self) -> npt.NDArray[Any]:
        return self._tensor.read().reshape(self._shape)


def _shape(tensor: StoredTensor, name: str, ranks: RankFiles) -> tuple[int, ...]:
    """As the model files have it: of ZeRO-3's, the converter leaves the tensors flat."""
    if ranks.tp > 1:  # there only the parts' shapes are known
        return tensor.shape
    for stages in ranks.of_stage:
        for shapes in stages[0].models[0].get("param_shapes") or []:
            if name in shapes and prod(shapes[name]) == tensor.size:
                return tuple(shapes[name])
    return tensor.shape


def _load(path: Path, options: Options) -> Any:
    return TorchFile(path, verify=options.verify, stand_ins=options.stand_ins).load()


def _open(path: Path, options: Options) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = _load(path, options)
    if not isinstance(content, Mapping) or "param_groups" not in content.get("optimizer_state_dict", content):
        raise CheckpointError(f"{path} has no param_groups")
    return content


def _number(value: Any) -> float:
    return float(value.read()) if isinstance(value, StoredTensor) else float(value)
