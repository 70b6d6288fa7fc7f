"""Export to a folder of Megatron-core's distributed checkpoint, `torch_dist`.

OUT/metadata.json    the format
OUT/common.pt        step, client state, the optimizer's groups
OUT/.metadata        torch's: the tensors, their chunks and files
OUT/__0_<n>.distcp   an array

The layers of a kind are one tensor, `decoder.layers.mlp.linear_fc2.weight` for all of
`decoder.layers.<i>.mlp.linear_fc2.weight`, with a chunk for each layer, unless layers differ. A moment is
`optimizer.state.exp_avg.<name>`, and the fp32 weights are also `optimizer.state.param.<name>` and
`optimizer.state.fp32_param.<name>`, in the same files, as different optimizers of Megatron read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

import ckpt
from ckpt.parts import ArrayInfo
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.export.new_folder import new_folder
from uni3d.export_torch.optimizer import ADAM_MOMENTS, TorchOptimizer, adam_step, read_optimizer
from uni3d.export_torch.torch_file import Shaped, write_torch_file
from uni3d.manifest import RunManifest
from uni3d.resume_rules import IMPLEMENTATION_KEYS

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d+)\.(.+)")
_MASTERS = ("param", "fp32_param")
"""Names of the fp32 weights in the distributed optimizer and in the one for half precision."""
_OWN_KEYS = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True}
"""Keys of a group by which Megatron finds it, beside `wd_mult`."""

_WHOLE = -1  # the layer of what isn't one of a stack
Stack = tuple[ArrayInfo, ...]
"""Arrays of one shape and type, one for each layer."""


@dataclass(frozen=True, kw_only=True)
class MegatronContent:
    """Tensors, and all that is beside them."""

    tensors: Mapping[str, ArrayInfo | Stack]
    """Stored arrays by Megatron's names."""
    common: Mapping[str, Any]
    """Content of `common.pt`."""

    @property
    def arrays(self) -> set[ArrayInfo]:
        """The arrays, each once."""
        return {info for held in self.tensors.values() for info in _parts(held)}


def megatron_content(
    checkpoint: ckpt.Checkpoint, names: Mapping[str, str], *, optimizer: bool = False
) -> MegatronContent:
    """Return what to export of the tensors in `names` (stored name -> Megatron's, before stacking).

    A tied weight is there once.

    Raises:
        ValueError: Megatron's format, or its optimizer, can't hold it.
    """
    weights = StoredWeights(checkpoint)
    if weights.extra_states:
        raise ValueError(
            f"{checkpoint.url} has extra states of modules ({next(iter(weights.extra_states))}), which "
            "Megatron would only read from its own modules; use --format dcp"
        )
    named = {new: weights.infos[old] for old, new in names.items()}
    common, states = _counters(checkpoint), dict[str, dict[str, ArrayInfo]]()
    if optimizer:
        held = read_optimizer(checkpoint)
        step = adam_step(checkpoint, held, "--format megatron")
        states = {
            names[name]: {key: state[key] for key in ADAM_MOMENTS}
            | dict.fromkeys(_MASTERS, weights.infos[name])
            for name, state in held.states.items()
            if name in names
        }
        common["optimizer"] = _optimizer(RunManifest.of(checkpoint), held, names, named, step)
    tensors, alike = _stacked(named, states)
    common["content_metadata"] = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    } | ({} if alike else {"non_homogeneous_layers": True})
    return MegatronContent(tensors=tensors, common=common)


def write_megatron(
    checkpoint: ckpt.Checkpoint,
    output: Path,
    content: MegatronContent,
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `content` to a new folder that `megatron.core.dist_checkpointing.load` reads; return its files.

    The folder appears when all of it is on disk. Parameters are rounded to `dtype`, if given.

    Raises:
        FileExistsError: `output` exists.
        ckpt.CheckpointError: a chunk is damaged, or a number is too large for `dtype`.
        OSError: a file can't be written.
    """
    places: dict[ArrayInfo, _StorageInfo] = {}
    results: list[WriteResult] = []
    entries: dict[str, Any] = {}
    with new_folder(output) as folder:
        for name, held in content.tensors.items():
            chunks = _chunks(held)
            entries[name] = _entry(held, chunks, dtype)
            for info, chunk in zip(_parts(held), chunks, strict=True):
                if info not in places:
                    file = f"__0_{len(places)}.distcp"
                    size = write_torch_file(
                        checkpoint,
                        folder / file,
                        Shaped(info, tuple(chunk.sizes)),
                        dtype=dtype,
                        durable=False,
                        progress=progress,
                    )
                    places[info] = _StorageInfo(file, 0, size)
                stored = places[info]
                index = MetadataIndex(name, chunk.offsets)
                results.append(WriteResult(index=index, size_in_bytes=stored.length, storage_data=stored))
        writer = FileSystemWriter(folder, sync_files=False)  # the folder is synced when it is whole
        writer.set_up_storage_writer(True)
        writer.finish(Metadata(entries), [results])
        write_torch_file(checkpoint, folder / "common.pt", dict(content.common), durable=False)
        (folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
        made = sorted(path.name for path in folder.iterdir())
    return [output / name for name in made]


# --- tensors ---------------------------------------------------------------------------------------------


def _parts(held: ArrayInfo | Stack) -> Stack:
    return (held,) if isinstance(held, ArrayInfo) else held


def _chunks(held: ArrayInfo | Stack) -> list[ChunkStorageMetadata]:
    """Return a tensor's chunks: one, or one for each layer."""
    if isinstance(held, ArrayInfo):
        return [ChunkStorageMetadata(torch.Size([0] * len(held.shape)), torch.Size(held.shape))]
    return [
        ChunkStorageMetadata(torch.Size([layer, *(0 for _ in info.shape)]), torch.Size([1, *info.shape]))
        for layer, info in enumerate(held)
    ]


def _entry(
    held: ArrayInfo | Stack, chunks: list[ChunkStorageMetadata], dtype: str | None
) -> TensorStorageMetadata:
    first = _parts(held)[0]
    kind = getattr(torch, ckpt.exported_type(first, dtype))
    shape = first.shape if isinstance(held, ArrayInfo) else (len(held), *first.shape)
    return TensorStorageMetadata(TensorProperties(dtype=kind), torch.Size(shape), chunks)


def _stacked(
    named: Mapping[str, ArrayInfo], states: Mapping[str, Mapping[str, ArrayInfo]]
) -> tuple[dict[str, ArrayInfo | Stack], bool]:
    """Return all tensors with alike layers stacked, and whether all layers are alike."""
    forms: dict[str, dict[int, dict[str, Any]]] = {}
    for name, info in named.items():
        if match := _LAYER.fullmatch(name):
            form = (info.dtype, info.shape, info.key.state, sorted(states.get(name, ())))
            forms.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = form
    alike = {
        prefix
        for prefix, layers in forms.items()
        if sorted(layers) == [*range(len(layers))] and all(form == layers[0] for form in layers.values())
    }
    found: dict[str, dict[int, ArrayInfo]] = {}
    for name, info in named.items():
        match = _LAYER.fullmatch(name)
        key, layer = name, _WHOLE
        if match and match[1] in alike:
            key, layer = f"{match[1]}.{match[3]}", int(match[2])
        arrays = {key: info, **{f"optimizer.state.{s}.{key}": x for s, x in states.get(name, {}).items()}}
        for new, array in arrays.items():
            parts = found.setdefault(new, {})
            if layer in parts or (parts and _WHOLE in (layer, *parts)):
                raise ValueError(
                    f"{name} would be exported as {new}, as another tensor is; change the name map"
                )
            parts[layer] = array
    tensors = {
        key: parts[_WHOLE] if _WHOLE in parts else tuple(parts[layer] for layer in range(len(parts)))
        for key, parts in found.items()
    }
    return tensors, len(alike) == len(forms)


# --- common.pt -------------------------------------------------------------------------------------------


def _counters(checkpoint: ckpt.Checkpoint) -> dict[str, Any]:
    """Return what isn't of the optimizer: the step, and the script's client state.

    Raises:
        ValueError: the client state has one of Megatron's keys.
    """
    manifest = RunManifest.of(checkpoint)
    found = {"checkpoint_version": 3.0, "iteration": manifest.step or 0}
    taken = {*found, "args", "model", "optimizer", "content_metadata", "rng_state"}
    if both := sorted(taken & manifest.client_state.keys()):
        raise ValueError(f"the client state has {', '.join(both)}, which Megatron has for itself; rename it")
    return found | manifest.client_state


def _optimizer(
    manifest: RunManifest,
    held: TorchOptimizer,
    names: Mapping[str, str],
    named: Mapping[str, ArrayInfo],
    step: float,
) -> dict[str, Any]:
    """Return the optimizer's part of the file, in the forms that Megatron's several optimizers read."""
    groups = [{**group, "step": int(step)} for group in _groups(held, names, named)]
    steps = {"common_step": torch.tensor(step)}
    found: dict[str, Any] = {
        "param_groups": groups,
        "state": steps,
        "optimizer": {"param_groups": groups, "state": steps},
        "param_state_sharding_type": "fully_reshardable",
    }
    if (scale := manifest.engine.loss_scale) is not None:
        found["grad_scaler"] = {
            "scale": torch.tensor([float(scale["scale"])]),
            # Megatron grows the scale when this equals its interval, which isn't known here.
            "growth_tracker": torch.tensor([0], dtype=torch.int),
            "hysteresis_tracker": torch.tensor([int(scale["hysteresis"])], dtype=torch.int),
        }
    return found


def _groups(
    held: TorchOptimizer, names: Mapping[str, str], named: Mapping[str, ArrayInfo]
) -> list[dict[str, Any]]:
    """Return Megatron's groups: its file doesn't say which parameters are in which.

    Megatron puts biases and one-dimensional parameters into a group without weight decay, and others into one
    with it.

    Raises:
        ValueError: the run's groups aren't such ones.
    """
    found: dict[bool, tuple[str, dict[str, Any]]] = {}
    for group in held.groups:
        own = {k: v for k, v in group.items() if k not in IMPLEMENTATION_KEYS}
        for name in (name for name in group["params"] if name in held.states and name in names):
            spared = len(named[names[name]].shape) == 1 or names[name].endswith(".bias")
            first, other = found.setdefault(spared, (name, own))
            if other != own:
                raise ValueError(_apart(first, other, name, own))
    if len(found) == 2 and found[False][1] != found[True][1]:
        (name, own), (spared_name, spared_own) = found[False], found[True]
        if spared_own != own | {"weight_decay": 0.0}:
            raise ValueError(_apart(name, own, spared_name, spared_own))
        return [own | _OWN_KEYS | {"wd_mult": 1.0}, spared_own | _OWN_KEYS | {"wd_mult": 0.0}]
    own = next(iter(found.values()))[1]
    decays = [1.0] if own["weight_decay"] else [0.0 if spared else 1.0 for spared in sorted(found)]
    return [own | _OWN_KEYS | {"wd_mult": decay} for decay in decays]


def _apart(name: str, own: Mapping[str, Any], other_name: str, other: Mapping[str, Any]) -> str:
    """Return the message for two parameters whose hyperparameters Megatron's groups can't hold."""
    keys = sorted(key for key in own.keys() | other.keys() if own.get(key) != other.get(key))
    differ = ", ".join(f"{key} ({own.get(key)} and {other.get(key)})" for key in keys)
    return (
        f"{name} and {other_name} differ in {differ}; --format megatron holds one set of hyperparameters, "
        "with or without weight decay for biases and one-dimensional parameters; export the weights alone"
    )
