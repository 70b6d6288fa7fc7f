"""Weights out of a checkpoint, by DeepSpeed's names for it. Needs no ranks: one process, and no GPU.

Names, parameters and results are those of `deepspeed.utils.zero_to_fp32` and `deepspeed.checkpoint.utils`,
here for every topology and ZeRO stage, and with frozen parameters, buffers and tied weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

import ckpt
from ckpt.threads import cores, for_each
from uni3d import state, zero_to_fp32
from uni3d.checkpoint import live_weights
from uni3d.checkpoint.stored_weights import StoredWeights


class PseudoTensor:
    """A tensor that has been left in its checkpoint: `contiguous()` reads, verifies and returns it."""

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
    """The whole model's `state_dict`: parameters in fp32, buffers in their own types, in the host's memory.

    `checkpoint_dir` is a run's folder or URL, or a checkpoint's own; `tag` None is what `latest` names. A
    tied weight is one tensor under all its names. In lazy mode the values are pseudo tensors, with `shape`,
    `dtype` and `contiguous()`, and nothing is read before that is called.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or it is damaged.
    """
    weights = StoredWeights(ckpt.open_checkpoint(checkpoint_dir, tag), frozen=not exclude_frozen_parameters)
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
    """Put `model` on the CPU and fill it from a checkpoint; returns it.

    One tensor at a time is read beside the model; a model in another type gets the values in that type.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or the names or shapes in the model's `state_dict`
            aren't its own; the model has the values that it had.
        ckpt.PartialLoadError: it is damaged; some of the model's values are the checkpoint's.
    """
    weights = StoredWeights(ckpt.open_checkpoint(checkpoint_dir, tag))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ckpt.CheckpointError(
            f"{type(model).__name__} is on the meta device; call model.to_empty(device='cpu') first"
        )
    targets = {k: v for k, v in model.cpu().state_dict().items() if isinstance(v, Tensor)}
    _check_same(type(model).__name__, targets, weights)
    try:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(weights[name])
    except ckpt.CheckpointError as error:
        raise ckpt.PartialLoadError(str(error)) from error
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the weights into the folder `output_dir`, under the names that Hugging Face's libraries look for.

    `pytorch_model.bin` or, with `safe_serialization`, `model.safetensors`; if that is more than
    `max_shard_size` ("5GB", "500MiB", bytes), several files and their index. Of safetensors files some
    MiB are in memory at a time, of the others one file. The files get their names when all are whole.

    Raises:
        ckpt.CheckpointError: there is no such checkpoint, or it is damaged; nothing was written.
        FileExistsError: a file of one of these names is there; nothing was written.
        ValueError: `max_shard_size` is no size.
    """
    checkpoint = ckpt.open_checkpoint(checkpoint_dir, tag)
    weights = StoredWeights(checkpoint, frozen=not exclude_frozen_parameters)

    def write(path: Path, names: list[str], aliases: dict[str, str]) -> None:
        if safe_serialization:
            ckpt.export_safetensors(checkpoint, path, names=names)
        else:
            write_torch_file(weights, path, names, aliases)

    sizes = {name: info.nbytes for name, info in weights.infos.items()}
    zero_to_fp32.write_files(output_dir, sizes, weights.aliases, max_shard_size, safe_serialization, write)


def write_torch_file(
    weights: StoredWeights,
    path: Path,
    names: list[str],
    aliases: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Write tensors by `torch.save`, which takes the memory of all of them; `aliases` name some once more.

    Parameters are rounded to `dtype`, if one is given. `progress` is told the bytes that are ready to be
    written.

    Raises:
        ckpt.CheckpointError: one is damaged, or has a number that is too large for `dtype`.
    """

    def read(name: str) -> Tensor:
        tensor = weights[name]
        if dtype is None or weights.infos[name].key.state != state.PARAMETER:
            progress(tensor.nbytes)
            return tensor
        rounded = tensor.to(dtype)
        progress(rounded.nbytes)
        if (rounded.isinf() & tensor.isfinite()).any():
            raise ckpt.CheckpointError(
                f"{name} has numbers that are too large for {dtype}; export it as fp32"
            )
        return rounded

    tensors = dict(zip(names, for_each(read, names, cores()), strict=True))
    live_weights.write(path, tensors | {alias: tensors[first] for alias, first in aliases.items()})


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = torch.device("cpu")) -> Any:  # noqa: B008
    """`item` with each tensor in it copied to `device`, into memory of its own.

    `torch.save` writes all of the memory that a tensor is a view of, be it a hundred times as much; of a copy
    it writes what the tensor has. Tensors may be nested in lists, tuples (named ones too) and dicts, which
    are made anew, of the same types; one that is there several times stays one. The rest stays as it is.
    """
    copies: dict[int, Tensor] = {}

    def clone(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone().to(device)
            return copies[id(value)]
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


def _check_same(model: str, targets: Mapping[str, Tensor], weights: StoredWeights) -> None:
    """Raises what differs between a model's `state_dict` and a checkpoint's."""
    problems = []
    for what, names in (
        (f"{model} hasn't", weights.keys() - targets.keys()),
        ("the checkpoint hasn't", targets.keys() - weights.keys()),
    ):
        if names:
            problems.append(f"{what} {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}")
    for name in [n for n in targets if n in weights and targets[n].shape != weights.shape(n)][:5]:
        there, here = list(weights.shape(name)), list(targets[name].shape)
        problems.append(f"{name} is {there} in the checkpoint and {here} in {model}")
    if problems:
        raise ckpt.CheckpointError("; ".join(problems))
