"""Readers of files that hold weights alone: safetensors, and state_dicts saved by `torch.save`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from ckpt import DTYPES, CheckpointError, numpy_dtype
from uni3d.importers.source import BUFFER, FLOATS, PARAMETER, Array, ForeignArray, Options, Read, Source
from uni3d.importers.torch_files import load
from uni3d.importers.torch_tensors import StoredTensor

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

_PART = re.compile(r"-\d+-of-(\d+)\.")
INDEX = ".index.json"


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
    return _source("safetensors", path, ".safetensors", options, _in_safetensors)


def read_torch(path: Path, options: Options) -> Source:
    """Read the state_dict in a file of `torch.save`, or in a folder of them."""
    return _source("torch", path, ".bin", options, lambda file: _state_dict(file, load(file, options)))


def _source(kind: str, path: Path, suffix: str, options: Options, read: Callable[[Path], _Content]) -> Source:
    held: dict[Path, _Tensors] = {}
    aliases: dict[str, str] = {}
    left_out: list[str] = []
    files, placed = _files(path, suffix)
    for file in files:
        held[file], other_names, others = read(file)
        aliases |= other_names
        left_out += others
    _check_index(placed, held)
    arrays: dict[Any, ForeignArray] = {}
    for file, tensors in held.items():
        for name, tensor in tensors.items():
            array = array_of(name, tensor.dtype, tensor.shape, tensor.read, options, f"{file.name}: {name}")
            tied = tensor.identity is not None and array.state == PARAMETER and not options.untie
            first = arrays.setdefault(tensor.identity if tied else name, array)
            if first is not array:
                aliases[name] = first.name
    return Source(kind=kind, where=str(path), arrays=[*arrays.values()], aliases=aliases, left_out=left_out)


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
    )


def is_buffer(name: str, dtype: str, options: Options) -> bool:
    """Return whether a tensor is a buffer, by `--buffers`, its type, or torch's names of statistics."""
    return (
        any(fnmatchcase(name, pattern) for pattern in options.buffers)
        or dtype not in FLOATS
        or name.rpartition(".")[2] in _STATISTICS
    )


def _files(path: Path, suffix: str) -> tuple[list[Path], dict[Path, set[str]]]:
    """Return the file itself, or a folder's files: those in its index, or its only one.

    The second value has the index's tensor names by file; it is empty without an index.
    """
    if path.is_file():
        return [_not_a_part(path)], {}
    indices = sorted(path.glob(f"*{suffix}{INDEX}"))
    files = sorted(path.glob(f"*{suffix}"))
    if len(indices) == 1:
        placed = _indexed(indices[0], suffix)
        return list(placed), placed
    if len(files) == 1 and not indices:
        return [_not_a_part(files[0])], {}
    found = ", ".join(each.name for each in indices or files) or "none"
    raise CheckpointError(
        f"{path} has {len(indices)} files *{suffix}{INDEX} and {len(files)} files *{suffix} ({found}); "
        "give one file, or a folder with one index"
    )


def _not_a_part(path: Path) -> Path:
    """Return `path`; refuse one of several files of the same state_dict, judging by its name."""
    found = _PART.search(path.name)
    if found and int(found[1]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(found[1])} files; give the folder, which must have their index"
        )
    return path


def _indexed(index: Path, suffix: str) -> dict[Path, set[str]]:
    """Return the index's tensor names by file, after checking that each file exists."""
    placed: dict[Path, set[str]] = {}
    try:
        for name, file in sorted(json.loads(index.read_text())["weight_map"].items(), key=lambda x: x[1]):
            placed.setdefault(index.parent / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} isn't an index of weights: {type(error).__name__}: {error}") from None
    for file in placed:
        if file.parent != index.parent or file.suffix != suffix:
            raise CheckpointError(f"{index} names {file}, which isn't a {suffix} file in its folder")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {index.name} refers to it")
    return placed


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
    nested = [key for key in _NESTED if isinstance(content.get(key), Mapping)]
    if any(isinstance(value, StoredTensor) for value in content.values()):
        chosen, where, outside = content, "", []
        if nested:
            raise CheckpointError(
                f"{file} has tensors and also a state_dict under {', '.join(nested)}; save only one"
            )
    else:
        if len(nested) != 1:
            keys = ", ".join(str(key) for key in list(content)[:12]) or "none"
            raise CheckpointError(
                f"{file} has no state_dict (also not under {', '.join(_NESTED)}); its keys are {keys}"
            )
        chosen, where = content[nested[0]], f"{nested[0]}."
        outside = [f"{key}: not part of the state_dict" for key in content if key != nested[0]]
    tensors = {str(k): v for k, v in chosen.items() if isinstance(v, StoredTensor)}
    others = [f"{where}{k}: not a tensor" for k, v in chosen.items() if not isinstance(v, StoredTensor)]
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return tensors, {}, [*outside, *others]
