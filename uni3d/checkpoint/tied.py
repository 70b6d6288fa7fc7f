"""Weights that are tied in a checkpoint and not in the run, or the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from parallel.tensors import named_parameters
from uni3d.argument_names import ArgumentNames
from uni3d.manifest import RunManifest
from uni3d.state import Held, array_key
from uni3d.stored_model import StoredModel


def tie_refusals(
    model: StoredModel, saved: RunManifest, arguments: ArgumentNames, *, strict: bool, optimizer: bool
) -> Iterator[str]:
    """Yield the reasons why the checkpoint's ties keep this rank from loading it.

    A load of weights alone that isn't strict takes a tied value for both, and of two values the first.
    """
    if not (strict or optimizer):
        return
    lenient = f"{arguments.weights_alone} (and {arguments.lenient})"
    for other, first in untied(model, saved).items():
        yield (
            f"{first} and {other} are one tied weight in the checkpoint, but two in this run: tie them "
            f"before the load; or, to give both its value, {lenient}"
        )
        return
    for other, first in model.ties.items():
        if other in saved.model.requires_grad and first in saved.model.requires_grad:
            yield (
                f"{first} and {other} are one tied weight in this run, but two in the checkpoint: untie them "
                f"before the load; or, to take the value of {first}, {lenient}"
            )
            return


def untied(model: StoredModel, saved: RunManifest) -> dict[str, str]:
    """Return this rank's parameters that are tied in the checkpoint alone, each with its name there."""
    mine = {model.first_name(name) for name, _ in named_parameters(model.module)}
    return {
        other: first
        for other, first in saved.aliases.items()
        if other in mine and model.first_name(first) != other
    }


def as_stored(held: Iterable[Held], names: dict[str, str]) -> list[Held]:
    """Return entries under the names that their arrays have in a checkpoint, given those that differ."""
    found = []
    for entry in held:
        atom, state = entry.spec.key
        key = array_key(names.get(atom, atom), state)
        found.append(entry if key.atom == atom else entry._replace(spec=replace(entry.spec, key=key)))
    return found
