"""Weights of a checkpoint, through DeepSpeed's functions. They run in one process, without a GPU.

Names, parameters and results are those of `deepspeed.utils.zero_to_fp32` and `deepspeed.checkpoint.utils`.
They work for every topology and ZeRO stage, and include frozen parameters, buffers and tied weights. Other
frameworks' checkpoints, DeepSpeed's own among them, are read in place.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

import ckpt
from ckpt.threads import cores, for_each
from uni3d import state, zero_to_fp32
from uni3d.checkpoint.extra_state import modules_with_extra
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.export_torch.torch_file import write_torch_file
from uni3d.importers import in_place


class PseudoTensor:
    """A tensor that is still in its checkpoint: `contiguous()` reads, verifies and returns it."""

    def __init__(self, weights: StoredWeights, name: str) -> None:
        self._weights, self._name = weights, name
        self.shape = weights.shape(name)
        dtype = weights.infos[weights.aliases.get(name, name)].dtype
        self.dtype: torch.dtype = getattr(torch, dtype)

    def contiguous(self) -> Tensor:
        return self._weights[self._name]

    def numel(self) -> int:
        return self.shape.numel()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r}, shape={list(self.shape)}, dtype={self.dtype})"


@overload
def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: Literal[False] = False,
) -> dict[str, Tensor]: ...


@overload
def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    *,
    lazy_mode: Literal[True],
) -> dict[str, PseudoTensor]: ...


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, Any]:
    """Return the unsplit model's `state_dict` on the CPU: parameters in fp32, buffers in their own types.

    `checkpoint_dir` is the folder or URL of a run or of a checkpoint; without `tag` the latest is read. A
    tied weight is one tensor under all its names. In lazy mode the values are `PseudoTensor`s, and nothing is
    read before `contiguous()` is called.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or it is damaged.
    """
    weights = StoredWeights(
        in_place.open(checkpoint_dir, tag, states=False), frozen=not exclude_frozen_parameters
    )
    tensors: dict[str, Any]
    if lazy_mode:
        tensors = {name: PseudoTensor(weights, name) for name in weights.infos}
    else:
        read = for_each(weights.__getitem__, weights.infos, cores())
        tensors = dict(zip(weights.infos, read, strict=True))
    return tensors | {alias: tensors[first] for alias, first in weights.aliases.items()}


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Move `model` to the CPU, fill it from a checkpoint and return it.

    Tensors are read one at a time, and converted to the model's types. An engine's module (without pipeline
    stages) stays on its device and as it is shown; each rank fills its own part, so all must call this.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or its names or shapes differ from the model's;
            the model's values haven't changed.
        ckpt.PartialLoadError: it is damaged; some of the model's values have changed.
    """
    weights = StoredWeights(in_place.open(checkpoint_dir, tag, states=False))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ckpt.CheckpointError(
            f"{type(model).__name__} is on the meta device; call model.to_empty(device='cpu') first"
        )
    with state.sharded_shown(model) as stays:
        if not stays:
            model.cpu()
        _fill(model, weights)
    return model


def _fill(model: nn.Module, weights: StoredWeights) -> None:
    """Copy the weights into a model that they must fit."""
    extra = modules_with_extra(model)
    targets = {
        k: v for k, v in model.state_dict(keep_vars=True).items() if k not in extra and isinstance(v, Tensor)
    }
    _check_same(type(model).__name__, targets, weights, extra)
    try:
        for name, target in targets.items():
            state.fill(target, weights[name])
        for name, module in extra.items():
            module.set_extra_state(weights.extra_state(name))
    except ckpt.CheckpointError as error:
        raise ckpt.PartialLoadError(str(error)) from error


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the weights to the folder `output_dir`, under the file names of Hugging Face's libraries.

    The file is `pytorch_model.bin` or, with `safe_serialization`, `model.safetensors`. Above
    `max_shard_size` ("5GB", "500MiB", bytes) there are several, with an index. A few MiB are in memory at a
    time. Files get their final names when all are complete. Every rank may call it at once: each writes files
    of its own, the same, of which one remains.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or it is damaged; nothing was written.
        FileExistsError: another file of one of these names exists; nothing was written.
        ValueError: `max_shard_size` isn't a size.
    """
    checkpoint = in_place.open(checkpoint_dir, tag, states=False)
    weights = StoredWeights(checkpoint, frozen=not exclude_frozen_parameters)

    def write(path: Path, names: list[str], aliases: dict[str, str]) -> None:
        if safe_serialization:
            ckpt.export_safetensors(checkpoint, path, names=names)
        else:
            tensors = {name: weights.infos[name] for name in names}
            tensors |= {alias: weights.infos[first] for alias, first in aliases.items()}
            write_torch_file(checkpoint, path, tensors)

    sizes = {name: info.nbytes for name, info in weights.infos.items()}
    zero_to_fp32.write_files(output_dir, sizes, weights.aliases, max_shard_size, safe_serialization, write)


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = torch.device("cpu")) -> Any:  # noqa: B008
    """Return `item` with each tensor copied to `device`, into memory of its own.

    `torch.save` writes the whole storage behind a view; for a copy it writes only the tensor. Tensors may be
    nested in lists, tuples (named ones too) and dicts, which are recreated in the same types. A tensor that
    occurs several times, as tied weights do, is copied once. Other values stay as they are.
    """
    copies: dict[Any, Tensor] = {}

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            which = _memory(value)
            if which not in copies:
                copies[which] = value.detach().clone().to(device)
            return copies[which]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(clone, value))
        if isinstance(value, list | tuple):
            return type(value)(map(clone, value))
        if isinstance(value, dict):
            made = copy.copy(value)
            made.update({key: clone(x) for key, x in value.items()})
            return made
        return value

    return clone(item)


def _memory(tensor: Tensor) -> Any:
    """Return what is equal for two tensors of the same elements in the same memory, and for them alone."""
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), lazy


def _check_same(
    model: str, targets: Mapping[str, Tensor], weights: StoredWeights, extra: Collection[str]
) -> None:
    """Raise CheckpointError if names or shapes in a model's `state_dict` and a checkpoint differ.

    `extra` are the names of the model's extra states.
    """
    problems = []
    mine, theirs = {*targets, *extra}, {*weights, *weights.extra_states}
    for what, names in ((f"{model} lacks", theirs - mine), ("the checkpoint lacks", mine - theirs)):
        if names:
            problems.append(f"{what} {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}")
    for name in [n for n in targets if n in weights and targets[n].shape != weights.shape(n)][:5]:
        there, here = list(weights.shape(name)), list(targets[name].shape)
        problems.append(f"{name} has shape {there} in the checkpoint and {here} in {model}")
    if problems:
        raise ckpt.CheckpointError("; ".join(problems))
