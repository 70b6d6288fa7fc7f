"""Initial weights drawn tile by tile: a rank draws what it keeps, and the rest of the tiles at its edges.

A parameter is cut by a grid that depends on its shape alone. Each tile has a generator of its own, which
depends on the run's seed, the parameter's name and the tile's number. So the bits are the same whoever draws
them, for whatever part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch

from parallel.dtensor_layout import LocalPart, Place
from parallel.recorded_init import Operation

INITIAL_WEIGHTS = 1
"""Version of the grid and of the tiles' generators; whoever changes a bit of them raises it. While it stands,
a seed gives the same weights, as far as torch's own draws stay the same. No checkpoint has it: a resume draws
nothing."""

TILE = 1 << 14
"""Most elements of a tile: few enough that a rank's part wastes little at its edges, and enough that the cost
of a tile is that of its numbers."""
WIDTH = 512
"""Length of a tile in the last dim, if there are others: tensor parallelism cuts this dim too."""


def tile_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the tiles of a parameter: a little of the last dim, then as much as fits."""
    if not shape:
        return ()
    tile = [1] * len(shape)
    tile[-1] = min(shape[-1], WIDTH) or 1
    for dim in reversed(range(len(shape) - 1)):
        tile[dim] = min(shape[dim], TILE // math.prod(tile)) or 1
    tile[-1] = min(shape[-1], TILE // math.prod(tile[:-1])) or 1
    return tuple(tile)


def tiles_of(shape: Sequence[int], box: Place) -> Iterator[tuple[int, Place]]:
    """Yield number, offset and shape of each tile of a parameter that meets a box of it, in order."""
    offset, size = box
    if 0 in size:
        return
    tile = tile_shape(shape)
    counts = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
    ranges = [range(o // t, -(-(o + n) // t)) for o, n, t in zip(offset, size, tile, strict=True)]
    for place in product(*ranges):
        number = 0
        for i, count in zip(place, counts, strict=True):
            number = number * count + i
        corner = tuple(i * t for i, t in zip(place, tile, strict=True))
        yield number, (corner, tuple(min(t, n - o) for t, n, o in zip(tile, shape, corner, strict=True)))


@torch.no_grad()
def draw(part: LocalPart, operations: Sequence[Operation], seed: int, name: str) -> None:
    """Fill a rank's part of the parameter `name` by doing the operations to each tile that it meets."""
    data = part.data if part.data.device.type == "cpu" else torch.empty_like(part.data, device="cpu")
    generators = TileGenerators(seed, name)
    scratch = torch.empty(TILE, dtype=data.dtype, device="cpu")
    ends = [o + n for o, n in zip(part.offset, data.shape, strict=True)]
    for number, (corner, shape) in tiles_of(part.shape, (part.offset, tuple(data.shape))):
        tile = scratch[: math.prod(shape)].view(shape)  # contiguous: draws to other strides are other numbers
        generator = generators.at(number)
        for operation in operations:
            operation.do(tile, generator)
        first = [max(o, c) for o, c in zip(part.offset, corner, strict=True)]
        last = [min(e, c + n) for e, c, n in zip(ends, corner, shape, strict=True)]
        data[_slices(first, last, part.offset)] = tile[_slices(first, last, corner)]
    if data is not part.data:
        part.data.copy_(data)


def _slices(first: Sequence[int], last: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(i - o, j - o) for i, j, o in zip(first, last, origin, strict=True))


class TileGenerators:
    """CPU generators of a parameter's tiles, by number.

    Torch seeds its generator, MT19937 (M. Matsumoto and T. Nishimura, "Mersenne Twister", ACM TOMACS 1998),
    with 32 bits, of which a large model has too many tiles: some would be the same. So all 624 words of the
    state are set, to SHAKE-256 of the version, the seed, the name and the tile's number.
    """

    _WORDS = slice(24, 24 + 8 * 624)
    """Bytes of the state that hold the words, one in each 8 bytes, after the seed and two counters."""
    _SEED, _BEGIN = 5489, (5489, 1301868182, 2938499221)
    """A seed, and the first words that it gives by the paper's recurrence."""

    def __init__(self, seed: int, name: str) -> None:
        self._hash = hashlib.shake_256(f"initial weights {INITIAL_WEIGHTS}:{seed}:{name}:".encode())
        self._generator = torch.Generator().manual_seed(self._SEED)
        self._state = self._generator.get_state()
        words = self._state[self._WORDS]
        self._words = words.numpy().view(np.uint64) if words.numel() == 8 * 624 else np.zeros(3, np.uint64)
        if tuple(self._words[:3].tolist()) != self._BEGIN:
            raise RuntimeError(
                f"torch {torch.__version__} keeps the state of its CPU generator in another form than the "
                "releases that uni3d knows; build the model on the CPU, or use one of these releases"
            )

    def at(self, tile: int) -> torch.Generator:
        """Return the generator of a tile: the same object each time, at its beginning."""
        digest = self._hash.copy()
        digest.update(tile.to_bytes(8, "little"))
        self._words[:] = np.frombuffer(digest.digest(4 * 624), "<u4")
        self._generator.set_state(self._state)
        return self._generator
