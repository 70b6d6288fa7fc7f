"""Reader of DeepSpeed's universal checkpoints, made by `ds_to_universal`: a folder for each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.importers.deepspeed import assemble, joining
from uni3d.importers.deepspeed.folders import RankFolder, checkpoint_folder, is_universal
from uni3d.importers.deepspeed.tensor_parallel import Rules
from uni3d.importers.deepspeed.zero import ParameterPart, checked
from uni3d.importers.source import PARAMETER, Array, Options, Read, Source
from uni3d.importers.torch_files import load
from uni3d.importers.torch_tensors import StoredTensor, item

_STEP, _COMMON = "step", "optimizer_state.pt"


def read_universal(path: Path, options: Options) -> Source:
    """Read a universal checkpoint; `path` is its folder or that of its run."""
    folder = checkpoint_folder(path, options.tag)
    if folder is None or not is_universal(folder):
        raise CheckpointError(f"{folder or path} has no folder zero/, so it isn't a universal checkpoint")
    if options.in_model_order:
        raise CheckpointError(f"{folder} names its optimizer states; leave --in-model-order out")
    ranks = RankFolder(folder, options)
    common = _open(folder / "zero" / _COMMON, options)
    inner = common.get("optimizer_state_dict", common)  # nested by ZeRO-3
    groups = [dict(group) for group in inner["param_groups"]]
    trained = {
        name: _part(folder, name, group, ranks, inner, options)
        for name, group in _homes(ranks, groups, stage3="optimizer_state_dict" in common).items()
    }
    first: dict[int | None, tuple[str, ParameterPart]] = {}
    for name, part in trained.items():
        other, like = first.setdefault(part.group, (name, part))
        if lacking := sorted(part.states.keys() ^ like.states.keys()):
            raise CheckpointError(
                f"{folder}: only one of zero/{name} and zero/{other} has {', '.join(lacking)}; a file is "
                "missing"
            )
    found = assemble(
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
    zero, known = folder / "zero", {*(array.name for array in found.arrays), *found.aliases}
    others = sorted(each.name for each in zero.iterdir() if each.is_dir() and each.name not in known)
    return replace(
        found,
        files=found.files | {zero / _COMMON},
        left_out=[*found.left_out, *(f"zero/{name}: the model files don't name it" for name in others)],
    )


def _homes(ranks: RankFolder, groups: list[dict[str, Any]], *, stage3: bool) -> dict[str, tuple[int, int]]:
    """Map each trained parameter to its parameter group and its flat group."""
    homes: dict[str, tuple[int, int]] = {}
    for stages in ranks.by_tp:
        for rank in stages:
            for index, shapes in enumerate(rank.models[0].get("param_shapes") or []):
                home = index
                if stage3:
                    home = next((i for i, group in enumerate(groups) if index in group["params"]), -1)
                if home == -1:
                    raise CheckpointError(
                        f"{ranks.of_stage[0][0].where} has {index + 1} or more groups of parameters, and no "
                        f"param_groups of {_COMMON} names number {index}; one of the files is damaged"
                    )
                for name in shapes:
                    homes.setdefault(str(name), (home, index))
    if not homes:
        raise CheckpointError(f"{ranks.of_stage[0][0].where} has no param_shapes, which name the parameters")
    return homes


def _part(
    folder: Path,
    name: str,
    home: tuple[int, int],
    ranks: RankFolder,
    inner: Mapping[str, Any],
    options: Options,
) -> ParameterPart:
    """Return a parameter with its states, from the files in its folder."""
    place = folder / "zero" / name
    files = {path.stem: path for path in sorted(place.glob("*.pt"))}
    if PARAMETER not in files:
        raise CheckpointError(f"{place / 'fp32.pt'} is missing")
    group, index = home
    scalars = {_STEP: float(item(load(files.pop(_STEP), options)))} if _STEP in files else {}
    if not scalars:  # without a file of its own, the step is in the flat group
        state = (inner.get("state") or {}).get(index) or {}
        scalars = {_STEP: float(item(state[_STEP]))} if _STEP in state else {}
    states: dict[str, Read] = {}
    shapes = set()
    for key, path in files.items():
        tensor = load(path, options)
        if isinstance(tensor, Mapping):
            tensor = tensor.get("param")
        if not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{path} has no tensor under 'param'")
        shape = _shape(tensor, name, ranks)
        states[key] = partial(_shaped, tensor, shape)
        shapes.add(shape)
    if len(shapes) > 1:
        raise CheckpointError(f"{place} has tensors of different shapes: {sorted(shapes)}")
    weights = ranks.of_stage[0][0].module.get(name)
    if options.verify and ranks.tp == 1 and isinstance(weights, StoredTensor) and weights.shape in shapes:
        states[PARAMETER] = partial(checked, states[PARAMETER], weights, f"{folder.name}: {name}")
    origin = f"{folder.name}/zero"
    return ParameterPart(shape=shapes.pop(), origin=origin, states=states, group=group, scalars=scalars)


def _shaped(tensor: StoredTensor, shape: tuple[int, ...]) -> Array:
    return tensor.read().reshape(shape)


def _shape(tensor: StoredTensor, name: str, ranks: RankFolder) -> tuple[int, ...]:
    """Return the shape in the model files: the converter leaves ZeRO-3's tensors flat."""
    if ranks.tp > 1:  # only the shards' shapes are known
        return tensor.shape
    for stages in ranks.of_stage:
        for shapes in stages[0].models[0].get("param_shapes") or []:
            if name in shapes and prod(shapes[name]) == tensor.size:
                return tuple(shapes[name])
    return tensor.shape


def _open(path: Path, options: Options) -> Mapping[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    content = load(path, options)
    if not isinstance(content, Mapping) or "param_groups" not in content.get("optimizer_state_dict", content):
        raise CheckpointError(f"{path} has no param_groups")
    return content
