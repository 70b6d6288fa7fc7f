"""Extra state: what modules and optimizers keep besides parameters, buffers and states by parameter.

A module's is what `get_extra_state` returns, an optimizer's what its `state_dict` has besides `param_groups`
and the states of parameters; that of a script's further object is its `state_dict`. All are values of JSON
with tensors in them. The manifest holds the values,
with null in each tensor's place; the tensors are arrays. Ranks with the same modules must have the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

import ckpt
from ckpt import CheckpointError, check_json
from parallel.tensors import modules
from uni3d.checkpoint.several import OptimizerSet, type_of
from uni3d.manifest import EXTRA_STATE, OPTIMIZER_ATOM
from uni3d.state import array_key as key_of
from uni3d.stored_model import StoredModel

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
"""Types of tensors that are stored; others mean something that the numbers don't show."""


class ExtraRecord(NamedTuple):
    """One extra state in a manifest."""

    value: Any
    """The value, with None in the place of each tensor."""
    tensors: Mapping[str, str]
    """Place of each tensor in the value, a JSON pointer -> the type of its device."""

    @classmethod
    def of(cls, document: dict[str, Any], name: str) -> ExtraRecord:
        """Read the manifest's record of an extra state.

        Raises:
            CheckpointError: it has another form.
        """
        if "value" not in document or not isinstance(document.get("tensors"), dict):
            raise CheckpointError(f"the manifest's {name} has no 'value' or no 'tensors'; use another tag")
        return cls(document["value"], document["tensors"])


class Extra(NamedTuple):
    """One extra state, taken apart."""

    value: Any
    """The value, with None in the place of each tensor."""
    tensors: dict[str, Tensor]
    """Tensors by their place in the value, a JSON pointer."""

    def record(self) -> dict[str, Any]:
        """Return the manifest's record."""
        return {"value": self.value, "tensors": {place: t.device.type for place, t in self.tensors.items()}}

    def arrays(self, atom: str) -> dict[ckpt.ArrayKey, Tensor]:
        """Return the tensors by the names of their arrays."""
        return {array_key(atom, place): tensor for place, tensor in self.tensors.items()}

    def digest(self) -> bytes:
        """Return a checksum of the value and the tensors."""
        summed = blake2b(json.dumps(self.value, sort_keys=True).encode(), digest_size=16)
        for place, tensor in self.tensors.items():
            summed.update(f"{place} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            flat = tensor.cpu().contiguous().reshape(-1)
            summed.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return summed.digest()


def array_key(atom: str, place: str) -> ckpt.ArrayKey:
    """Return the name of the array of a tensor at a place of an extra state."""
    return key_of(atom, EXTRA_STATE + place)


OBJECT = ".object."
"""First part of the names of states of further objects, which no module can have."""


def shown(name: str) -> str:
    """Return the name of a module's or an object's state for messages and reports."""
    return f"objects[{name.removeprefix(OBJECT)!r}]" if name.startswith(OBJECT) else name


# --- modules ---------------------------------------------------------------------------------------------


def modules_with_extra(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have an extra state, by the names of torch's `state_dict`, each once."""
    return {f"{prefix}_extra_state": m for prefix, m in modules(model) if _overrides(m, "get_extra_state")}


def of_modules(model: nn.Module) -> dict[str, Extra]:
    """Return the extra states of a model's modules, by the names of torch's `state_dict`.

    Raises:
        CheckpointError: one can't be stored, or its module couldn't take it back.
    """
    found = {}
    for name, module in modules_with_extra(model).items():
        if not _overrides(module, "set_extra_state"):
            raise CheckpointError(
                f"{name} couldn't be restored: {type(module).__name__} has no set_extra_state, only "
                "get_extra_state"
            )
        found[name] = taken_apart(module.get_extra_state(), name)
    return found


def check_nothing_is_lost(model: nn.Module) -> None:
    """Check that a model's `state_dict` has nothing that a checkpoint lacks, as hooks may add.

    Raises:
        CheckpointError: it has; names it.
    """
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    # First: it reshards what a forward alone left whole. FSDP1's gathers everything, so that isn't asked for.
    full = _own_entries(model) if wrapped else model.state_dict(keep_vars=True)
    known = {id(t) for t in (*model.parameters(), *model.buffers())}
    lost = [name for name, t in full.items() if id(t) not in known and not name.endswith("_extra_state")]
    if lost:
        raise CheckpointError(
            f"{type(model).__name__}.state_dict() has {', '.join(lost[:5])}, which a checkpoint wouldn't "
            "keep: it keeps parameters, buffers, and what get_extra_state returns"
        )


def _own_entries(model: nn.Module) -> dict[str, Any]:
    """Return what the modules themselves put into a `state_dict`, with their hooks, but without FSDP1's."""
    found: dict[str, Any] = {}
    for prefix, module in modules(model):
        if not isinstance(module, FullyShardedDataParallel):
            own: dict[str, Any] = {}
            module._save_to_state_dict(own, prefix, keep_vars=True)
            for hook in module._state_dict_hooks.values():
                hook(module, own, prefix, {})
            found |= own
    return found


def check_in_layers(model: nn.Module) -> None:
    """Check that pipeline stages keep every module that has an extra state.

    Raises:
        ValueError: one belongs to no layer.
    """
    layers = getattr(model, "pipeline_layers", None)
    if layers is None:
        return
    prefixes = tuple(f"{layer}." for layer in layers)
    for name, module in modules_with_extra(model).items():
        if not name.startswith(prefixes):
            raise ValueError(
                f"{type(module).__name__} has an extra state ({name}), but is in none of the "
                "pipeline_layers, and pipeline stages keep only these; move get_extra_state to a layer"
            )


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(getattr(module, method), "__func__", None) is not getattr(nn.Module, method)


# --- optimizers ------------------------------------------------------------------------------------------


def of_optimizer(optimizer: Optimizer) -> Extra:
    """Return the optimizer's extra state, taken apart.

    Raises:
        CheckpointError: a part can't be stored.
    """
    return taken_apart(current_extra(optimizer), f"{type_of(optimizer)}.state_dict()")


def current_extra(optimizer: Optimizer) -> dict[str, Any]:
    """Return further keys of the optimizer's `state_dict`, and as `state` what it keeps under strings.

    Of several optimizers, these by the names of those that have any.

    Raises:
        CheckpointError: it keeps states under other keys, which can't be stored.
    """
    if isinstance(optimizer, OptimizerSet):
        found = {name: current_extra(member) for name, member in optimizer.members.items()}
        return {name: extra for name, extra in found.items() if extra}
    name = type(optimizer).__name__
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = {key: value for key, value in optimizer.state.items() if id(key) not in known}
    for key in others:
        if not isinstance(key, str):
            what = f"a tensor of shape {list(key.shape)}" if isinstance(key, Tensor) else f"the key {key!r}"
            raise CheckpointError(
                f"{name}.state has {what}, which is no parameter of the optimizer: a checkpoint keeps "
                "states of parameters and those under strings"
            )
    return _further_keys(optimizer) | ({"state": others} if others else {})


def takes(optimizer: Optimizer) -> bool:
    """Return whether `load_state_dict` does more than torch's own."""
    hooks = (optimizer._optimizer_load_state_dict_pre_hooks, optimizer._optimizer_load_state_dict_post_hooks)
    return _is_own(optimizer, "load_state_dict") or any(hooks)


def restore_optimizer_extra(optimizer: Optimizer, value: Mapping[str, Any]) -> None:
    """Give the optimizer an extra state; its states of parameters stay the tensors that they are."""
    if isinstance(optimizer, OptimizerSet):
        for name, member in optimizer.members.items():
            restore_optimizer_extra(member, value.get(name, {}))
        return
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key in [key for key in optimizer.state if id(key) not in mine]:
        del optimizer.state[key]
    optimizer.state.update(copy.copy(value.get("state", {})))
    further = {key: item for key, item in value.items() if key != "state"}
    if not further:
        return
    before = {p: dict(state) for p, state in optimizer.state.items() if id(p) in mine}
    optimizer.load_state_dict({**optimizer.state_dict(), **further})
    for parameter, state in before.items():  # torch has cast some to the parameter's type
        optimizer.state[parameter].update(state)


def _further_keys(optimizer: Optimizer) -> dict[str, Any]:
    """Return the keys of the optimizer's `state_dict` that torch's own lacks."""
    hooks = (optimizer._optimizer_state_dict_pre_hooks, optimizer._optimizer_state_dict_post_hooks)
    if not _is_own(optimizer, "state_dict") and not any(hooks):
        return {}
    name, full = type(optimizer).__name__, optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in full["state"].items():
        own = optimizer.state.get(parameters[index], {}) if isinstance(index, int) else None
        if own is not None and state.keys() - own.keys():
            raise CheckpointError(
                f"{name}.state_dict() adds {', '.join(sorted(state.keys() - own.keys()))} to the state of a "
                "parameter; keep it in the optimizer's state, or under a key of its own"
            )
    return {key: value for key, value in full.items() if key not in ("state", "param_groups")}


def _is_own(optimizer: Optimizer, method: str) -> bool:
    return method in vars(optimizer) or getattr(type(optimizer), method) is not getattr(Optimizer, method)


# --- values ----------------------------------------------------------------------------------------------


def put_together(record: ExtraRecord, tensor_at: Callable[[str], Tensor]) -> Any:
    """Return the value of an extra state with its tensors, given a function of their places."""
    holder = {"": copy.deepcopy(record.value)}
    for place in record.tensors:
        owner: Any = holder
        *path, last = [part.replace("~1", "/").replace("~0", "~") for part in place.split("/")]
        try:
            for part in path:
                owner = owner[int(part) if isinstance(owner, list) else part]
            owner[int(last) if isinstance(owner, list) else last] = tensor_at(place)
        except (LookupError, TypeError, ValueError):
            raise CheckpointError(
                f"an extra state has no place {place!r}, where a tensor belongs; use another tag"
            ) from None
    return holder[""]


def taken_apart(value: Any, name: str) -> Extra:
    """Take an extra state apart; `name` is its name in messages.

    Raises:
        CheckpointError: it holds something that is neither of JSON nor a plain tensor.
    """
    tensors: dict[str, Tensor] = {}

    def walk(item: Any, place: str) -> Any:
        if isinstance(item, Tensor):
            if type(item) not in _PLAIN or item.layout != torch.strided or item.is_meta:
                raise CheckpointError(
                    f"{name}{place} is a {type(item).__name__} ({item.layout}, {item.device}); an extra "
                    "state keeps plain tensors: sharded ones belong in parameters, or in the optimizer's "
                    "states of them"
                )
            tensors[place] = item.detach() if item.requires_grad else item
            return None
        if isinstance(item, dict):
            check_json(dict.fromkeys(item), name + place)
            parts = {key: key.replace("~", "~0").replace("/", "~1") for key in item}
            return {key: walk(part, f"{place}/{parts[key]}") for key, part in item.items()}
        if isinstance(item, list):
            return [walk(part, f"{place}/{i}") for i, part in enumerate(item)]
        check_json(item, name + place)
        return item

    return Extra(walk(value, ""), tensors)


class ExtraStates(NamedTuple):
    """Extra states of a rank's modules, of its optimizer and of further objects."""

    modules: dict[str, Extra]
    optimizer: Extra | None
    objects: dict[str, Extra]
    """The same on all pipeline stages."""

    def arrays(self, stage: int) -> dict[ckpt.ArrayKey, Tensor]:
        """Return the tensors that a rank of this pipeline stage saves, by the names of their arrays."""
        found: dict[ckpt.ArrayKey, Tensor] = {}
        for name, extra in self.modules.items():
            found |= extra.arrays(name)
        if stage == 0:
            for name, extra in self.objects.items():
                found |= extra.arrays(name)
        if self.optimizer is not None and stage == 0:  # the same on all stages
            found |= self.optimizer.arrays(OPTIMIZER_ATOM)
        return found

    def digests(self, stage: int) -> dict[tuple[str, int], bytes]:
        """Return a digest of each, for `check_alike`. The optimizer's is that of all pipeline stages."""
        found = {(name, stage): extra.digest() for name, extra in self.modules.items()}
        found |= {(shown(name), 0): extra.digest() for name, extra in self.objects.items()}
        if self.optimizer is not None:
            found["the optimizer's extra state", 0] = self.optimizer.digest()
        return found


def extra_states(model: StoredModel, optimizer: Optimizer | None, objects: Mapping[str, Any]) -> ExtraStates:
    """Return this rank's extra states.

    Raises:
        CheckpointError: one can't be stored.
    """
    modules = {model.first_name(name): extra for name, extra in of_modules(model.module).items()}
    further = {
        f"{OBJECT}{name}": taken_apart(item.state_dict(), f"objects[{name!r}] ({type(item).__name__}): state")
        for name, item in objects.items()
    }
    return ExtraStates(modules, None if optimizer is None else of_optimizer(optimizer), further)


Digests = tuple[tuple[tuple[str, int], bytes], ...]
"""Digests of a rank's extra states, by name and stage."""


def check_alike(found: Mapping[int, Digests]) -> None:
    """Check that ranks which have the same modules have the same extra states, given ranks' digests.

    Raises:
        CheckpointError: two ranks differ; names the first such state.
    """
    first: dict[tuple[str, int], tuple[int, bytes]] = {}
    for rank, digests in found.items():
        for key, digest in digests:
            other, expected = first.setdefault(key, (rank, digest))
            if digest != expected:
                raise CheckpointError(
                    f"{key[0]} differs between ranks {other} and {rank}, and a checkpoint keeps one for all: "
                    "make it the same on all ranks before saving, or leave it out"
                )
