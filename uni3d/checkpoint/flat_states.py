"""Parameters of FSDP1 and their optimizer states, as a save writes them and as a load reads them.

A rank's slice of a parameter is no box of it. A save gathers one unit after the other and keeps even rows of
each tensor in host memory; a load reads the rows that a slice meets, and copies the slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

import ckpt
from parallel import HostComm
from parallel.flat_parameters import FlatSlice, FlatUnit, gathered_problem
from parallel.tensors import modules, named_parameters
from uni3d.checkpoint.optimizer_groups import scalars_of
from uni3d.state import PARAMETER, FlatView, Held, flat_part
from uni3d.stored_model import StoredModel


class FlatTarget(NamedTuple):
    """Rows that a load reads, and the slice that takes its part of them."""

    held: Held
    place: FlatSlice
    live: Tensor


class _States(NamedTuple):
    """States of one parameter, as one rank with elements of it, or without any, has them."""

    rank: int
    holds: bool
    arrays: dict[str, str]
    """State -> type."""
    scalars: dict[str, Any]
    differs: int | None = None
    """Another rank with elements that has other states."""


def gather_flat(model: StoredModel, optimizer: Optimizer | None, comm: HostComm) -> FlatView:
    """Return flat parameters and their states by rows, in host memory. Collective.

    A rank that has no elements of a parameter has no states of it, or has those of its last load: what is
    saved are the states of the ranks that have some.

    Raises:
        ckpt.CheckpointError: a unit shows gathered parameters, ranks have different states, or a state isn't
            one value for each element; the same on all ranks.
    """
    if model.flat is None:
        return FlatView({}, {})
    mine = ckpt.agreed(comm, lambda: _described(model, optimizer, comm.rank))
    everyone = comm.all_reduce(mine, _joined)
    for name, states in everyone.items():
        if states.differs is not None:
            raise ckpt.CheckpointError(
                f"the optimizer has other states or step counts for {name} on rank {states.differs} than on "
                f"rank {states.rank}, though both hold elements of it"
            )
    names = _names(model)
    view = FlatView({}, {})
    for unit in model.flat.units:
        _gather_unit(
            unit, optimizer, {i: everyone[names[id(p)]] for i, p in enumerate(unit.parameters)}, view
        )
    return view


def _gather_unit(
    unit: FlatUnit, optimizer: Optimizer | None, states: Mapping[int, _States], view: FlatView
) -> None:
    parameters = unit.parameters
    here = {index: p.detach() for index, p in enumerate(parameters)}
    for index, tensor in unit.gathered(here, [*here], parameters[0].dtype).items():
        view.values[id(parameters[index])] = tensor
    wanted: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, found in states.items():
        if found.arrays or found.scalars:
            view.states[id(parameters[index])] = dict(found.scalars)
        for key, dtype in found.arrays.items():
            wanted[key, dtype].append(index)
    for (key, dtype), indices in sorted(wanted.items()):
        assert optimizer is not None
        slices = {i: optimizer.state[parameters[i]][key] for i in indices if parameters[i].numel()}
        for index, tensor in unit.gathered(slices, indices, getattr(torch, dtype)).items():
            view.states[id(parameters[index])][key] = tensor


def flat_targets(
    model: StoredModel, optimizer: Optimizer | None, stored: Collection[str]
) -> list[FlatTarget]:
    """Return what this rank reads of flat parameters, and of the states of those that are `stored`. Local.

    Raises:
        ckpt.CheckpointError: a unit shows gathered parameters.
    """
    if model.flat is None:
        return []
    _check_shown(model)
    names, found = _names(model), []
    for parameter, place in model.flat.slices():
        name = names[id(parameter)]
        tensors = {PARAMETER: parameter.detach()}
        if optimizer is not None and name in stored:
            tensors |= dict(_arrays(name, parameter, optimizer))
        for key, live in tensors.items():
            rows = torch.zeros(place.rows[1], dtype=live.dtype)
            place.of(rows).copy_(live)  # stays, if a load that isn't strict finds nothing for it
            found.append(FlatTarget(flat_part(name, key, rows, place), place, live))
    return found


def finish_flat(model: StoredModel, targets: Collection[FlatTarget]) -> None:
    """Copy what was read to the slices. Local."""
    for target in targets:
        target.live.copy_(target.place.of(target.held.tensor))
    for unit in () if model.flat is None else model.flat.units:
        unit.forget_whole()


def _names(model: StoredModel) -> dict[int, str]:
    return {id(p): model.first_name(n) for n, p in named_parameters(model.module)}


def _check_shown(model: StoredModel) -> None:
    for prefix, part in modules(model.module):
        if isinstance(part, FullyShardedDataParallel) and (problem := gathered_problem(prefix, part)):
            raise ckpt.CheckpointError(problem)


def _arrays(name: str, parameter: Tensor, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.ndim:
            if value.shape != parameter.shape:
                raise ckpt.CheckpointError(
                    f"the optimizer's {key!r} of {name} has the shape {list(value.shape)}, but "
                    f"FullyShardedDataParallel gives a rank {list(parameter.shape)} elements in a row: only "
                    "states with a value for each element can be saved; use fully_shard (FSDP2)"
                )
            yield key, value


def _described(model: StoredModel, optimizer: Optimizer | None, rank: int) -> dict[str, _States]:
    assert model.flat is not None
    _check_shown(model)
    names = _names(model)
    found = {}
    for unit in model.flat.units:
        for parameter in unit.parameters:
            name = names[id(parameter)]
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            types = {} if optimizer is None else dict(_arrays(name, parameter, optimizer))
            dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in types.items()}
            rest = {key: value for key, value in state.items() if key not in types}
            found[name] = _States(rank, parameter.numel() > 0, dtypes, rest)
    counts = scalars_of({name: states.scalars for name, states in found.items()})
    return {name: states._replace(scalars=counts[name]) for name, states in found.items()}


def _joined(parts: list[dict[str, _States]]) -> dict[str, _States]:
    found: dict[str, _States] = {}
    for part in parts:
        for name, states in part.items():
            known = found.setdefault(name, states)
            if known is states or not states.holds:
                continue
            if not known.holds:
                found[name] = states
            elif states.differs is not None and known.differs is None:
                found[name] = known._replace(differs=states.differs)
            elif (states.arrays, states.scalars) != (known.arrays, known.scalars) and known.differs is None:
                found[name] = known._replace(differs=states.rank)
    return found
