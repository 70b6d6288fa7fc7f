"""Weights out: the atoms as one fp32 `state_dict` file in the safetensors format, streamed.

Written chunk by chunk, so the memory taken is a chunk's, whatever the model's size. Moments are not read.
The format (https://github.com/huggingface/safetensors, "Format"): the header's length as 8 bytes, a JSON
header with each tensor's dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ckpt import files
from ckpt.box import Box, Shape, grid
from ckpt.errors import CheckpointError
from ckpt.read import WEIGHT_STATES, Array, ArrayInfo, Checkpoint

_SAFETENSORS_DTYPES = {
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
    checkpoint: Checkpoint, path: str | Path, *, progress: Callable[[int], None] = lambda n: None
) -> int:
    """Write the model's `state_dict` to the file `path`; returns its size in bytes.

    A tied weight is stored once, under its first name; the file's metadata lists the other names. The
    file appears under its name when it is whole and on the disk. `progress` is told the bytes written.

    Raises:
        CheckpointError: `path` exists, or a chunk is damaged.
    """
    target = Path(path)
    if target.exists():
        raise CheckpointError(f"{target} exists; delete it, or export to another name")
    arrays = weights(checkpoint)
    header, places = _header(checkpoint, arrays)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    except OSError as error:
        raise CheckpointError(f"{target} can't be written: {error.strerror}") from None
    try:
        try:
            files.write_at(fd, memoryview(header), 0)
            for name, info in arrays.items():
                _copy_array(checkpoint, info, fd, len(header) + places[name], progress)
            size = os.fstat(fd).st_size
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    files.sync_folder(target.parent)
    return size


def _header(checkpoint: Checkpoint, arrays: dict[str, ArrayInfo]) -> tuple[bytes, dict[str, int]]:
    """The file's head, and where each tensor begins behind it."""
    places: dict[str, int] = {}
    metadata = {"format": "pt", "tag": checkpoint.tag}
    if checkpoint.manifest.get("aliases"):
        metadata["aliases"] = json.dumps(checkpoint.manifest["aliases"])
    content: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    # Wide types first, as safetensors writes them: each tensor is then aligned to its type.
    for name, info in sorted(arrays.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize):
        places[name], end = end, end + info.nbytes
        content[name] = {
            "dtype": _SAFETENSORS_DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [places[name], end],
        }
    data = json.dumps(content, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # tensors begin at a multiple of 8 bytes
    return len(data).to_bytes(8, "little") + data, places


def _copy_array(
    checkpoint: Checkpoint, info: ArrayInfo, fd: int, start: int, progress: Callable[[int], None]
) -> None:
    """Read each chunk, verified, and write its stretches to where they lie in the whole array."""
    itemsize = np.dtype(info.dtype).itemsize
    for _, box in grid(info.shape, info.chunk_shape):
        part = checkpoint.read(info.key.atom, info.key.state, box)
        for first, stretch in _stretches(part, box, info.shape):
            files.write_at(fd, stretch.reshape(-1).view(np.uint8).data, start + first * itemsize)
        progress(part.nbytes)


def _stretches(part: Array, box: Box, shape: Shape) -> Iterator[tuple[int, Array]]:
    """The parts of `box` that lie in one piece in an array of `shape`: `(first element, data)`."""
    cut = max((d for d in range(len(shape)) if box.shape[d] != shape[d]), default=0)
    for index in np.ndindex(*box.shape[:cut]):
        corner = Box((*index, *[0] * (len(shape) - cut)), (1,) * len(shape))
        place = Box(tuple(a + b for a, b in zip(box.offset, corner.offset, strict=True)), corner.shape)
        yield place.span(shape)[0], part[index]
