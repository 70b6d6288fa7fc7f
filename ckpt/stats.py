"""Statistics of a checkpoint's arrays, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckpt.bands import BandReader, bands
from ckpt.parts import ArrayInfo
from ckpt.read import Checkpoint
from ckpt.shards import ArrayKey
from ckpt.threads import cores, for_each


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of one array without its NaNs, which are counted; None if there are no numbers."""

    mean: float | None
    std: float | None
    """Population standard deviation."""
    least: float | None
    most: float | None
    nan: int


class _Part(NamedTuple):
    """Statistics of one band."""

    size: int
    numbers: int
    """Elements that aren't NaN."""
    mean: float
    spread: float
    """Sum of squared distances from the mean."""
    least: float
    most: float


def statistics(
    checkpoint: Checkpoint, keys: Sequence[ArrayKey], *, progress: Callable[[int], None] = lambda n: None
) -> dict[ArrayKey, Statistics]:
    """Compute statistics of arrays, in float64. `progress` gets the bytes that were read.

    Raises:
        CheckpointError: an array is damaged.
    """
    reader = BandReader(checkpoint)

    def of_band(band: tuple[ArrayInfo, Any]) -> _Part:
        info, box = band
        stored = reader.read(info, box)
        values = stored.astype(np.float64).reshape(-1)
        progress(stored.nbytes)
        numbers = values[~np.isnan(values)]
        if not numbers.size:
            return _Part(values.size, 0, 0.0, 0.0, math.inf, -math.inf)
        mean = float(numbers.mean())
        with np.errstate(invalid="ignore", over="ignore"):
            spread = float(np.square(numbers - mean).sum())
        return _Part(values.size, numbers.size, mean, spread, float(numbers.min()), float(numbers.max()))

    infos = [checkpoint.arrays[key] for key in keys]
    todo = [(info, box) for info in infos for box in bands(info) if box.size]
    parts: dict[ArrayKey, list[_Part]] = {key: [] for key in keys}
    found = for_each(of_band, todo, checkpoint.store.threads or cores())
    for (info, _), part in zip(todo, found, strict=True):
        parts[info.key].append(part)
    return {key: _together(of_array) for key, of_array in parts.items()}


def _together(parts: list[_Part]) -> Statistics:
    """Combine the statistics of an array's bands (Chan, Golub and LeVeque 1983, for means and squares)."""
    count, mean, spread = 0, 0.0, 0.0
    for part in (part for part in parts if part.numbers):
        away, total = part.mean - mean, count + part.numbers
        mean += away * part.numbers / total
        spread += part.spread + away * away * count * part.numbers / total
        count = total
    nan = sum(part.size - part.numbers for part in parts)
    if not count:
        return Statistics(mean=None, std=None, least=None, most=None, nan=nan)
    return Statistics(
        mean=mean,
        std=math.sqrt(spread / count),
        least=min(part.least for part in parts),
        most=max(part.most for part in parts),
        nan=nan,
    )
