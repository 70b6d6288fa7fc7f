"""Reader of torch's distributed checkpoint (DCP): the meaning of its names.

A script saves a nested dict of its own making. These usual forms are recognized:

    {"model": ..., "optim": ...}            by `torch.distributed.checkpoint.state_dict.get_state_dict`, or by
                                            FSDP's own functions; also below one more key, e.g. "app" for a
                                            stateful wrapper class
    {<parameter>: ..., "optimizer": ...}    torchtitan's, whose weights have no key of their own
    {<parameter>: ...}                      weights alone, with or without a key

Everything else becomes the client state if JSON can represent it.

The same rules hold for a state_dict that `uni3d.dcp` saves.

Modules:
    names       each name's purpose
    layout      the metadata file: each tensor's shape, dtype and pieces in the data files
    optimizer   optimizer states and parameter groups, by parameter name
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ckpt import DTYPES
from uni3d.importers.dcp.layout import Layout
from uni3d.importers.dcp.names import Content, SortedNames, sort_names
from uni3d.importers.dcp.optimizer import read_optimizer
from uni3d.importers.pickles import plain
from uni3d.importers.source import PARAMETER, ForeignArray, OptimizerState, Options, Source
from uni3d.importers.state_dicts import array_of

_STEP = ("step", "global_step", "global_steps", "iteration")
"""Keys under which scripts save the number of steps."""


def read_dcp(path: Path, options: Options) -> Source:
    """Read the model and its optimizer from a DCP folder."""
    layout = Layout(path, options)
    names = sort_names(layout)
    source = source_of(layout, names, options)
    return replace(source, left_out=layout.left_out, files=layout.files)


def source_of(content: Content, names: SortedNames, options: Options) -> Source:
    """Return what a state_dict means, given its names by purpose.

    The origin of each array is its flat name.
    """
    moments: list[ForeignArray] = []
    optimizer: OptimizerState | None = None
    if names.states and not options.weights_only:
        moments, optimizer = read_optimizer(content, names.states, names.weights)
    elif names.states:
        content.note("optimizer state: --weights-only")
    grouped = {name for group in optimizer.groups for name in group["params"]} if optimizer else set()
    arrays = []
    for name, key in names.weights.items():
        if content.tensors[key].dtype in DTYPES:
            arrays.append(_weight(content, name, key, options, trained=name in grouped))
        else:
            content.leave_out(key, f"its type {content.tensors[key].dtype} can't be stored")
    weights = [a for a in arrays if a.state == PARAMETER]
    aliases = {} if options.untie else _tied(content, names.weights, weights, grouped)
    for alias, first in aliases.items():
        content.note(
            f"{names.weights[alias]}: has the same values as {first}, so they are taken to be tied (use "
            "--untie if they aren't)"
        )
    arrays = [array for array in arrays if array.name not in aliases]
    client_state = _beside(content, names.beside)
    parameters = {array.name for array in arrays if array.state == PARAMETER}
    return Source(
        kind="dcp",
        where=content.where,
        arrays=[*arrays, *moments],
        frozen=frozenset(parameters - grouped) if optimizer else frozenset(),
        aliases=aliases,
        optimizer=optimizer,
        step=counted_steps(client_state, optimizer) or 0,
        client_state=client_state,
    )


def _weight(content: Content, name: str, key: str, options: Options, *, trained: bool) -> ForeignArray:
    held, read = content.tensors[key], partial(content.read, key)
    array = array_of(name, held.dtype, held.shape, read, options, key)
    array = replace(array, read_part=partial(content.read_part, key))
    return replace(array, state=PARAMETER, dtype="float32") if trained else array


def _tied(
    content: Content, keys: Mapping[str, str], parameters: list[ForeignArray], trained: set[str]
) -> dict[str, str]:
    """Map the further names of tied weights to the names that are kept.

    DCP stores a tied weight under each of its names, but its optimizer states under only one. So a weight
    without states is taken for an alias of one that has states if the content says that they are one.
    Without an optimizer, nothing tells a tied weight from a copy.
    """
    alike: dict[Any, list[str]] = {}
    for array in parameters:
        tensor = content.tensors[keys[array.name]]
        alike.setdefault((tensor.dtype, tensor.shape), []).append(array.name)
    aliases: dict[str, str] = {}
    for names in alike.values():
        owners = [name for name in names if name in trained]
        for name in (each for each in names if each not in trained and owners):
            for owner in owners:
                if content.tied(keys[name], keys[owner]):
                    aliases[name] = owner
                    break
    return aliases


# --- client state ----------------------------------------------------------------------------------------


def _beside(content: Content, keys: list[str]) -> dict[str, Any]:
    """Return the client state, nested as it was saved."""
    client_state: dict[Any, Any] = {}
    for key in keys:
        if key in content.tensors and not is_number(content.tensors[key].shape):
            content.leave_out(key, "a tensor that is neither the model's nor the optimizer's")
            continue
        try:
            value = plain(content.number(key) if key in content.tensors else content.object(key))
        except TypeError as error:
            content.leave_out(key, f"{error}, which JSON can't represent")
            continue
        steps = content.steps[key]
        place = client_state
        for step in steps[:-1]:
            place = place.setdefault(step, {})
        place[steps[-1]] = value
    client_state = {str(name): _lists(value) for name, value in client_state.items()}
    for name in client_state:
        if "sched" in name:
            content.note(
                f"{name}: LR schedule of torch, stored only in the client state; the next step uses the "
                "learning rate of the optimizer's groups"
            )
    return client_state


def is_number(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor beside model and optimizer is stored as a number."""
    return shape in ((), (1,))


def _lists(value: Any) -> Any:
    """Return a value with its lists restored; they are saved as dicts by index."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(each) for key, each in value.items()}
    if inner and sorted(inner, key=str) == sorted(range(len(inner)), key=str):
        return [inner[place] for place in range(len(inner))]
    return {str(key): each for key, each in inner.items()}


def counted_steps(client_state: Mapping[str, Any], optimizer: OptimizerState | None) -> int | None:
    """Return the number of steps by the script's counter, or else by the optimizer's; None without one."""
    for holder in (client_state.get("train_state"), client_state):
        for name in _STEP:
            counted = holder.get(name) if isinstance(holder, Mapping) else None
            if isinstance(counted, int | float) and counted == int(counted):
                return int(counted)
    numbers = [each["step"] for each in optimizer.scalars.values() if "step" in each] if optimizer else []
    return int(max(numbers)) if numbers else None
