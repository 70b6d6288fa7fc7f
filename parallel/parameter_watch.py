"""Changes to parameters that sharding would lose: carried over or refused.

A parameter has two tensors, the sharded one and the whole one, of which the module shows one at a time. What
is done to the one that is about to be put away would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.fsdp_internals import group_of, on_whole, parameters_of


class _Watched(NamedTuple):
    record: Any
    """fully_shard's record of a parameter."""
    shown: dict[str, nn.Parameter | None]
    """Registry of the module that has the parameter."""
    name: str
    """Its name in the registry."""

    @property
    def replaced(self) -> bool:
        """True if the module shows neither of the parameter's two tensors."""
        shown, record = self.shown.get(self.name), self.record
        return shown is not record.sharded_param and shown is not getattr(record, "_unsharded_param", None)


class ParameterWatch:
    """Watch over the parameters of sharded modules.

    It looks at each of them in each step, so it does little for one that hasn't changed.
    """

    def __init__(self, modules: Sequence[FSDPModule], *, in_place: bool) -> None:
        """Watch `modules`, the first of which is the root.

        With `in_place`, writes aren't lost, as both tensors of a parameter share their memory.
        """
        self._root: Any = modules[0]
        self._in_place = in_place
        self._groups: dict[int, list[_Watched]] = {}
        self._versions: dict[int, int] = {}
        self._hooks: dict[int, int] = {}
        for module in modules:
            places = [(record, record._module_info) for record in parameters_of(module)]
            watched = [_Watched(record, at.module._parameters, at.param_name) for record, at in places]
            self._groups[id(group_of(module))] = watched
            for record, _ in places:
                on_whole(record, partial(self._note_version, id(record)))

    def start(self) -> None:
        """Take the hooks on the sharded parameters for those that belong there."""
        for watched in self._groups.values():
            self._hooks |= {id(w.record): _count_hooks(w.record.sharded_param) for w in watched}

    def before_gather(self) -> None:
        """Look at the sharded parameters before whole ones take their place in the modules.

        Raises:
            RuntimeError: one was replaced, or got a gradient hook.
        """
        for group in self._groups.values():
            for watched in group:
                sharded = watched.record.sharded_param
                if watched.shown.get(watched.name) is not sharded and watched.replaced:
                    raise RuntimeError(self._replaced(watched))
                if _count_hooks(sharded) != self._hooks.get(id(watched.record), 0):
                    raise RuntimeError(
                        f"{self._name(watched)} got a gradient hook after initialize(), which would never be "
                        "called; register hooks on the model's parameters before initialize()"
                    )

    def before_reshard(self, group: Any) -> None:
        """Look at a group's whole parameters before they are freed; `requires_grad` is carried over.

        Raises:
            RuntimeError: one was replaced or written to.
        """
        if not group.is_unsharded:
            return
        for watched in self._groups[id(group)]:
            record = watched.record
            whole, sharded = record._unsharded_param, record.sharded_param
            if watched.shown.get(watched.name) is not whole and watched.replaced:
                raise RuntimeError(self._replaced(watched))
            if whole.requires_grad != sharded.requires_grad:
                sharded.requires_grad_(whole.requires_grad)
            moved = (
                not isinstance(whole, DTensor) and whole.data_ptr() != record.all_gather_outputs[0].data_ptr()
            )
            if moved or (not self._in_place and whole._version != self._versions[id(record)]):
                self._note_version(id(record), whole)
                raise RuntimeError(
                    f"{self._name(watched)} was written to while its whole value was gathered, so the change "
                    "would be lost; write to parameters after engine.step() and before the next forward "
                    "pass, and not in forward()"
                )

    def _note_version(self, record: int, whole: nn.Parameter) -> None:
        self._versions[record] = whole._version

    def _replaced(self, watched: _Watched) -> str:
        return (
            f"{self._name(watched)} was replaced after initialize(), which sharding would undo; change "
            "its values instead, by copy_(), or replace it before initialize()"
        )

    def _name(self, watched: _Watched) -> str:
        names = [name for name, module in self._root.named_modules() if module._parameters is watched.shown]
        return ".".join([*names[:1], watched.name]).removeprefix(".")


def _count_hooks(parameter: nn.Parameter) -> int:
    """Return the number of gradient hooks on the parameter, of both kinds."""
    post = parameter._post_accumulate_grad_hooks
    return len(parameter._backward_hooks or ()) + len(post or ())
