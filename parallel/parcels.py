"""Bytes on their way between ranks, several of which travel as one message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class Parcel(NamedTuple):
    """Bytes on their way from one rank to another."""

    source: int
    target: int
    data: Bytes


def bundle(parcels: Sequence[Parcel]) -> Bytes:
    """Join parcels that go the same way, behind a list of them."""
    head = np.array([len(parcels), *(n for p in parcels for n in (p.source, p.target, p.data.nbytes))])
    return np.concatenate([head.astype(np.int64).view(np.uint8), *(parcel.data for parcel in parcels)])


def unbundled(bundle: Bytes) -> Iterator[Parcel]:
    count = int(bundle[:8].view(np.int64)[0])
    begin = 8 * (1 + 3 * count)
    for source, target, nbytes in bundle[8:begin].view(np.int64).reshape(-1, 3).tolist():
        yield Parcel(source, target, bundle[begin : begin + nbytes])
        begin += nbytes


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def unframed(frames: bytes) -> Iterator[bytes]:
    begin = 0
    while begin < len(frames):
        end = begin + 8 + int.from_bytes(frames[begin : begin + 8], "little")
        yield frames[begin + 8 : end]
        begin = end


def as_array(data: bytes) -> Bytes:
    return np.frombuffer(bytearray(data), np.uint8)  # of memory that may be written to, as torch wants it
