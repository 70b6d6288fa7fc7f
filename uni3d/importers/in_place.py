"""Other frameworks' checkpoints in place: opened, read and loaded as our own, without an import.

A `ForeignCheckpoint` has the manifest, the arrays and the chunks that `write` would make of the source, so
that whatever reads a checkpoint finds the same in both. Its values are read when they are asked for.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from glob import escape
from hashlib import blake2b
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np

import ckpt
from ckpt import Checkpoint, CheckpointError, Comm
from ckpt.format import MANIFEST, check_json, tag_text
from ckpt.parts import ArrayInfo
from ckpt.plan import ArrayPlan
from ckpt.read import Arrays, Piece
from ckpt.shards import ArrayKey, Unfilled
from ckpt.threads import cores
from uni3d.importers.detect import KINDS, UnknownKindError, kind_of, read
from uni3d.importers.source import FLOATS, PARAMETER, Array, ForeignArray, Options, Source
from uni3d.importers.write import converted, manifest_of, plan_of, read_whole
from uni3d.name_map import NameMap, Rules


def open(  # noqa: A001  as in `uni3d.open`
    run: str | Path,
    tag: str | int | None = None,
    *,
    kind: str = "auto",
    name_map: str | Path | Rules | None = None,
    buffers: Sequence[str] = (),
    optimizer: str | None = None,
    states: bool = True,
    renamed: bool = False,
) -> Checkpoint:
    """Open a checkpoint, uni3d's own or another framework's, to read its arrays by name.

    Opening reads names, shapes and numbers; `read(atom, state, box)` of the result reads values.

    Args:
        run: the folder or URL of a run of uni3d or of one of its checkpoints; another framework's folder, or
            its file of weights.
        tag: the checkpoint's name in the run's folder, by default the newest.
        kind: kind of another framework's checkpoint, as for `uni3d import --from`.
        name_map: regular expression -> new name of a tensor, or None to leave it out; or a JSON file of it.
        buffers: patterns of the source's names of buffers, where it doesn't record which tensors are.
        optimizer: class of the optimizer, where the source doesn't record it.
        states: False if optimizer states that can't be read are to be left out.
        renamed: whether the tag's folder may have another name than it was saved under.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ValueError: an option has no effect, or the name map is malformed.
    """
    if kind not in ("auto", *KINDS):
        raise ValueError(f"kind is {kind!r}; expected auto, {', '.join(KINDS)}")
    if kind == "auto":
        try:
            ours = ckpt.open_checkpoint(run, tag, renamed=renamed)
        except CheckpointError:
            found = foreign_kind(run, tag)
            if found is None:
                raise
            kind = found
        else:
            if name_map is not None or buffers or optimizer is not None:
                raise ValueError(
                    f"{ours.url} is uni3d's own, with all names and types: leave out name_map, buffers and "
                    "optimizer"
                )
            return ours
    given, names = Options(buffers=tuple(buffers)), _name_map(name_map)
    return _opened(Path(run), tag, kind, given, names, optimizer=optimizer, states=states)


def open_together(
    comm: Comm,
    run: str | Path | Checkpoint,
    tag: str | int | None = None,
    *,
    buffers: Collection[str] = (),
    ties: Mapping[str, str] = MappingProxyType({}),
    optimizer: Sequence[Sequence[str]] | None = None,
    states: bool = True,
) -> Checkpoint:
    """Open the same checkpoint on every rank; each reads another framework's by itself. Collective.

    A checkpoint that each rank has opened stays as it is.

    Args:
        comm: the ranks.
        run, tag, states: as for `open`.
        buffers: names of this rank's buffers.
        ties: other names of its tied parameters -> their first names.
        optimizer: names of its optimizer's parameters, by group.

    Raises:
        CheckpointError: as `open`, or the ranks see different ones; the same on all ranks.
    """
    if isinstance(run, Checkpoint):
        found = run
    else:
        try:
            return ckpt.open_together(comm, run, tag)
        except CheckpointError:  # on all ranks
            kind = ckpt.from_rank_0(comm, lambda: foreign_kind(run, tag))
            if kind is None:
                raise
        names, pairs = set(buffers), set(ties.items())
        names, pairs = comm.all_reduce(names, ckpt.union), comm.all_reduce(pairs, ckpt.union)
        order = None if optimizer is None else tuple(map(tuple, optimizer))
        whole = len(ckpt.distinct(comm, lambda: order)) == 1  # else each has a stage's alone
        given = Options(buffers=tuple(map(escape, sorted(names))), optimizer_order=order if whole else None)
        found = ckpt.agreed(
            comm, lambda: _opened(Path(run), tag, kind, given, ties=dict(pairs), states=states)
        )
    if len(ckpt.distinct(comm, lambda: _digest(found))) > 1:
        places = comm.all_reduce({found.url}, ckpt.union)
        urls = " and ".join(sorted(places))
        raise CheckpointError(f"{urls}: not the same checkpoint on all ranks; give a folder that all see")
    return found


def foreign_kind(run: str | Path, tag: str | int | None = None) -> str | None:
    """Return the kind of another framework's checkpoint, one of `KINDS`; None for a place without any.

    Raises:
        CheckpointError: it isn't clear which checkpoint there is meant.
    """
    try:
        path = Path(ckpt.check_run(run))
    except CheckpointError:
        return None
    if "://" in str(run) or not path.exists() or (path / MANIFEST).is_file() or ckpt.committed_tags(path):
        return None
    try:
        return kind_of(path, None if tag is None else tag_text(tag))
    except UnknownKindError:
        return None


def renamed(source: Source, names: NameMap) -> Source:
    """Return the source with the names that a name map gives; patterns without a use are in `left_out`."""
    found = source.renamed(names.rename_all([*(array.name for array in source.arrays), *source.aliases]))
    idle = [f"pattern {pattern!r} of the name map: it matches no tensor" for pattern in names.unused]
    return replace(found, left_out=[*found.left_out, *idle])


def _name_map(given: str | Path | Rules | None) -> NameMap | None:
    if given is None:
        return None
    return NameMap(given) if isinstance(given, Mapping) else NameMap.load(given)


def _opened(
    path: Path,
    tag: str | int | None,
    kind: str,
    options: Options,
    names: NameMap | None = None,
    *,
    ties: Mapping[str, str] = MappingProxyType({}),
    optimizer: str | None = None,
    states: bool = True,
) -> ForeignCheckpoint:
    options = replace(options, tag=None if tag is None else tag_text(tag))
    try:
        source = _read(path, kind, options, states=states)
    except CheckpointError as error:
        if " --" not in str(error):
            raise
        raise CheckpointError(f"{error} (an option of `uni3d import`, which converts it)") from None
    source = _tied(source if names is None else renamed(source, names), ties)
    return ForeignCheckpoint(source, optimizer)


def _read(path: Path, kind: str, options: Options, *, states: bool) -> Source:
    try:
        return read(path, kind, options)
    except CheckpointError as error:
        if states:
            raise
        reason = f"optimizer state: {error}"
    source = read(path, kind, replace(options, weights_only=True))
    return replace(source, left_out=[*source.left_out, reason])


def _tied(source: Source, ties: Mapping[str, str]) -> Source:
    """Return the source with a model's ties, where it stores tied weights apart or under another name."""
    weights = {array.name: array for array in source.arrays if array.state == PARAMETER}
    ties = {other: first for other, first in ties.items() if other in weights}
    alone = {other: first for other, first in ties.items() if first not in weights}
    same = {o: f for o, f in ties.items() if o not in alone and _equal(weights[o], weights[f])}
    if alone:
        names = {*(array.name for array in source.arrays), *source.aliases}
        source = source.renamed({name: name for name in names} | alone)
    if same:
        source = replace(
            source,
            arrays=[array for array in source.arrays if array.name not in same],
            aliases={**source.aliases, **same},
            frozen=source.frozen - same.keys(),
        )
    return source


def _equal(one: ForeignArray, other: ForeignArray) -> bool:
    return one.shape == other.shape and np.array_equal(read_whole(one), read_whole(other))


def _digest(checkpoint: Checkpoint) -> str:
    arrays = [(*key, info.dtype, info.shape) for key, info in checkpoint.arrays.items()]
    return blake2b(repr((checkpoint.manifest, arrays)).encode(), digest_size=16).hexdigest()


class ForeignCheckpoint(Checkpoint):
    """Another framework's checkpoint, opened for reading. Threads may share it.

    Parts of a tensor are read where the source allows it. Else the tensor is read whole, and kept while its
    parts are asked for: a few of the largest are in memory at a time.

    Attributes:
        source: what its reader found.
        left_out: a line for each part of the folder that isn't here, with the reason.
    """

    def __init__(self, source: Source, optimizer: str | None = None) -> None:
        """Open a source; `optimizer` is the optimizer's class if the source doesn't record it."""
        self.source, self.left_out, self._optimizer = source, source.left_out, optimizer
        self.store, self.folder = ckpt.open_store(Path(source.where)), ""
        self.tag = f"global_step{source.step}"
        document = replace(manifest_of(source, optimizer), created=None).document()
        check_json(document, source.where)
        self.manifest = {"tag": self.tag, "parts": {}, "files": {}} | json.loads(json.dumps(document))
        self.arrays = _Arrays({a.key: _info(a) for a in plan_of(source, "array").arrays})
        self._of = {array.key: array for array in source.arrays}
        self._locks = {key: threading.Lock() for key in self._of}
        self._kept = lru_cache(min(cores(), 8) + 1)(lambda key: read_whole(self._of[key]))

    @property
    def url(self) -> str:
        return self.source.where

    def where(self, path: str) -> str:
        return self.source.where

    def document(self, path: str) -> bytes:
        raise CheckpointError(
            f"{self.url} is a {self.source.kind} checkpoint, without {path}; import it first"
        )

    @property
    def whole_reads(self) -> int:
        """Number of arrays of which parts can't be read without the rest."""
        return sum(array.read_part is None for array in self._of.values())

    def check_class(self) -> None:
        """Raise CheckpointError if there is an optimizer whose class isn't known."""
        known = self.source.optimizer is None or self.source.optimizer.type or self._optimizer
        if not known:
            raise CheckpointError(
                f"{self.url} doesn't record the class of its optimizer; import it, with --optimizer CLASS"
            )

    def in_types(self, wanted: Mapping[ArrayKey, str]) -> ForeignCheckpoint:
        """Return the checkpoint with floating-point arrays in the types that are wanted, where these can hold
        all values of the source's own type. Elsewhere they are as after an import.
        """
        arrays = [
            replace(array, dtype=wanted[array.key])  # type: ignore[index]
            if array.own_dtype in FLOATS and _holds(wanted.get(array.key), array.own_dtype)  # type: ignore[call-overload]
            else array
            for array in self.source.arrays
        ]
        return ForeignCheckpoint(replace(self.source, arrays=arrays), self._optimizer)

    def read_piece(self, piece: Piece, out: Array | Unfilled) -> int:
        """Copy one piece of a box into its place in `out`, of the box's shape; return the bytes read."""
        grid, inside = piece.info.grid, piece.inside
        begin = [i * n + o for i, n, o in zip(piece.chunk, grid.chunk_shape, inside.offset, strict=True)]
        part = tuple(slice(b, b + n) for b, n in zip(begin, inside.shape, strict=True))
        values = self._part(piece.info.key, part)
        out[piece.target.slices or ...] = values
        return values.nbytes

    def _part(self, key: ArrayKey, part: tuple[slice, ...]) -> Array:
        array = self._of[key]
        if array.read_part is not None:
            values = array.read_part(part)
            wanted = tuple(each.stop - each.start for each in part)
            if values.shape != wanted:
                raise CheckpointError(
                    f"{array.origin} has changed: a part of it isn't {list(wanted)} any more"
                )
            return converted(array, values)
        with self._locks[key]:  # threads that want other parts of it wait for the one that reads it
            whole = self._kept(key)
        return whole[part or ...]


def _holds(wanted: str | None, own: str) -> bool:
    """Return whether the type that is wanted has all values of another floating-point type."""
    return wanted in FLOATS and np.can_cast(ckpt.numpy_dtype(own), ckpt.numpy_dtype(wanted), "safe")


def _info(planned: ArrayPlan) -> ArrayInfo:
    grid = planned.grid
    return ArrayInfo(planned.key, planned.dtype, grid, np.zeros(prod(grid.counts), np.uint32))


class _Arrays(Arrays):
    """The arrays of a source by name, without documents."""

    def __init__(self, infos: Mapping[ArrayKey, ArrayInfo]) -> None:
        self._infos = infos

    def __getitem__(self, key: ArrayKey) -> ArrayInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[ArrayKey]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, key: object) -> bool:
        return key in self._infos
