"""Weights out: the atoms as one fp32 `state_dict` file in the safetensors format, streamed.

Copied band by band, a few at a time, so the memory taken is some bands', whatever the model's size.
Moments are not read. The format (https://github.com/huggingface/safetensors, "Format"): the header's length
as 8 bytes, a JSON header with each tensor's dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.bands import BandReader, bands
from ckpt.box import Box
from ckpt.errors import CheckpointError
from ckpt.format import itemsize, numpy_dtype
from ckpt.read import WEIGHT_STATES, ArrayInfo, Checkpoint
from ckpt.stores import files
from ckpt.threads import cores, for_each

_SAFETENSORS_DTYPES = {
    "bfloat16": "BF16",
    "bool": "BOOL",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    **{f"int{n}": f"I{n}" for n in (8, 16, 32, 64)},
    **{f"uint{n}": f"U{n}" for n in (8, 16, 32, 64)},
}


def weights(checkpoint: Checkpoint) -> dict[str, ArrayInfo]:
    """The arrays that make up the model's `state_dict`, by name: parameters in fp32, buffers as they are."""
    return {key.atom: info for key, info in checkpoint.arrays.items() if key.state in WEIGHT_STATES}


def export_safetensors(
    checkpoint: Checkpoint,
    path: str | Path,
    *,
    names: Collection[str] | Mapping[str, str] | None = None,
    dtype: str | None = None,
    durable: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Write the model's `state_dict`, or what it has under `names`, to the file `path`; returns its bytes.

    Parameters are rounded to `dtype` ("bfloat16" or "float16"), if one is given; buffers stay as they are. A
    tied weight is stored once, under its first name; the file's metadata lists the other names. A mapping as
    `names`, name in the file -> tensor of the checkpoint, says what there is by which names, whether tied or
    not. The file appears under its name when it is whole and, with `durable`, on the disk. `progress` is told
    the bytes written.

    Raises:
        CheckpointError: `path` exists, a chunk is damaged, or a number is too large for `dtype`.
    """
    target = Path(path)
    if target.exists():
        raise CheckpointError(f"{target} exists; delete it, or export to another name")
    infos = weights(checkpoint)
    if isinstance(names, Mapping):
        arrays, aliases = {name: infos[atom] for name, atom in names.items()}, {}
    else:
        arrays = {n: info for n, info in infos.items() if names is None or n in names}
        aliases = {k: v for k, v in checkpoint.manifest.get("aliases", {}).items() if v in arrays}
    types = {name: exported_type(info, dtype) for name, info in arrays.items()}
    header, places = _header(checkpoint.tag, arrays, types, aliases)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise CheckpointError(f"{target} can't be written: {error.strerror}") from None
    try:
        try:
            files.write_at(fd, memoryview(header), 0)
            copier = _Copier(checkpoint, fd, progress)
            todo = [
                (info, box, types[name], len(header) + places[name])
                for name, info in arrays.items()
                for box in bands(info)
            ]
            for_each(copier.copy, todo, checkpoint.store.threads or cores())
            size = os.fstat(fd).st_size
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        files.sync_folder(target.parent)
    return size


def exported_type(info: ArrayInfo, dtype: str | None) -> str:
    """The type that an array is exported in: only parameters are rounded to `dtype`."""
    return info.dtype if dtype is None or info.key.state != WEIGHT_STATES[0] else dtype


def exported_bytes(info: ArrayInfo, dtype: str | None) -> int:
    return Box.whole(info.shape).size * itemsize(exported_type(info, dtype))


def _header(
    tag: str, arrays: dict[str, ArrayInfo], types: dict[str, str], aliases: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The file's head, and where each tensor begins behind it."""
    places: dict[str, int] = {}
    metadata = {"format": "pt", "tag": tag}
    if aliases:
        metadata["aliases"] = json.dumps(aliases)
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # Wide types first, as safetensors writes them: each tensor is then aligned to its type.
    for name, info in sorted(arrays.items(), key=lambda item: -itemsize(types[item[0]])):
        places[name], end = end, end + exported_bytes(info, types[name])
        content[name] = {
            "dtype": _SAFETENSORS_DTYPES[types[name]],
            "shape": list(info.shape),
            "data_offsets": [places[name], end],
        }
    data = json.dumps(content, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # tensors begin at a multiple of 8 bytes
    return len(data).to_bytes(8, "little") + data, places


class _Copier:
    """Copies bands of arrays to where they lie in the file."""

    def __init__(self, checkpoint: Checkpoint, fd: int, progress: Callable[[int], None]) -> None:
        self._reader = BandReader(checkpoint)
        self._fd = fd
        self._progress = progress

    def copy(self, band: tuple[ArrayInfo, Box, str, int]) -> None:
        """Copy one band of an array, as the type that it gets, to the file's part that begins at a place."""
        info, box, dtype, start = band
        if box.size == 0:
            return
        values = self._reader.read(info, box)
        data = (values if dtype == info.dtype else _rounded(values, dtype, info.key.atom)).reshape(-1)
        files.write_at(self._fd, data.view(np.uint8).data, start + box.span(info.shape)[0] * itemsize(dtype))
        self._progress(data.nbytes)


def _rounded(values: npt.NDArray[Any], dtype: str, name: str) -> npt.NDArray[Any]:
    """`values` in a smaller type, to the nearest, ties to even.

    Raises:
        CheckpointError: one would become infinite.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(numpy_dtype(dtype))
    lost = np.isinf(rounded) & np.isfinite(values)
    if lost.any():
        value = float(values[lost].flat[0])
        raise CheckpointError(f"{name} has {value:g}, which is too large for {dtype}; export it as fp32")
    return rounded
