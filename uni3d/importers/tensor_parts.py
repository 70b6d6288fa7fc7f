"""Parts of the tensors in safetensors files, read without the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.source import Array

Slices = tuple[slice, ...]


def read_parts(file: Path, parts: Iterable[tuple[str, Slices]]) -> Iterator[Array]:
    """Yield parts of a file's tensors, given by name and by one slice for each dim. The file is mapped.

    Raises:
        CheckpointError: the file or a tensor can't be read.
    """
    from safetensors import SafetensorError, safe_open

    numpy_dtype("bfloat16")  # numpy knows the name from then on
    try:
        with safe_open(file, framework="numpy") as opened:
            for name, part in parts:
                yield opened.get_slice(name)[part] if part else opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} can't be read: {error}") from None


def read_part(file: Path, name: str, part: Slices) -> Array:
    """Return a part of one tensor; see `read_parts`."""
    return next(read_parts(file, [(name, part)]))
