"""The order of samples: each epoch is a permutation that is computed place by place, and never stored.

As an array it would take each rank 8 GB and minutes for 1e9 samples. Here a keyed permutation maps the index
in the epoch to the sample, in memory that doesn't grow with the data. docs/format.md defines it, and
`uni3d.manifest.SAMPLE_ORDER` is its version: whoever changes a bit of it raises that number.

The permutation is a Feistel network on the cells of a table with at least as many cells as samples. An index
that comes out beyond the samples goes through it again, until it is one of them (cycle walking). Both are
from J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. The round function is the
mix of SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)
with D. Stafford's constants Mix13. The keys of an epoch are SHAKE-256 of the seed and the epoch's number.

All of it is arithmetic on integers of 64 bits, so the order is the same on every machine.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
from numpy import uint64

Numbers = npt.NDArray[uint64]

ROUNDS = 12
"""Number of rounds: with 10, some pairs of neighbours among 16 samples are measurably more likely; with 12,
none are."""
_SMALLEST = 4
"""Rows and columns of the smallest table: fewer need more rounds."""


class GlobalOrder:
    """The endless order, epoch after epoch: maps a place to a sample."""

    def __init__(self, n_samples: int, seed: int, epoch_length: int | None = None) -> None:
        """Order samples 0 to `n_samples` - 1; each epoch has the first `epoch_length`, by default all."""
        if n_samples < 1:
            raise ValueError("the training data has no samples")
        self._n, self._seed, self._epoch_length = n_samples, seed, epoch_length or n_samples
        side = math.isqrt(n_samples - 1) + 1
        # With odd columns and rows, rounds are even permutations alone: 7 samples would show it.
        self._columns = max(_SMALLEST, side + side % 2)
        self._rows = max(_SMALLEST, -(-n_samples // self._columns))

    def samples(self, places: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the sample at each place, in an array of the same shape."""
        epochs, indices = np.divmod(np.asarray(places, np.int64), self._epoch_length)
        numbers, inverse = np.unique(epochs.ravel(), return_inverse=True)
        keys = self._keys(numbers.tolist())[:, inverse]
        found = self._permuted(indices.ravel().astype(uint64), keys)
        while (outside := np.flatnonzero(found >= self._n)).size:
            found[outside] = self._permuted(found[outside], keys[:, outside])
        return found.astype(np.int64).reshape(epochs.shape)

    def _keys(self, epochs: list[int]) -> Numbers:
        """Return the keys of these epochs, `(ROUNDS, epochs)`."""
        texts = [f"{self._seed}:epoch {epoch}".encode() for epoch in epochs]
        data = b"".join(hashlib.shake_256(text).digest(8 * ROUNDS) for text in texts)
        return np.frombuffer(data, "<u8").astype(uint64).reshape(-1, ROUNDS).T

    def _permuted(self, cells: Numbers, keys: Numbers) -> Numbers:
        """Move each cell of the table by its own keys, `(ROUNDS, cells)`."""
        row, column = np.divmod(cells, uint64(self._columns))
        for i in range(0, ROUNDS, 2):
            column = (column + (mix(row + keys[i]) >> 1)) % self._columns
            row = (row + (mix(column + keys[i + 1]) >> 1)) % self._rows
        return row * self._columns + column


def mix(z: Numbers) -> Numbers:
    """Mix the bits of each number, modulo 2**64."""
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    return z ^ (z >> uint64(31))
