"""Axis-aligned boxes of arrays, in elements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """Part of an array that begins at `offset` and has `shape`, each with one entry per dim.

    A named tuple rather than a dataclass, because plans and reads make hundreds of thousands.
    """

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """Number of elements; 1 for a box without dims (a scalar)."""
        return math.prod(self.shape)

    @property
    def end(self) -> Shape:
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index that selects the box in its array."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def within(self, other: Box) -> bool:
        return self.size == 0 or self.intersect(other) == self

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, or None if there is none."""
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            low, high = max(a, b), min(a + n, b + m)
            if low >= high:
                return None
            offset.append(low)
            shape.append(high - low)
        return Box(tuple(offset), tuple(shape))

    def relative_to(self, other: Box) -> Box:
        """Return the same box with offsets counted from the beginning of `other`."""
        return Box(tuple(a - b for a, b in zip(self.offset, other.offset, strict=True)), self.shape)

    def span(self, shape: Shape) -> tuple[int, int]:
        """Return the indices of its first and one past its last element in a C-ordered array of `shape`."""
        assert self.size > 0, "an empty box has no span"
        first = last = 0
        for offset, length, dim in zip(self.offset, self.shape, shape, strict=True):
            first = first * dim + offset
            last = last * dim + offset + length - 1
        return first, last + 1


def around(boxes: Sequence[Box]) -> Box:
    """Return the smallest box that contains all of `boxes`."""
    low = tuple(map(min, zip(*(b.offset for b in boxes), strict=True)))
    high = tuple(map(max, zip(*(b.end for b in boxes), strict=True)))
    return Box(low, tuple(b - a for a, b in zip(low, high, strict=True)))


def grid(shape: Shape, chunk: Shape, box: Box | None = None) -> Iterator[tuple[Shape, Box]]:
    """Yield `(index, box)` of each chunk of a regular grid over an array of `shape` that intersects `box`.

    Boxes of chunks at the end are clipped to the array's bounds.
    """
    target = Box.whole(shape) if box is None else box
    if target.size == 0:
        return
    ranges = [
        range(o // c, (o + n - 1) // c + 1)
        for o, n, c in zip(target.offset, target.shape, chunk, strict=True)
    ]
    index = [r.start for r in ranges]
    while True:
        offset = tuple(i * c for i, c in zip(index, chunk, strict=True))
        length = tuple(min(c, n - o) for c, n, o in zip(chunk, shape, offset, strict=True))
        yield tuple(index), Box(offset, length)
        for dim in reversed(range(len(index))):  # count up, last dim fastest
            index[dim] += 1
            if index[dim] < ranges[dim].stop:
                break
            index[dim] = ranges[dim].start
        else:
            return
