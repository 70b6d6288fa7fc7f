"""Differences between two checkpoints, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ckpt.bands import BandReader, bands
from ckpt.parts import ArrayInfo
from ckpt.read import Checkpoint
from ckpt.shards import ArrayKey
from ckpt.threads import cores, for_each


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of one array; values are compared only if shape and dtype are the same."""

    key: ArrayKey
    what: str
    """"values", "shape", "dtype", "only in the first" or "only in the second"."""
    elements: int = 0
    """Number of elements that differ; NaNs are equal to each other."""
    absolute: float = 0.0
    """Largest absolute difference; infinite if one is infinite or NaN and the other isn't the same."""
    relative: float = 0.0
    """Largest difference relative to the larger of the two."""


def compare(
    first: Checkpoint, second: Checkpoint, *, progress: Callable[[int], None] = lambda n: None
) -> list[Difference]:
    """Return the arrays that differ, sorted by name. `progress` gets the bytes read of `first`.

    Raises:
        CheckpointError: either checkpoint is damaged.
    """
    found: dict[ArrayKey, Difference] = {}
    same: list[tuple[ArrayInfo, ArrayInfo]] = []
    for key in sorted(first.arrays.keys() | second.arrays.keys(), key=lambda k: (k.atom, k.state)):
        a, b = first.arrays.get(key), second.arrays.get(key)
        if a is None or b is None:
            found[key] = Difference(key=key, what=f"only in the {'second' if a is None else 'first'}")
        elif a.shape != b.shape or a.dtype != b.dtype:
            found[key] = Difference(key=key, what="shape" if a.shape != b.shape else "dtype")
        else:
            same.append((a, b))
    readers = BandReader(first), BandReader(second)

    def compare_band(band: tuple[ArrayInfo, ArrayInfo, Any]) -> tuple[int, float, float]:
        a, b, box = band
        values = readers[0].read(a, box)
        apart = _apart(values, readers[1].read(b, box))
        progress(values.nbytes)
        return apart

    todo = [(a, b, box) for a, b in same for box in bands(a) if box.size]
    results = for_each(compare_band, todo, first.store.threads or cores())
    for (a, _, _), (elements, absolute, relative) in zip(todo, results, strict=True):
        if elements:
            old = found.get(a.key, Difference(key=a.key, what="values"))
            found[a.key] = Difference(
                key=a.key,
                what="values",
                elements=old.elements + elements,
                absolute=max(old.absolute, absolute),
                relative=max(old.relative, relative),
            )
    return sorted(found.values(), key=lambda d: (d.key.atom, d.key.state))


def common_bytes(first: Checkpoint, second: Checkpoint) -> int:
    """Return the most bytes of `first` that `compare` reads."""
    return sum(info.nbytes for key, info in first.arrays.items() if key in second.arrays)


def _apart(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[int, float, float]:
    """Return how many elements differ, and the largest absolute and relative differences."""
    if a.tobytes() == b.tobytes():
        return 0, 0.0, 0.0
    both = np.isnan(a) & np.isnan(b) if a.dtype.kind not in "biu" else np.zeros(a.shape, bool)
    differ = (a != b) & ~both
    count = int(np.count_nonzero(differ))
    if not count:
        return 0, 0.0, 0.0
    x, y = a[differ].astype(np.float64), b[differ].astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(x - y)
        distance[np.isnan(distance)] = math.inf
        size = np.maximum(np.abs(x), np.abs(y))
        relative = np.where(np.isfinite(distance), distance / size, math.inf)
    return count, float(distance.max()), float(relative.max())
