"""Streaming over arrays in bands, in bounded memory whatever the size of the arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.box import Box
from ckpt.format import itemsize, numpy_dtype
from ckpt.parts import ArrayInfo
from ckpt.read import Checkpoint, pieces
from ckpt.threads import Scratch

BAND_BYTES = 4 << 20
"""Approximate number of bytes that each thread reads at a time: few enough to stay in the processor's cache
until they are used."""


def bands(info: ArrayInfo) -> Iterator[Box]:
    """Cut an array into boxes of about `BAND_BYTES`, each contiguous in C order."""
    shape, size = info.shape, itemsize(info.dtype)
    dim = next((d for d in range(len(shape)) if math.prod(shape[d + 1 :]) * size <= BAND_BYTES), len(shape))
    if dim == len(shape):
        yield Box.whole(shape)  # a scalar
        return
    rest, chunk = shape[dim + 1 :], info.grid.chunk_shape[dim]
    step = BAND_BYTES // max(1, math.prod(rest) * size)
    step = max(step // chunk, 1) * chunk  # whole chunks, so that none is read twice
    for index in np.ndindex(*shape[:dim]):
        for start in range(0, shape[dim], step):
            length = min(step, shape[dim] - start)
            yield Box((*index, start, *(0,) * len(rest)), (*(1,) * dim, length, *rest))


class BandReader:
    """Reads verified boxes of a checkpoint's arrays into buffers that are reused, one per thread."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._scratch = Scratch()

    def read(self, info: ArrayInfo, box: Box) -> npt.NDArray[Any]:
        """Return the content of `box`, valid until this thread's next read."""
        memory = self._scratch.take(box.size * itemsize(info.dtype))
        out = memory.view(numpy_dtype(info.dtype)).reshape(box.shape)
        for piece in pieces(info, box):
            self._checkpoint.read_piece(piece, out)
        return out
