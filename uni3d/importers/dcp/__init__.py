"""Reader of torch's distributed checkpoint (DCP): the meaning of its names.

A script saves a nested dict of its own making. These usual forms are recognized:

    {"model": ..., "optim": ...}            by `torch.distributed.checkpoint.state_dict.get_state_dict`, or by
                                            FSDP's own functions; also below one more key, e.g. "app" for a
                                            stateful wrapper class
    {<parameter>: ..., "optimizer": ...}    torchtitan's, whose weights have no key of their own
    {<parameter>: ...}                      weights alone, with or without a key

Everything else becomes the client state if JSON can represent it.

Modules:
    layout      the metadata file: each tensor's shape, dtype and pieces in the data files
    optimizer   optimizer states and parameter groups, by parameter name
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ckpt import DTYPES, CheckpointError
from uni3d.importers.dcp.layout import Layout, Steps
from uni3d.importers.dcp.optimizer import read_optimizer
from uni3d.importers.pickles import plain
from uni3d.importers.source import PARAMETER, ForeignArray, OptimizerState, Options, Source
from uni3d.importers.state_dicts import array_of

_MODELS = frozenset({"model", "model_state_dict", "module", "state_dict"})
_OPTIMIZERS = frozenset(
    {"optim", "optimizer", "optimizers"}
    | {f"{name}_state{end}" for name in ("optim", "optimizer") for end in ("", "_dict")}
)
_STEP = ("step", "global_step", "global_steps", "iteration")
"""Keys under which scripts save the number of steps."""


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The checkpoint's names, sorted by purpose."""

    weights: dict[str, str]
    """Name of each tensor in the model -> its name in the checkpoint."""
    optimizer: dict[str, Steps]
    """Name in the checkpoint -> path below the optimizer's own key."""
    beside: list[str]
    left_out: list[str] = field(default_factory=list)


def read_dcp(path: Path, options: Options) -> Source:
    """Read the model and its optimizer from a DCP folder."""
    layout = Layout(path, options)
    parts = _parts(layout)
    left_out, guesses = list(parts.left_out), list[str]()
    moments: list[ForeignArray] = []
    optimizer: OptimizerState | None = None
    if parts.optimizer and not options.weights_only:
        moments, optimizer = read_optimizer(layout, parts.optimizer, parts.weights, guesses)
    elif parts.optimizer:
        left_out.append("optimizer state: --weights-only")
    grouped = {name for group in optimizer.groups for name in group["params"]} if optimizer else set()
    arrays = []
    for name, key in parts.weights.items():
        if layout.tensors[key].dtype in DTYPES:
            arrays.append(_weight(layout, name, key, options, trained=name in grouped))
        else:
            left_out.append(f"{key}: its type {layout.tensors[key].dtype} can't be stored")
    weights = [a for a in arrays if a.state == PARAMETER]
    aliases = {} if options.untie else _tied(layout, parts.weights, weights, grouped)
    for alias, first in aliases.items():
        left_out.append(
            f"{parts.weights[alias]}: has the same values as {first}, so they are taken to be tied (use "
            "--untie if they aren't)"
        )
    arrays = [array for array in arrays if array.name not in aliases]
    client_state, others = _beside(layout, parts.beside)
    parameters = {array.name for array in arrays if array.state == PARAMETER}
    return Source(
        kind="dcp",
        where=str(path),
        arrays=[*arrays, *moments],
        frozen=frozenset(parameters - grouped) if optimizer else frozenset(),
        aliases=aliases,
        optimizer=optimizer,
        step=_step(client_state, optimizer),
        client_state=client_state,
        left_out=[*left_out, *guesses, *others],
        files=layout.files,
    )


def _weight(layout: Layout, name: str, key: str, options: Options, *, trained: bool) -> ForeignArray:
    held, read = layout.tensors[key], partial(layout.read, key)
    if not trained:
        return array_of(name, held.dtype, held.shape, read, options, key)
    return ForeignArray(name=name, state=PARAMETER, dtype="float32", shape=held.shape, read=read, origin=key)


def _tied(
    layout: Layout, keys: Mapping[str, str], parameters: list[ForeignArray], trained: set[str]
) -> dict[str, str]:
    """Map the further names of tied weights to the names that are kept.

    DCP stores a tied weight under each of its names, but its optimizer states under only one. So a weight
    without states is taken for an alias of one that has states if their values are equal and not all one
    number. Without an optimizer, nothing tells a tied weight from a copy.
    """
    alike: dict[Any, list[str]] = {}
    for array in parameters:
        tensor = layout.tensors[keys[array.name]]
        alike.setdefault((tensor.dtype, tensor.shape), []).append(array.name)
    aliases: dict[str, str] = {}
    for names in alike.values():
        owners = [name for name in names if name in trained]
        for name in (each for each in names if each not in trained and owners):
            sample = layout.sample(keys[name])
            for owner in owners:
                if layout.sample(keys[owner]) == sample and _equal(layout, keys[owner], keys[name]):
                    aliases[name] = owner
                    break
    return aliases


def _equal(layout: Layout, one: str, other: str) -> bool:
    """Return whether two tensors have the same bits; False for constants, often equal without being tied."""
    mine, theirs = (np.ascontiguousarray(layout.read(key)).reshape(-1) for key in (one, other))
    if mine.size and (mine == mine[0]).all():
        return False
    return np.array_equal(mine.view(np.uint8), theirs.view(np.uint8))


# --- the names' purposes ---------------------------------------------------------------------------------


def _parts(layout: Layout) -> _Parts:
    """Sort the names into those of the model, of its optimizer, and the rest.

    Raises:
        CheckpointError: there are several models or optimizers, or no weights.
    """
    optimizer = _prefix(layout, _OPTIMIZERS, "optimizers")
    of_optimizer = _below(layout.steps, optimizer) if optimizer else {}
    rest = {key: steps for key, steps in layout.steps.items() if key not in of_optimizer}
    model = _prefix(layout, _MODELS, "models")
    found: dict[str, Steps]
    if model is None:
        model = optimizer[:-1] if optimizer else ()
        found = {key: steps for key, steps in _below(rest, model).items() if len(steps) == 1}
        if not found.keys() & layout.tensors.keys():
            heads: set[str | int] = {steps[0] for key, steps in rest.items() if key in layout.tensors}
            if len(heads) != 1:
                raise CheckpointError(_no_weights(layout, heads))
            model = tuple(heads)
            found = _below(rest, model)
    else:
        found = _below(rest, model)
    named = {".".join(map(str, steps)): key for key, steps in found.items()}
    if len(named) < len(found):
        twice = sorted(key for key, steps in found.items() if named[".".join(map(str, steps))] != key)
        raise CheckpointError(f"{layout.path} has two tensors at the path of {twice[0]} in its planner_data")
    weights = {name: key for name, key in named.items() if key in layout.tensors}
    if not weights:
        raise CheckpointError(_no_weights(layout, set()))
    if flat := next((name for name in weights if name.rpartition(".")[2].startswith("_flat_param")), None):
        raise CheckpointError(
            f"{layout.path} has {flat}, a flat parameter of FSDP, saved from a local state_dict, which "
            "doesn't name the original parameters; save a sharded or a full state_dict"
        )
    in_model = set(found) if model else set(weights.values())
    not_tensors = sorted(in_model - set(weights.values()))
    return _Parts(
        weights=weights,
        optimizer=of_optimizer,
        beside=[key for key in rest if key not in in_model],
        left_out=[f"{key}: in the model, but not a tensor" for key in not_tensors],
    )


def _prefix(layout: Layout, known: frozenset[str], what: str) -> Steps | None:
    """Return the path of one or two keys whose last key is in `known`; None if there is none."""
    found = {
        steps[:depth]: None
        for steps in layout.steps.values()
        for depth in (1, 2)
        if len(steps) > depth and steps[depth - 1] in known and not known & set(steps[: depth - 1])
    }
    if len(found) > 1:
        names = ", ".join(".".join(map(str, steps)) for steps in found)
        raise CheckpointError(f"{layout.path} has several {what}: {names}; save only the one to import")
    return next(iter(found), None)


def _below(steps: Mapping[str, Steps], prefix: Steps) -> dict[str, Steps]:
    """Return the names whose paths begin with `prefix`, each with the rest of its path."""
    n = len(prefix)
    return {key: each[n:] for key, each in steps.items() if len(each) > n and each[:n] == prefix}


def _no_weights(layout: Layout, heads: set[Any]) -> str:
    keys = sorted({str(steps[0]) for steps in layout.steps.values()})
    found = f"its keys are {', '.join(keys[:12])}"
    if heads:
        found = f"there are tensors under {', '.join(sorted(map(str, heads)))}"
    return f"{layout.path} has no weights at the top level or under {', '.join(sorted(_MODELS))}; {found}"


# --- client state ----------------------------------------------------------------------------------------


def _beside(layout: Layout, keys: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the client state, nested as it was saved, and a line for everything left out of it."""
    client_state: dict[Any, Any] = {}
    left_out = []
    for key in keys:
        if key in layout.tensors and layout.tensors[key].shape not in ((), (1,)):
            left_out.append(f"{key}: a tensor that is neither the model's nor the optimizer's")
            continue
        try:
            value = plain(layout.number(key) if key in layout.tensors else layout.object(key))
        except TypeError as error:
            left_out.append(f"{key}: {error}, which JSON can't represent")
            continue
        steps = layout.steps[key]
        place = client_state
        for step in steps[:-1]:
            place = place.setdefault(step, {})
        place[steps[-1]] = value
    client_state = {str(name): _lists(value) for name, value in client_state.items()}
    for name in client_state:
        if "sched" in name:
            left_out.append(
                f"{name}: LR schedule of torch, stored only in the client state; the next step uses the "
                "learning rate of the optimizer's groups"
            )
    return client_state, left_out


def _lists(value: Any) -> Any:
    """Return a value with its lists restored; they are saved as dicts by index."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(each) for key, each in value.items()}
    if inner and sorted(inner, key=str) == sorted(range(len(inner)), key=str):
        return [inner[place] for place in range(len(inner))]
    return {str(key): each for key, each in inner.items()}


def _step(client_state: dict[str, Any], optimizer: OptimizerState | None) -> int:
    """Return the number of steps, from the script's counter or else from the optimizer's."""
    for holder in (client_state.get("train_state"), client_state):
        for name in _STEP:
            counted = holder.get(name) if isinstance(holder, dict) else None
            if isinstance(counted, int | float) and counted == int(counted):
                return int(counted)
    numbers = [each["step"] for each in optimizer.scalars.values() if "step" in each] if optimizer else []
    return int(max(numbers, default=0))
