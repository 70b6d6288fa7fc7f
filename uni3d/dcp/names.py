"""Names of a state_dict that a checkpoint can fill, and what is stored for each.

A checkpoint that `uni3d.dcp` saved has the names of its own state_dict. Besides, a name is understood by the
rules of `uni3d.importers.dcp`, as the script that loads may nest its state_dict in another way, and an engine
that saved knows of no such names: the model below `model` or by itself, its optimizer below `optim` or
`optimizer`, with groups or by parameter, all of it also below one more key; everything else is looked for in
the client state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ckpt
from ckpt import Checkpoint, CheckpointError
from ckpt.read import WEIGHT_STATES
from uni3d.dcp.arrays import key_beside
from uni3d.dcp.form import StateDictForm, flat_name
from uni3d.dcp.values import Kinds
from uni3d.importers.dcp.names import MODELS, OPTIMIZERS, Steps
from uni3d.manifest import RunManifest, is_extra
from uni3d.resume_rules import IMPLEMENTATION_KEYS

_OWN = IMPLEMENTATION_KEYS - {"params"}


class StoredValue(NamedTuple):
    """A value of the manifest."""

    value: Any
    kinds: Kinds


class KeptValue(NamedTuple):
    """A value that isn't stored, because it doesn't change a step: the loading script's own is kept."""


class StoredBytes(NamedTuple):
    """Bytes, stored as an array."""

    key: ckpt.ArrayKey


Stored = ckpt.ArrayKey | StoredBytes | StoredValue | KeptValue


class StoredNames:
    """The names that a checkpoint can fill.

    Attributes:
        own: the names of the state_dict that was saved, each with its path and what is stored. For the
            checkpoint of an engine, those of `{"model": ..., "optim": ...}` and the client state.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read the manifest.

        Raises:
            CheckpointError: it is damaged.
        """
        self._where = checkpoint.url
        manifest = RunManifest.of(checkpoint)
        self._client = manifest.client_state
        self._groups = manifest.optimizer.groups if manifest.optimizer else []
        self._home = {name: group for group in self._groups for name in group["params"]}
        self._scalars = manifest.optimizer.scalars if manifest.optimizer else {}
        self._weights: dict[str, ckpt.ArrayKey] = {}
        self._moments: dict[str, dict[str, ckpt.ArrayKey]] = {}
        self._apart: set[ckpt.ArrayKey] = set()
        for key in checkpoint.arrays:
            if is_extra(key.state):
                self._apart.add(key)
            elif key.state in WEIGHT_STATES:
                self._weights[key.atom] = key
            else:
                self._moments.setdefault(key.atom, {})[key.state] = key
        for alias, first in manifest.aliases.items():
            if first in self._weights:
                self._weights[alias] = self._weights[first]
        self._form = StateDictForm(optimizer=("optim",) if manifest.optimizer else None)
        beside: list[Steps] = [(name,) for name in self._client]
        self._recorded = manifest.dcp is not None
        if manifest.dcp is not None:
            self._form = StateDictForm.of(manifest.dcp, self._where)
            beside = self._form.beside
        self._used: dict[str, Steps] = {}  # paths of model and optimizer in the names that were asked for
        self.own: dict[str, tuple[Steps, Stored]] = {}
        for path in (*self._in_model(), *self._in_optimizer(), *beside):
            here = self._stored(path)
            if here is not None:
                self.own[flat_name(path)] = path, here

    def find(self, name: str) -> Stored | None:
        """Return what is stored for a name of the loading script's state_dict; None if nothing is.

        Raises:
            CheckpointError: the name has two meanings, or names of a second model or optimizer came before.
        """
        if name in self.own:
            path, known = self.own[name]
            self._use(self._part(path), name)
            return known
        found: list[tuple[str, Steps, Stored]] = []
        parts = name.split(".")
        for n in range(3):
            top, rest = tuple(parts[:n]), ".".join(parts[n:])
            if (n == 0 or top[-1] in MODELS) and rest in self._weights:
                found.append(("model", top, self._weights[rest]))
            elif n and top[-1] in OPTIMIZERS:
                stored = self._state(rest, name)
                if stored is not None:
                    found.append(("optimizer", top, stored))
        if len({stored for _, _, stored in found if isinstance(stored, ckpt.ArrayKey)}) > 1:
            options = " or ".join(stored.atom for _, _, stored in found if isinstance(stored, ckpt.ArrayKey))
            raise CheckpointError(f"{name} may be {options} of {self._where}; rename the state_dict's key")
        if not found:
            return self._in_client(self._client, parts)
        what, head, meaning = found[-1]
        self._use((what, head), name)
        return meaning

    def _use(self, part: tuple[str, Steps] | None, name: str) -> None:
        """Note the path of the model or the optimizer that a name is of; raise if it is a second one."""
        if part is None:
            return
        what, path = part
        first = self._used.setdefault(what, path)
        if first != path:
            raise CheckpointError(
                f"{name}: the state_dict has two {what}s, below {flat_name(first) or 'no key'} and below "
                f"{flat_name(path) or 'no key'}, but {self._where} has one; load them one after the other"
            )

    # --- names of the saved state_dict -------------------------------------------------------------------

    def _in_model(self) -> Iterator[Steps]:
        return ((*self._form.model, name) for name in self._weights)

    def _in_optimizer(self) -> Iterator[Steps]:
        if self._form.optimizer is None:
            return
        top: Steps = self._form.optimizer
        for name in dict.fromkeys([*self._moments, *self._scalars]):
            for state in (*self._moments.get(name, {}), *self._scalars.get(name, {})):
                yield (*top, f"state.{name}.{state}") if self._form.flat else (*top, "state", name, state)
        for i, group in enumerate(self._groups):
            for key in group:
                if not self._form.flat:
                    yield (*top, "param_groups", i, key)
                elif key != "params":
                    yield from ((*top, f"param_groups.{name}.{key}") for name in group["params"])

    def _part(self, path: Steps) -> tuple[str, Steps] | None:
        """Return which of model and optimizer a path of the saved state_dict is of, and the path of that."""
        model, optimizer = self._form.model, self._form.optimizer
        if optimizer is not None and path[: len(optimizer)] == optimizer and len(path) > len(optimizer):
            return "optimizer", optimizer
        of_model = path[: len(model)] == model and flat_name(path[len(model) :]) in self._weights
        return ("model", model) if of_model else None

    def _stored(self, path: Steps) -> Stored | None:
        """Return what is stored for a path of the saved state_dict."""
        name, part = flat_name(path), self._part(path)
        if part is not None:
            rest = flat_name(path[len(part[1]) :])
            return self._state(rest, name) if part[0] == "optimizer" else self._weights[rest]
        key, kinds = key_beside(path), self._form.kinds_of(name, optimizer=False)
        if key in self._apart:
            return StoredBytes(key) if kinds.get("") == "bytes" else key
        found = self._in_client(self._client, [str(step) for step in path])
        return found._replace(kinds=kinds) if isinstance(found, StoredValue) else found

    # --- meanings ----------------------------------------------------------------------------------------

    def _state(self, rest: str, name: str) -> Stored | None:
        """Return what is stored for a name below the optimizer's key."""
        kind, _, rest = rest.partition(".")
        kinds = self._form.kinds_of(name, optimizer=True)
        owner, key = rest, ""
        if kind == "state":
            while owner:
                owner, _, _ = owner.rpartition(".")
                key = rest[len(owner) + 1 :]
                if key in self._moments.get(owner, {}):
                    return self._moments[owner][key]
                if key in self._scalars.get(owner, {}):
                    return StoredValue(self._scalars[owner][key], kinds)
        elif kind == "param_groups":
            group, key = self._group(rest)
            if group is not None and key in group:
                return StoredValue(group[key], kinds)
            if group is not None and key in _OWN:
                return KeptValue()
        return None

    def _group(self, rest: str) -> tuple[Mapping[str, Any] | None, str]:
        """Return the group that a hyperparameter's name is of, and its key there."""
        number, _, key = rest.partition(".")
        owner, _, own_key = rest.rpartition(".")
        by_parameter = self._home.get(owner)
        if not number.isdecimal() or "." in key or int(number) >= len(self._groups):
            return by_parameter, own_key
        by_number = self._groups[int(number)]
        if by_parameter is None or by_parameter is by_number:
            return by_number, key
        if not self._recorded:  # a parameter may be named 0
            raise CheckpointError(
                f"param_groups.{rest} may be of group {number} or of the parameter {owner!r} of "
                f"{self._where}; name the parameters in another way"
            )
        return (by_parameter if self._form.flat else by_number), key

    def _in_client(self, place: Any, parts: list[str]) -> StoredValue | None:
        """Return the value of the client state at a flat name, whose keys may have dots."""
        if not parts:
            return StoredValue(place, {})
        for n in range(1, len(parts) + 1):
            step = ".".join(parts[:n])
            if isinstance(place, Mapping) and step in place:
                found = self._in_client(place[step], parts[n:])
            elif isinstance(place, list) and step.isdecimal() and int(step) < len(place):
                found = self._in_client(place[int(step)], parts[n:])
            else:
                continue
            if found is not None:
                return found
        return None
