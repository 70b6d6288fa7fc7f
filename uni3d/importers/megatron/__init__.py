"""Reader of Megatron-core's distributed checkpoint, `torch_dist`: DCP with `metadata.json` and `common.pt`.

Its tensors are unsplit and have Megatron's names:

    decoder.layers.mlp.linear_fc2.weight       all layers, stacked along dim 0: an atom for each
    decoder.layers.3.mlp.linear_fc2.weight     one layer, if layers differ
    ...mlp.linear_fc1.weight_w, ..._v          the two halves of a gated layer, if they are stored apart
    ...mlp.linear_fc1.layer_norm_weight        the norm before the layer, whatever its name in the model
    optimizer.state.exp_avg.<name>             a moment; `fp32_param` or `param` is the fp32 master

`common.pt` has everything that isn't split: counters, the command line and the optimizer's groups, but not
the groups' parameters.

Modules:
    common    `common.pt`: the groups, the counters, the command line
    buckets   an optimizer in flat buckets, which don't record the order of the parameters in them
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from ckpt import DTYPES, CheckpointError
from uni3d.importers.dcp.layout import Layout
from uni3d.importers.megatron.buckets import Buckets
from uni3d.importers.megatron.common import COMMON, Common, read_common
from uni3d.importers.source import FLOATS, PARAMETER, Array, ForeignArray, Options, Read, Source
from uni3d.importers.state_dicts import array_of

BACKEND = "metadata.json"
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_STACKED = re.compile(r"((?:.*?\.)?layers)\.(?!\d+\.)(.+)")
_HALF = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])")
_MASTERS = ("fp32_param", "param")
_FLAT = "the optimizer state has Megatron's format {}: flat buckets that don't record their parameters' order"
_REMEDY = "save it with --dist-ckpt-optim-fully-reshardable"
_BUCKETS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.")


def read_megatron(path: Path, options: Options) -> Source:
    """Read the model and its optimizer."""
    _check_backend(path)
    layout = Layout(path, options)
    buckets = Buckets(layout)
    common = read_common(path, options, buckets.optimizer() if buckets else None)
    atoms = _joined([atom for key in layout.tensors for atom in _atoms(layout, key)])
    left_out = [*common.source.left_out, *_objects(layout)]
    why_not = _unreadable(layout, common, buckets)
    if buckets and not why_not:
        try:
            atoms += buckets.atoms(_weights(layout))
        except CheckpointError as error:
            why_not = f"{_FLAT.format('dp_reshardable')}, and {error}; {_REMEDY}"
    if why_not and not options.weights_only:
        raise CheckpointError(f"{path}: {why_not}; or import with --weights-only")
    if why_not:
        left_out.append(f"optimizer state, with the fp32 masters: {why_not}")
    masters = {atom.name: atom for atom in atoms if atom.state in _MASTERS}
    moments = [atom for atom in atoms if atom.state and atom.state not in _MASTERS]
    trained = {atom.name: atom.shape for atom in (*masters.values(), *moments)}
    arrays = []
    for atom in (atom for atom in atoms if not atom.state):
        if atom.dtype not in DTYPES:
            left_out.append(f"{atom.origin}: its type {atom.dtype} can't be stored")
        elif atom.name in trained:
            arrays.append(_array(masters.pop(atom.name, atom), PARAMETER))
        else:
            origin = f"{path.name}: {atom.origin}"
            arrays.append(array_of(atom.name, atom.dtype, atom.shape, atom.read, options, origin))
    known = {array.name for array in arrays}
    for atom in (*masters.values(), *moments):
        if atom.name not in known:
            raise CheckpointError(f"{path} has optimizer state {atom.origin}, but no weight {atom.name}")
    has_optimizer = bool(trained) and not options.weights_only
    if options.weights_only and moments:
        left_out.append("optimizer state: --weights-only")
    optimizer = common.optimizer(trained, {atom.state for atom in moments}) if has_optimizer else None
    parameters = {array.name for array in arrays if array.state == PARAMETER}
    return replace(
        common.source,
        arrays=[*arrays, *(_array(atom, atom.state) for atom in moments if has_optimizer)],
        frozen=frozenset(parameters - trained.keys()) if has_optimizer else frozenset(),
        optimizer=optimizer,
        left_out=[*left_out, *(common.of_groups if has_optimizer else [])],
        files=layout.files | {path / BACKEND, path / COMMON},
    )


def _array(atom: ForeignArray, state: str) -> ForeignArray:
    if atom.dtype not in FLOATS:
        raise CheckpointError(f"{atom.origin} has type {atom.dtype}, expected one of {', '.join(FLOATS)}")
    return replace(atom, state=state, dtype="float32")


def _check_backend(path: Path) -> None:
    file = path / BACKEND
    try:
        backend = json.loads(file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} wasn't written by Megatron: {type(error).__name__}: {error}") from None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path} has Megatron's format {backend!r}, expected 'torch_dist'; convert it with Megatron's "
            "--ckpt-convert-format torch_dist"
        )


def _objects(layout: Layout) -> list[str]:
    """Return a line for each kind of object that isn't imported; each layer has some extra states."""
    names = [key.partition("/shard_")[0] for key in layout.objects if not _BUCKETS.match(key)]
    kinds = Counter("_extra_state" if name.endswith("_extra_state") else name for name in names)
    return [f"{kind}: {n} objects of Megatron that aren't tensors" for kind, n in sorted(kinds.items())]


def _unreadable(layout: Layout, common: Common, buckets: Buckets) -> str | None:
    """Return why the optimizer state can't be read; None if it can."""
    if not buckets and any(_BUCKETS.match(key) for key in (*layout.tensors, *layout.objects)):
        return f"{_FLAT.format(common.sharding or 'dp_reshardable')}; {_REMEDY}"
    states = bool(buckets) or any(_STATE.match(key) for key in layout.tensors)
    return common.no_groups if states else None


def _weights(layout: Layout) -> dict[str, tuple[str, int | None]]:
    """Return the stored name of each of the model's atoms, and its layer's number if layers are stacked."""
    found: dict[str, tuple[str, int | None]] = {}
    for key, tensor in layout.tensors.items():
        if _BUCKETS.match(key) or _STATE.fullmatch(key):
            continue
        if stacked := _STACKED.fullmatch(key):
            found |= {f"{stacked[1]}.{n}.{stacked[2]}": (key, n) for n in range(tensor.shape[0])}
        else:
            found[key] = (key, None)
    return found


# --- atoms -----------------------------------------------------------------------------------------------


def _atoms(layout: Layout, key: str) -> Iterator[ForeignArray]:
    """Yield the atoms in one of the checkpoint's tensors, in its type.

    Each belongs to one layer, or to none. Its state is Megatron's name; it is empty for the model's weight.

    Raises:
        CheckpointError: it belongs to experts, or has an unknown shape.
    """
    if _BUCKETS.match(key):
        return
    match = _STATE.fullmatch(key)
    state, name = match.groups() if match else ("", key)
    if ".experts." in name:
        raise CheckpointError(f"{layout.path} has {key}: a mixture of experts isn't supported")
    tensor = layout.tensors[key]
    shape, grid = tensor.shape, None
    if state and name in layout.tensors and shape != layout.tensors[name].shape:
        shape = layout.tensors[name].shape
        grid = _grid(f"{layout.path}: {key}", tensor.shape, shape)
    stacked = _STACKED.fullmatch(name)
    if stacked is None:
        read = partial(_shaped, partial(layout.read, key), shape, grid)
        yield ForeignArray(name=name, state=state, dtype=tensor.dtype, shape=shape, read=read, origin=key)
        return
    if any(chunk.sizes[:1] != (1,) for chunk in tensor.chunks):
        raise CheckpointError(f"{layout.path} has {key}, whose chunks should hold one layer each")
    if grid and grid[0] != shape[0]:
        raise CheckpointError(f"{layout.path} has {key} in shape {list(tensor.shape)}, split across layers")
    for layer in range(shape[0]):
        yield ForeignArray(
            name=f"{stacked[1]}.{layer}.{stacked[2]}",
            state=state,
            dtype=tensor.dtype,
            shape=shape[1:],
            read=partial(_shaped, partial(layout.read, key, layer), shape[1:], grid and grid[1:]),
            origin=f"{key}[{layer}]",
        )


def _grid(what: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of parts along each dim of a tensor whose parts are stored flat.

    Megatron before 0.14, with `fully_sharded_model_space`, stores `[X, Y]` as `[X / x, Y / y, x * y]`.
    """
    grid = shape[:-1]
    fits = len(grid) == len(whole) and all(n and not whole[i] % n for i, n in enumerate(grid))
    if not fits or prod(shape) != prod(whole):
        raise CheckpointError(f"{what} has shape {list(shape)}, which doesn't fit the weight's {list(whole)}")
    return grid


def _shaped(read: Read, shape: tuple[int, ...], grid: tuple[int, ...] | None) -> Array:
    values = read()
    if grid is None:
        return values
    parts = [n // each for n, each in zip(shape, grid, strict=True)]
    n = len(shape)
    order = [axis for pair in zip(range(n), range(n, 2 * n), strict=True) for axis in pair]
    return values.reshape([*grid, *parts]).transpose(order).reshape(shape)


def _joined(atoms: list[ForeignArray]) -> list[ForeignArray]:
    """Join the halves of gated layers, the gate above the values, as in the model."""
    halves = {(atom.name, atom.state): atom for atom in atoms if _HALF.fullmatch(atom.name)}
    out = []
    for atom in atoms:
        match = _HALF.fullmatch(atom.name)
        if match is None:
            out.append(atom)
            continue
        name, half = match.groups()
        other = halves.get((f"{name}_{'v' if half == 'w' else 'w'}", atom.state))
        if other is None or other.shape[1:] != atom.shape[1:] or other.dtype != atom.dtype:
            raise CheckpointError(f"{atom.origin} has no matching other half")
        if half == "w":
            shape = (atom.shape[0] + other.shape[0], *atom.shape[1:])
            read = partial(_stack, atom.read, other.read)
            origin = f"{atom.origin} and {other.origin}"
            out.append(replace(atom, name=name, shape=shape, read=read, origin=origin))
    return out


def _stack(*parts: Read) -> Array:
    return np.concatenate([read() for read in parts])
