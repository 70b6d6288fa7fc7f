"""Export of the weights as one fp32 `state_dict` file in the safetensors format, streamed.

Arrays are copied a few bands at a time, in bounded memory whatever the model's size. Optimizer states are
not read. The format (https://github.com/huggingface/safetensors, "Format"): the header's length as 8 bytes, a
JSON header with each tensor's dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.bands import BandReader, bands
from ckpt.box import Box
from ckpt.errors import CheckpointError
from ckpt.format import itemsize, numpy_dtype
from ckpt.parts import ArrayInfo
from ckpt.read import WEIGHT_STATES, Checkpoint
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
    """Return the arrays of the model's `state_dict` by name: parameters in fp32, buffers as they are."""
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
    """Write the model's `state_dict` to the file `path`; return its size in bytes.

    Args:
        names: tensors to write (default: all), or a mapping, name in the file -> tensor of the checkpoint.
            Without a mapping, a tied weight is stored once, and the file's metadata lists its other names.
        dtype: "bfloat16" or "float16" to round parameters to; buffers stay as they are.
        durable: sync the file before it gets its name, which it does once it is whole, and then its folder.
        progress: gets the bytes written.

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
    todo = [(info, types[name], len(header) + places[name]) for name, info in arrays.items()]
    with ExitStack() as stack:
        try:
            fd = stack.enter_context(files.new_file(target, durable=durable))
        except OSError as error:
            raise CheckpointError(f"{target} can't be written: {error.strerror}") from None
        files.write_at(fd, memoryview(header), 0)
        copy_arrays(checkpoint, fd, todo, durable=durable, progress=progress)
        return os.fstat(fd).st_size


def copy_arrays(
    checkpoint: Checkpoint,
    fd: int,
    arrays: Iterable[tuple[ArrayInfo, str, int]],
    *,
    durable: bool = True,
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Copy arrays, each with its exported dtype and its place, into an open file, a few bands at a time.

    With `durable`, writing to the disk begins at once; the caller syncs. `progress` gets the bytes written.

    Raises:
        CheckpointError: a chunk is damaged, or a number is too large for the dtype.
    """
    copy = _Copier(checkpoint, fd, durable, progress).copy
    todo = [(info, box, dtype, place) for info, dtype, place in arrays for box in bands(info)]
    for_each(copy, todo, checkpoint.store.threads or cores())


def exported_type(info: ArrayInfo, dtype: str | None) -> str:
    """Return the dtype that an array is exported in; only parameters are rounded to `dtype`."""
    return info.dtype if dtype is None or info.key.state != WEIGHT_STATES[0] else dtype


def exported_bytes(info: ArrayInfo, dtype: str | None) -> int:
    """Return the size of an array in the exported file."""
    return Box.whole(info.shape).size * itemsize(exported_type(info, dtype))


def _header(
    tag: str, arrays: dict[str, ArrayInfo], types: dict[str, str], aliases: dict[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the file's head and the offset of each tensor after it."""
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
    """Copies bands of arrays to their places in the file."""

    def __init__(
        self, checkpoint: Checkpoint, fd: int, durable: bool, progress: Callable[[int], None]
    ) -> None:
        self._reader = BandReader(checkpoint)
        self._fd = fd
        self._durable = durable
        self._progress = progress

    def copy(self, band: tuple[ArrayInfo, Box, str, int]) -> None:
        """Copy one band: its array, the box, the exported dtype, and the array's offset in the file."""
        info, box, dtype, start = band
        if box.size == 0:
            return
        values = self._reader.read(info, box)
        data = (values if dtype == info.dtype else _rounded(values, dtype, info.key.atom)).reshape(-1)
        place = start + box.span(info.shape)[0] * itemsize(dtype)
        files.write_at(self._fd, data.view(np.uint8).data, place)
        if (
            self._durable
        ):  # the disk works while the next bands are read, and little is left to sync at the end
            files.begin_to_sync(self._fd, place, data.nbytes)
        self._progress(data.nbytes)


def _rounded(values: npt.NDArray[Any], dtype: str, name: str) -> npt.NDArray[Any]:
    """Round `values` to a smaller dtype, to nearest with ties to even.

    Raises:
        CheckpointError: a finite value would become infinite.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(numpy_dtype(dtype))
    lost = np.isinf(rounded) & np.isfinite(values)
    if lost.any():
        value = float(values[lost].flat[0])
        raise CheckpointError(f"{name} has {value:g}, which is too large for {dtype}; export it as fp32")
    return rounded
