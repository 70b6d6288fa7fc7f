"""Folders of DeepSpeed checkpoints, and the rank of each file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt import CheckpointError
from uni3d.importers.deepspeed.zero import RankFiles
from uni3d.importers.source import Options
from uni3d.importers.torch_files import load

_LATEST = ("latest", "latest_universal")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-(?:model_(\d+)-)?model_states\.pt")
_Files = dict[int, list[Path]]
_EXPERTS = re.compile(r"(?:layer_\d+_)?expert_\d+_.*|expp_rank_.*")


def checkpoint_folder(path: Path, tag: str | None) -> Path | None:
    """Return a checkpoint's folder: `path` itself or a tag in it; None if there is no checkpoint.

    Raises:
        CheckpointError: the tag given, or named by the file `latest`, doesn't exist; or there are several
            tags and neither names one.
    """
    if not path.is_dir():
        return None
    if tag is None and _is_one(path):
        return path
    tags = sorted(each.name for each in path.iterdir() if each.is_dir() and _is_one(each))
    named = [(path / name).read_text().strip() for name in _LATEST if (path / name).is_file()]
    if not tags and not named:
        return None
    wanted = tag or (named[0] if named else None) or (tags[0] if len(tags) == 1 else None)
    if wanted in tags:
        return path / str(wanted)
    there = f"it has {', '.join(tags)}" if tags else "it has no DeepSpeed checkpoint"
    what = f"no checkpoint {wanted!r}" if wanted else "several checkpoints and no file 'latest'; give --tag"
    raise CheckpointError(f"{path} has {what}; {there}")


def _is_one(folder: Path) -> bool:
    return is_universal(folder) or any(folder.glob("*_model_states.pt"))


def is_universal(folder: Path) -> bool:
    return (folder / "zero").is_dir()


class RankFolder:
    """A checkpoint's files, sorted by rank.

    Attributes:
        tp: number of tensor-parallel ranks.
        of_stage: files by pipeline stage, then by tensor-parallel rank.
        by_tp: files by tensor-parallel rank, then by pipeline stage.
        files: paths of all these, and of the files that name the newest tag.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        """Unpickle all files; no tensor is read."""
        self._folder, self._options = folder, options
        models, optimizers, layers = _sorted(folder)
        self.files = {
            *(path for of_rank in (*models.values(), *optimizers.values()) for path in of_rank),
            *(path for of_tp in layers.values() for _, path in of_tp),
            *(folder.parent / name for name in _LATEST),
            *(folder.glob("zero_pp_rank_0_*_model_states.pt") if is_universal(folder) else ()),
        }
        opened = {m: [self._open(path) for path in of] for m, of in models.items()}
        states = {m: [self._open(p)["optimizer_state_dict"] for p in of] for m, of in optimizers.items()}
        if states and states.keys() != opened.keys():
            raise CheckpointError(
                f"{folder} has model files of ranks {sorted(opened)}, but optimizer files of ranks "
                f"{sorted(states)}"
            )
        self.tp = _tensor_parallel(folder, opened[0][0], len(opened), layers)
        modules = [self._module(layers, tp, opened[tp][0]) for tp in range(self.tp)]
        self.of_stage = [
            [
                RankFiles(
                    where=f"{folder.name}/*mp_rank_{stage * self.tp + tp:02d}*",
                    models=opened[stage * self.tp + tp],
                    optimizers=states.get(stage * self.tp + tp, []),
                    module=modules[tp],
                    verify=options.verify,
                )
                for tp in range(self.tp)
            ]
            for stage in range(len(opened) // self.tp)
        ]
        self.by_tp = list(zip(*self.of_stage, strict=True))

    @property
    def first(self) -> Mapping[str, Any]:
        """The model file of the first rank, which also has everything that isn't per rank."""
        return self.of_stage[0][0].models[0]

    def _open(self, path: Path) -> Mapping[str, Any]:
        content = load(path, self._options)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, expected DeepSpeed's dict")
        return content

    def _module(
        self, layers: Mapping[int, list[tuple[int, Path]]], tp: int, model: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Return the model's state_dict; a pipeline has a file for each layer."""
        if not layers:
            return model.get("module") or {}
        if model.get("module"):
            raise CheckpointError(
                f"{self._folder} has two sets of weights: {layers[tp][0][1].name} (and others), and those in "
                f"mp_rank_{tp:02d}_model_states.pt; delete the stale files"
            )
        return {
            f"{layer}.{name}": value
            for layer, path in layers.get(tp, [])
            for name, value in self._open(path).items()
        }


def _sorted(folder: Path) -> tuple[_Files, _Files, dict[int, list[tuple[int, Path]]]]:
    """Return model and optimizer files by model- and data-parallel rank, and layer files by tp rank."""
    models: dict[int, dict[int, Path]] = defaultdict(dict)
    optimizers: dict[int, dict[int, Path]] = defaultdict(dict)
    layers: dict[int, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.glob("*.pt")):
        if _EXPERTS.fullmatch(path.name):
            raise CheckpointError(f"{path} belongs to a mixture of experts, which isn't supported")
        if found := _MODEL.fullmatch(path.name):
            first = models[int(found[2])].setdefault(int(found[1] or 0), path)
        elif found := _OPTIMIZER.fullmatch(path.name):
            first = optimizers[int(found[2])].setdefault(int(found[1]), path)
        elif found := _LAYER.fullmatch(path.name):
            first = layers[int(found[2] or 0)].setdefault(int(found[1]), path)
        else:
            continue
        # DeepSpeed looks for one at ZeRO 3 and for the other below; an export has both, weights are in zero/.
        if first != path and not (is_universal(folder) and first.name.startswith("mp_rank_")):
            raise CheckpointError(
                f"{folder} has files of two saves for one rank: {first.name} and {path.name}; delete the "
                "stale ones"
            )
    for files in (models, optimizers):
        _check_all_there(folder, sorted(files), "mp_rank_")
        for of_rank in files.values():
            _check_all_there(folder, sorted(of_rank), "zero_pp_rank_")
    if not models:
        raise CheckpointError(f"{folder} has no mp_rank_00_model_states.pt")
    return (
        {m: [files[i] for i in sorted(files)] for m, files in models.items()},
        {m: [files[i] for i in sorted(files)] for m, files in optimizers.items()},
        {tp: sorted(files.items()) for tp, files in layers.items()},
    )


def _check_all_there(folder: Path, numbers: list[int], what: str) -> None:
    missing = sorted(set(range(len(numbers))) - set(numbers))
    if missing:
        raise CheckpointError(
            f"{folder} has files of ranks {what}{numbers}, but those of {missing} are missing"
        )


def _tensor_parallel(folder: Path, model: Mapping[str, Any], ranks: int, layers: Mapping[int, Any]) -> int:
    """Return the number of tensor-parallel ranks among the model-parallel ones."""
    said = model.get("checkpoint_parallel_dimensions") or {}
    if said.get("tp_degree"):
        tp, pp = int(said["tp_degree"]), int(said.get("pp_degree") or 1)
    elif layers:
        tp, pp = len(layers), ranks // len(layers)
    else:
        tp, pp = int(model.get("mp_world_size") or ranks), 1
    if tp * pp != ranks:
        raise CheckpointError(
            f"{folder} was written by {pp} pipeline stages x {tp} tensor-parallel ranks, but has files of "
            f"{ranks} ranks"
        )
    return tp
