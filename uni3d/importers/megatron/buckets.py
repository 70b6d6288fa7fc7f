"""Optimizer states in Megatron's flat buckets (`dp_reshardable`).

    optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(...).bucket_idx_0.param        the fp32 masters
    ...bucket_idx_0.exp_avg                                                               and their moments

A bucket has the shards of one tensor-parallel rank and pipeline stage, one behind the other, each from a
multiple of 64 elements on. Their order is that of the live model and isn't stored. But a master rounds to
its weight, which is stored by name, in the chunks of the same ranks: so each shard is known by its values.
Where two have the same ones, nothing tells them apart, and the states are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ckpt import CheckpointError, numpy_dtype
from uni3d.importers.dcp.layout import Layout, StoredChunk
from uni3d.importers.source import FLOATS, Array, ForeignArray

MASTER = "param"
_KEY = re.compile(r"(optimizer\.distributed\.dp_group_idx_\d+\.gbuf_idx_\d+\..*\.bucket_idx_\d+)\.(\w+)")
_OBJECT = re.compile(r"optimizer\.distributed\.dp_group_idx_\d+\.(\w+)/shard_0_1")
_ALIGNED, _FIRST = 64, 64
_GATED = re.compile(r".*\.linear_fc1\.(?:weight|bias)")


class _Shard(NamedTuple):
    """Part of a weight that a tensor-parallel rank has: chunks, one behind the other when it is flat."""

    atom: str
    shape: tuple[int, ...]
    key: str
    """Name of the stored weight."""
    chunks: tuple[StoredChunk, ...]
    stacked: bool
    """True if the first dim of the stored weight counts layers."""

    @property
    def numel(self) -> int:
        return sum(prod(chunk.sizes) for chunk in self.chunks)

    def first(self, layout: Layout) -> Array:
        """Return the first values, unverified, without the rest."""
        tensor, values = layout.tensors[self.key], list[Array]()
        for chunk in self.chunks:
            values.append(layout.chunk(tensor, chunk, verify=False).reshape(-1)[:_FIRST])
            if len(values[-1]) == _FIRST:
                break
        return np.concatenate(values)[:_FIRST]

    def values(self, layout: Layout, *, verify: bool) -> Array:
        tensor = layout.tensors[self.key]
        return np.concatenate([layout.chunk(tensor, c, verify=verify).reshape(-1) for c in self.chunks])


class _Place(NamedTuple):
    """A shard's place in a bucket."""

    bucket: str
    at: int


class Buckets:
    """The buckets of a checkpoint."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._keys: dict[str, dict[str, str]] = defaultdict(dict)  # by bucket, then by state
        for key in layout.tensors:
            if match := _KEY.fullmatch(key):
                self._keys[match[1]][match[2]] = key

    def __bool__(self) -> bool:
        return any(MASTER in states for states in self._keys.values())

    def optimizer(self) -> dict[str, Any]:
        """Return what `common.pt` has of other formats; here each model-parallel rank has its own.

        Raises:
            CheckpointError: they differ.
        """
        found: dict[str, Any] = {}
        for name in self._layout.objects:
            match = _OBJECT.fullmatch(name)
            if match is None or match[1].startswith("per_bucket"):
                continue
            value = self._layout.object(name)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if repr(found.setdefault(match[1], value)) != repr(value):
                raise CheckpointError(f"the ranks have different values of {name}")
        return found

    def atoms(self, weights: Mapping[str, tuple[str, int | None]]) -> Iterator[ForeignArray]:
        """Yield the masters and moments; `weights` has the stored name of each atom, and its layer's number.

        Raises:
            CheckpointError: a bucket can't be told apart, or lacks a part of a weight.
        """
        shards = [shard for atom, (key, layer) in weights.items() for shard in self._shards(atom, key, layer)]
        by_first: dict[tuple[int, bytes], list[_Shard]] = defaultdict(list)
        for shard in shards:
            by_first[shard.numel, shard.first(self._layout).tobytes()].append(shard)
        places: dict[_Shard, list[_Place]] = defaultdict(list)
        for bucket in self._keys:
            for shard, at in self._matched(bucket, by_first):
                places[shard].append(_Place(bucket, at))
        of_atom: dict[str, dict[_Shard, list[_Place]]] = defaultdict(dict)
        for shard, found in places.items():
            of_atom[shard.atom][shard] = found
        states = {frozenset(states) for states in self._keys.values()}
        if len(states) != 1:
            raise CheckpointError("its buckets have different states")
        for atom, parts in of_atom.items():
            self._check_whole(atom, parts)
            shape = next(iter(parts)).shape
            for state in sorted(*states):
                read = partial(self._read, state, parts)
                origin = f"{state} of {atom} in {next(iter(parts.values()))[0].bucket}"
                yield ForeignArray(
                    name=atom, state=state, dtype="float32", shape=shape, read=read, origin=origin
                )

    def _shards(self, atom: str, key: str, layer: int | None) -> Iterator[_Shard]:
        """Yield what may be a rank's part of a weight: a chunk, or two halves of a gated layer."""
        tensor = self._layout.tensors[key]
        if tensor.dtype not in FLOATS:
            return
        chunks = sorted(
            (c for c in tensor.chunks if layer is None or c.offsets[0] == layer), key=lambda c: c.offsets
        )
        shape, stacked = tensor.shape[1:] if layer is not None else tensor.shape, layer is not None
        for chunk in chunks:
            yield _Shard(atom, shape, key, (chunk,), stacked)
        half = len(chunks) // 2
        if _GATED.fullmatch(key) and len(chunks) == 2 * half:
            for pair in zip(chunks[:half], chunks[half:], strict=True):
                yield _Shard(atom, shape, key, pair, stacked)

    def _matched(
        self, bucket: str, by_first: Mapping[tuple[int, bytes], list[_Shard]]
    ) -> Iterator[tuple[_Shard, int]]:
        """Yield the shards in a bucket, each with its place."""
        key, at = self._keys[bucket][MASTER], 0
        (total,) = self._layout.tensors[key].shape
        dtypes = {self._layout.tensors[shards[0].key].dtype for shards in by_first.values()}
        sizes = sorted({numel for numel, _ in by_first}, reverse=True)
        while at < total:
            first = self._layout.read_part(key, (slice(at, min(at + _FIRST, total)),), verify=False)
            rounded = [_rounded(first, dtype) for dtype in dtypes]
            fits = [
                shard
                for numel in sizes
                if at + numel <= total
                for values in rounded
                for shard in by_first.get((numel, values[:numel].tobytes()), [])
            ]
            fits = [s for s in fits if len(fits) == 1 or self._is_at(s, key, at)]
            # A half of a gated layer begins as the whole.
            fits = [s for s in fits if s.numel == max(o.numel for o in fits if o.atom == s.atom)]
            if len(fits) != 1:
                what = " and ".join(shard.atom for shard in fits) or "no weight"
                raise CheckpointError(f"the values at {at} of {key} are those of {what}")
            yield fits[0], at
            at = -(-(at + fits[0].numel) // _ALIGNED) * _ALIGNED

    def _is_at(self, shard: _Shard, key: str, at: int) -> bool:
        masters = self._layout.read_part(key, (slice(at, at + shard.numel),), verify=False)
        return _rounds_to(masters, shard.values(self._layout, verify=False))

    def _check_whole(self, atom: str, parts: Mapping[_Shard, Any]) -> None:
        shard = next(iter(parts))
        found = sum(each.numel for each in parts)
        if found != prod(shard.shape):
            raise CheckpointError(f"its buckets have {found} of the {prod(shard.shape)} elements of {atom}")

    def _read(self, state: str, parts: Mapping[_Shard, list[_Place]]) -> Array:
        out = np.empty(next(iter(parts)).shape, np.float32)
        for shard, places in parts.items():
            first, *copies = (
                self._layout.read_part(
                    self._keys[place.bucket][state], (slice(place.at, place.at + shard.numel),)
                )
                for place in places
            )
            where = f"{shard.atom}: {state} in {places[0].bucket}"
            if not all(np.array_equal(first, copy) for copy in copies):
                raise CheckpointError(f"{where} differs from its copy on another rank")
            if state == MASTER and not _rounds_to(first, shard.values(self._layout, verify=True)):
                raise CheckpointError(f"{where} doesn't round to the weight; the files are of two saves")
            begin = 0
            for chunk in shard.chunks:
                offsets, sizes = chunk.offsets[shard.stacked :], chunk.sizes[shard.stacked :]
                box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                out[box] = first[begin : begin + prod(sizes)].reshape(sizes)
                begin += prod(sizes)
        return out


def _rounded(values: Array, dtype: str) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(numpy_dtype(dtype))


def _rounds_to(masters: Array, weights: Array) -> bool:
    return _rounded(masters, str(weights.dtype)).tobytes() == weights.tobytes()
