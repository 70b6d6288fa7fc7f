"""Parts of arrays that ranks hold, with and without their data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ckpt.box import Box, Shape

Array = npt.NDArray[Any]

Files = Literal["array", "writer"]
"""Content of a file: a whole array, written by several ranks at once; or what one rank writes of it, up to
`ckpt.chunking.FILE_BYTES`, where ranks can't share a file."""


class ArrayKey(NamedTuple):
    """Name of one array of a checkpoint: a state (`fp32`, `exp_avg`, ...) of an atom."""

    atom: str
    state: str


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """Description of the part of one array that a rank holds."""

    key: ArrayKey
    dtype: str
    """A numpy name: `float32`, `int64`, ..., or `bfloat16`."""
    shape: Shape
    """Shape of the whole array."""
    box: Box
    """The rank's part; empty if the rank holds nothing of the array."""
    fine_dim: int | None = None
    """A dim after the first along which other topologies cut the array. Chunks are kept narrow along it, so
    that a part can be read without the rest of its rows. (A part along the first dim is a range of bytes
    anyway.)
    """


class ArrayLayout(NamedTuple):
    """One array and the boxes that ranks hold of it."""

    key: ArrayKey
    dtype: str
    shape: Shape
    boxes: Mapping[int, Box]
    """Rank -> its box. Arrays that are cut alike may share the mapping, which makes planning fast."""
    fine_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of an array, in memory."""

    spec: ShardSpec
    data: Array
    """Has the shape `spec.box.shape`."""


class Unread(Protocol):
    """An array that is read part by part, each when it is written."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, part: tuple[slice, ...], /) -> Array: ...


class Unfilled(Protocol):
    """An array that isn't in the host's memory, such as a GPU's; a load gives it one part after the other."""

    def __setitem__(self, part: tuple[slice, ...] | EllipsisType, values: Array, /) -> None:
        """Copy `values`, which the caller reuses. Several threads call it at once, for different parts."""


@dataclass(frozen=True, slots=True)
class UnfilledShard:
    """A rank's part of an array, into which a load writes part by part."""

    spec: ShardSpec
    data: Unfilled
    """Has the shape `spec.box.shape`."""


@dataclass(frozen=True, slots=True)
class UnreadShard:
    """A rank's part of an array that is still to be read."""

    spec: ShardSpec
    data: Unread
    """Has the shape `spec.box.shape`."""
