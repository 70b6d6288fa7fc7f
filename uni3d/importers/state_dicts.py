"""Readers of files that hold weights alone: safetensors, and state_dicts saved by `torch.save`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from ckpt import DTYPES, CheckpointError, numpy_dtype
from uni3d.importers.source import (
    BUFFER,
    FLOATS,
    PARAMETER,
    Array,
    FilePlace,
    ForeignArray,
    Options,
    Read,
    Source,
)
from uni3d.importers.tensor_parts import read_part
from uni3d.importers.torch_files import load
from uni3d.importers.torch_tensors import StoredTensor
from uni3d.importers.weight_files import adapter, files_of, is_adapter

_SAFETENSORS = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}
_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts commonly keep the model's state_dict."""
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Names of the buffers in torch's normalization layers."""


@dataclass(frozen=True, kw_only=True)
class _SafeTensor:
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    read: Read
    identity: None = None
    """Such files don't record which tensors share memory."""


_Tensors = Mapping[str, StoredTensor | _SafeTensor]
_Content = tuple[_Tensors, dict[str, str], list[str]]
"""A file's tensors, the aliases of tied ones, and a line for everything else."""


def read_safetensors(path: Path, options: Options) -> Source:
    """Read a safetensors file, or a folder of them."""
    return _source("safetensors", path, options, _in_safetensors)


def read_torch(path: Path, options: Options) -> Source:
    """Read the state_dict in a file of `torch.save`, or in a folder of them."""
    return _source("torch", path, options, lambda file: _state_dict(file, load(file, options)))


def _source(kind: str, path: Path, options: Options, read: Callable[[Path], _Content]) -> Source:
    held: dict[Path, _Tensors] = {}
    aliases: dict[str, str] = {}
    left_out: list[str] = []
    chosen = files_of(path, kind)
    for file in chosen.files:
        held[file], other_names, others = read(file)
        aliases |= other_names
        left_out += others
    _check_index(chosen.placed, held)
    arrays: dict[Any, ForeignArray] = {}
    for file, tensors in held.items():
        for name, tensor in tensors.items():
            array = array_of(name, tensor.dtype, tensor.shape, tensor.read, options, f"{file.name}: {name}")
            if isinstance(tensor, _SafeTensor):
                array = replace(array, place=FilePlace(file, name), read_part=partial(read_part, file, name))
            else:
                array = replace(array, read_part=tensor.read_part)
            tied = tensor.identity is not None and array.state == PARAMETER and not options.untie
            first = arrays.setdefault(tensor.identity if tied else name, array)
            if first is not array:
                aliases[name] = first.name
    if not arrays:
        raise CheckpointError(f"{path} has no tensors")
    if is_adapter([array.name for array in arrays.values() if array.state == PARAMETER]):
        raise CheckpointError(adapter(path))
    return Source(
        kind=kind,
        where=str(path),
        arrays=[*arrays.values()],
        aliases=aliases,
        left_out=left_out,
        files=frozenset({chosen.named, *chosen.files}),
    )


def array_of(
    name: str, dtype: str, shape: tuple[int, ...], read: Read, options: Options, origin: str
) -> ForeignArray:
    """Return a parameter or a buffer, told apart by name and type alone.

    Raises:
        CheckpointError: its type can't be stored.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"{origin} has the type {dtype}, which can't be stored")
    buffer = is_buffer(name, dtype, options)
    return ForeignArray(
        name=name,
        state=BUFFER if buffer else PARAMETER,
        dtype=dtype if buffer else "float32",
        shape=shape,
        read=read,
        origin=origin,
        own_dtype=dtype,
    )


def is_buffer(name: str, dtype: str, options: Options) -> bool:
    """Return whether a tensor is a buffer, by `--buffers`, its type, or torch's names of statistics."""
    return (
        any(fnmatchcase(name, pattern) for pattern in options.buffers)
        or dtype not in FLOATS
        or name.rpartition(".")[2] in _STATISTICS
    )


def _check_index(placed: Mapping[Path, set[str]], held: Mapping[Path, _Tensors]) -> None:
    """Check that each file has the tensors of its index entry and no others, so that none is in two files."""
    for file, wanted in placed.items():
        if missing := sorted(wanted - held[file].keys()):
            raise CheckpointError(f"{file} lacks {', '.join(missing[:4])}, expected from the index")
        if more := sorted(held[file].keys() - wanted):
            raise CheckpointError(f"{file} has {', '.join(more[:4])}, which the index doesn't list")


def _in_safetensors(file: Path) -> _Content:
    from safetensors import SafetensorError, safe_open

    numpy_dtype("bfloat16")  # numpy knows the name from then on
    tensors: dict[str, _SafeTensor] = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118  it isn't a dict
                part = opened.get_slice(name)
                dtype = _SAFETENSORS.get(part.get_dtype(), part.get_dtype())
                read = partial(_read, file, name)
                tensors[name] = _SafeTensor(dtype=dtype, shape=tuple(part.get_shape()), read=read)
        aliases = json.loads(metadata.pop("aliases", "{}"))  # as `uni3d export` writes them
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} isn't a complete safetensors file: {error}") from None
    aliases = metadata | aliases  # safetensors' own `save_model` names one weight by another
    return tensors, {str(k): str(v) for k, v in aliases.items() if v in tensors and k not in tensors}, []


def _read(file: Path, name: str) -> Array:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            values: Array = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {name} can't be read: {error}") from None
    return values


def _state_dict(file: Path, content: Any) -> _Content:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state_dict")
    nested = [key for key in _with_tensors(content) if key in _NESTED]
    if len(nested) > 1:
        raise CheckpointError(f"{file} has a state_dict under {' and '.join(nested)}; save only one")
    chosen: Mapping[Any, Any] = content[nested[0]] if nested else content
    tensors = {str(k): v for k, v in chosen.items() if isinstance(v, StoredTensor)}
    if not tensors:
        keys = ", ".join(str(key) for key in list(content)[:12]) or "none"
        raise CheckpointError(
            f"{file} has no state_dict (also not under {', '.join(_NESTED)}); its keys are {keys}"
        )
    where = f"{nested[0]}." if nested else ""
    if inner := [f"{where}{key}" for key in _with_tensors(chosen) if not str(key).endswith("_extra_state")]:
        raise CheckpointError(
            f"{file} has tensors like {where}{next(iter(tensors))} and further dicts of tensors "
            f"({', '.join(inner[:4])}), so it's unclear which is the state_dict; save the state_dict alone"
        )
    beside = {key: value for key, value in content.items() if nested and key != nested[0]}
    return (
        tensors,
        {},
        [
            *(f"{key}: not part of the state_dict{_extra(value)}" for key, value in beside.items()),
            *(f"{where}{key}: not a tensor" for key in chosen if str(key) not in tensors),
        ],
    )


def _with_tensors(content: Mapping[Any, Any]) -> list[Any]:
    """Return the keys of the dicts that hold tensors."""
    return [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(each, StoredTensor) for each in value.values())
    ]


def _extra(value: Any) -> str:
    return f", but a tensor of shape {list(value.shape)} beside it" if isinstance(value, StoredTensor) else ""
