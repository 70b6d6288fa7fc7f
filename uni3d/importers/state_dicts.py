"""Weights alone: a `torch.save` state_dict, Hugging Face's safetensors and `.bin` files with their index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ckpt import DTYPES, CheckpointError, numpy_dtype
from uni3d.importers.source import BUFFER, PARAMETER, ForeignArray, Options, Source
from uni3d.importers.torch_files import TorchFile
from uni3d.importers.torch_tensors import StoredTensor

_SAFETENSORS = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    **{f"F{n}": f"float{n}" for n in (16, 32, 64)},
    **{f"I{n}": f"int{n}" for n in (8, 16, 32, 64)},
    **{f"U{n}": f"uint{n}" for n in (8, 16, 32, 64)},
}
_NESTED = ("state_dict", "model_state_dict", "model", "module")
"""Under which training scripts keep a state_dict beside other things."""
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""The buffers of torch's normalisation layers."""

_PART = re.compile(r"-\d+-of-(\d+)\.")
INDEX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A tensor in some file."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], npt.NDArray[Any]]
    file: Path
    identity: Any = None
    """The same for tensors that share their memory; None where that isn't known."""


def read_safetensors(path: Path, options: Options) -> Source:
    """The weights in a file, or in a folder's files.

    Raises:
        CheckpointError: a file is damaged or missing.
    """
    tensors: dict[str, _Tensor] = {}
    aliases: dict[str, str] = {}
    files, placed = _files(path, ".safetensors")
    for file in files:
        found, other_names = _in_safetensors(file)
        _add(tensors, found)
        aliases |= other_names
    _check_index(placed, tensors)
    return _source("safetensors", path, tensors, aliases, options)


def read_torch(path: Path, options: Options) -> Source:
    """The state_dict in a file of `torch.save`, or those in a folder's files.

    Raises:
        CheckpointError: a file is damaged or missing, or has something in it that isn't read.
    """
    tensors: dict[str, _Tensor] = {}
    left_out: list[str] = []
    files, placed = _files(path, ".bin")
    for file in files:
        content = TorchFile(file, verify=options.verify, stand_ins=options.stand_ins).load()
        found, others = _state_dict(file, content)
        left_out += others
        _add(
            tensors,
            {
                name: _Tensor(dtype=t.dtype, shape=t.shape, read=t.read, file=file, identity=t.identity)
                for name, t in found.items()
            },
        )
    _check_index(placed, tensors)
    return _source("torch", path, tensors, {}, options, left_out)


def _source(
    kind: str,
    path: Path,
    tensors: Mapping[str, _Tensor],
    aliases: dict[str, str],
    options: Options,
    left_out: list[str] | None = None,
) -> Source:
    arrays: dict[Any, ForeignArray] = {}
    aliases = dict(aliases)
    for name, tensor in tensors.items():
        array = array_of(
            name, tensor.dtype, tensor.shape, tensor.read, options, f"{tensor.file.name}: {name}"
        )
        tied = tensor.identity is not None and array.state == PARAMETER and not options.untie
        first = arrays.get(tensor.identity) if tied else None
        if first is not None:
            aliases[name] = first.name
        else:
            arrays[tensor.identity if tied else name] = array
    return Source(
        kind=kind,
        where=str(path),
        arrays=list(arrays.values()),
        aliases=aliases,
        left_out=left_out or [],
    )


def array_of(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    read: Callable[[], npt.NDArray[Any]],
    options: Options,
    origin: str,
) -> ForeignArray:
    """A parameter or a buffer, where only its name and type tell which.

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
    """Whether it is one by `--buffers`, its type, or as torch's normalisation layers name theirs."""
    return (
        any(fnmatchcase(name, pattern) for pattern in options.buffers)
        or dtype not in ("float16", "bfloat16", "float32", "float64")
        or name.rpartition(".")[2] in _STATISTICS
    )


def _files(path: Path, suffix: str) -> tuple[list[Path], dict[Path, set[str]]]:
    """The file itself, or those of a folder: what its index names, or the only one that there is.

    With what the index says is in each of them.
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
    """The file; refused if its name says that it is one of several."""
    found = _PART.search(path.name)
    if found and int(found[1]) > 1:
        raise CheckpointError(f"{path} is one of {int(found[1])} files; give the folder, with their index")
    return path


def _indexed(index: Path, suffix: str) -> dict[Path, set[str]]:
    """The files that an index names, each of which is there, with the tensors that it says are in them."""
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
            raise CheckpointError(f"{file} is missing, which {index.name} names")
    return placed


def _check_index(placed: Mapping[Path, set[str]], tensors: Mapping[str, _Tensor]) -> None:
    """Check that each file has what the index says, and nothing else."""
    for file, wanted in placed.items():
        found = {name for name, tensor in tensors.items() if tensor.file == file}
        if missing := sorted(wanted - found):
            raise CheckpointError(f"{file} lacks {', '.join(missing[:4])}, which the index says are in it")
        if more := sorted(found - wanted):
            raise CheckpointError(f"{file} has {', '.join(more[:4])}, of which the index knows nothing")


def _in_safetensors(file: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    numpy_dtype("bfloat16")  # numpy knows the name from then on
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            for name in opened.keys():  # noqa: SIM118  it isn't a dict
                part = opened.get_slice(name)
                dtype = _SAFETENSORS.get(part.get_dtype(), part.get_dtype())
                tensors[name] = _Tensor(
                    dtype=dtype, shape=tuple(part.get_shape()), read=_reader(file, name), file=file
                )
        aliases = json.loads(metadata.pop("aliases", "{}"))  # as our own export has them
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} isn't a whole safetensors file: {error}") from None
    aliases = metadata | aliases  # safetensors' own `save_model` names one weight by another
    return tensors, {str(k): str(v) for k, v in aliases.items() if v in tensors and k not in tensors}


def _reader(file: Path, name: str) -> Callable[[], npt.NDArray[Any]]:
    def read() -> npt.NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="numpy") as opened:
                values: npt.NDArray[Any] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {name} can't be read: {error}") from None
        return values

    return read


def _state_dict(file: Path, content: Any) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors by name, and what else there was."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a state_dict")
    nested = [key for key in _NESTED if isinstance(content.get(key), Mapping)]
    if any(isinstance(value, StoredTensor) for value in content.values()):
        chosen, where, outside = content, "", []
        if nested:
            raise CheckpointError(
                f"{file} holds tensors beside a state_dict under {', '.join(nested)}; save one of them alone"
            )
    else:
        if len(nested) != 1:
            keys = ", ".join(str(key) for key in list(content)[:12]) or "none"
            raise CheckpointError(
                f"{file} holds no state_dict, nor one under {', '.join(_NESTED)}; its keys are {keys}"
            )
        chosen, where = content[nested[0]], f"{nested[0]}."
        outside = [f"{key}: beside the state_dict" for key in content if key != nested[0]]
    tensors = {str(k): v for k, v in chosen.items() if isinstance(v, StoredTensor)}
    others = [f"{where}{k}: not a tensor" for k, v in chosen.items() if not isinstance(v, StoredTensor)]
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return tensors, [*outside, *others]


def _add(tensors: dict[str, _Tensor], more: Mapping[str, _Tensor]) -> None:
    for name, tensor in more.items():
        if name in tensors:
            raise CheckpointError(f"{tensor.file} has {name}, which is in {tensors[name].file} too")
        tensors[name] = tensor
