"""Changes to parameters that sharding would lose: carried over or refused.

A parameter has two tensors, the sharded one and the whole one, of which the module shows one at a time. What
is done to the one that is about to be put away would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.fsdp_internals import group_of, on_whole, parameters_of, part_of_whole


class _Watched:
    """A parameter, and what is known of the whole one."""

    __slots__ = ("address", "label", "mine", "name", "plain", "record", "shown", "version")

    def __init__(self, record: Any) -> None:
        """Watch the parameter that fully_shard's `record` is of."""
        self.record = record
        self.shown: dict[str, nn.Parameter | None] = record._module_info.module._parameters
        self.name: str = record._module_info.param_name
        self.label = self.name
        """Name in the root, once `ParameterWatch.start` knows it."""
        self.version = self.address = 0
        self.plain = True
        self.mine: Tensor | None = None
        """This rank's part of the whole one, and the memory that is gathered into it."""

    @property
    def replaced(self) -> bool:
        """True if the module shows neither of the parameter's two tensors."""
        shown, record = self.shown.get(self.name), self.record
        return shown is not record.sharded_param and shown is not getattr(record, "_unsharded_param", None)

    def note(self, whole: nn.Parameter) -> None:
        """Note the state of the whole parameter, of which later writes are noticed."""
        whole._sharded = self.record.sharded_param  # type: ignore[attr-defined]  # see `sharded_of`
        refuse: Any = partial(_refuse_hook, self.label)
        whole.register_post_accumulate_grad_hook = refuse  # type: ignore[method-assign]
        self.version, self.address = whole._version, whole.data_ptr()
        self.plain = not isinstance(whole, DTensor)
        self.mine = None

    @property
    def moved(self) -> bool:
        """True if the whole parameter was given other memory, by `p.data = t`."""
        record = self.record
        return self.plain and record._unsharded_param.data_ptr() != record.all_gather_outputs[0].data_ptr()

    def move_back(self) -> None:
        """Copy what the whole parameter holds into the memory that it had, and give it that memory."""
        whole, memory = self.record._unsharded_param, self.record.all_gather_outputs[0]
        whole.data = torch.as_strided(memory, whole.shape, whole.stride(), 0).copy_(whole.data)


class ParameterWatch:
    """Watch over the parameters of sharded modules.

    It looks at each of them in each step, so its loops call as few functions as they can.
    """

    def __init__(self, modules: Sequence[FSDPModule], *, in_place: bool) -> None:
        """Watch `modules`, the first of which is the root.

        With `in_place`, writes aren't lost, as both tensors of a parameter share their memory.
        """
        self._root: Any = modules[0]
        self._in_place = in_place
        self._groups: dict[int, list[_Watched]] = {}
        for module in modules:
            watched = [_Watched(record) for record in parameters_of(module)]
            self._groups[id(group_of(module))] = watched
            for each in watched:
                on_whole(each.record, each.note)

    def start(self) -> None:
        """Refuse from now on gradient hooks that would never be called, or see one rank's gradient alone."""
        prefixes = {
            id(m._parameters): f"{prefix}." if prefix else "" for prefix, m in self._root.named_modules()
        }
        for watched in (each for group in self._groups.values() for each in group):
            watched.label = prefixes[id(watched.shown)] + watched.name
            sharded, refuse = watched.record.sharded_param, partial(_refuse_hook, watched.label)
            sharded.register_hook = sharded.register_post_accumulate_grad_hook = refuse

    def before_gather(self) -> None:
        """Look at the sharded parameters before whole ones take their place in the modules.

        Raises:
            RuntimeError: one was replaced.
        """
        for group in self._groups.values():
            for watched in group:
                shown, name, sharded = watched.shown, watched.name, watched.record.sharded_param
                if (name not in shown or shown[name] is not sharded) and watched.replaced:
                    raise RuntimeError(_replaced(watched))

    def before_reshard(self, group: Any) -> None:
        """Look at a group's whole parameters before they are put away; `requires_grad` is carried over.

        Raises:
            RuntimeError: one was replaced or written to.
        """
        if not group.is_unsharded:
            return
        for watched in self._groups[id(group)]:
            record, shown, name = watched.record, watched.shown, watched.name
            whole, sharded = record._unsharded_param, record.sharded_param
            if (name not in shown or shown[name] is not whole) and watched.replaced:
                raise RuntimeError(_replaced(watched))
            if whole.requires_grad != sharded.requires_grad:
                sharded.requires_grad_(whole.requires_grad)
            if self._in_place:
                written = watched.plain and whole.data_ptr() != watched.address
            else:
                written = watched.moved or whole._version != watched.version
            if written:
                watched.note(whole)
                raise RuntimeError(
                    f"{watched.label} was written to while its whole value was gathered, so the change "
                    "would be lost; write to parameters between engine.step() and the next forward pass, and "
                    "not in forward()"
                )

    @torch.no_grad()
    def carry(self, group: Any) -> None:
        """Carry what was written to a group's whole parameters between two steps over to the sharded ones.

        Each rank takes its own part: all must have written the same. In fp32 the parts are copied whether
        they were written to or not, as torch doesn't tell of writes through `p.data`. In a lower precision
        only those that differ are, and the masters of the others keep their precision.

        Raises:
            RuntimeError: one was replaced.
        """
        sharded: list[Tensor] = []
        parts: list[Tensor] = []
        for watched in self._groups[id(group)]:
            record, shown, name = watched.record, watched.shown, watched.name
            whole = record._unsharded_param
            if (name not in shown or shown[name] is not whole) and watched.replaced:
                raise RuntimeError(_replaced(watched))
            if whole.requires_grad != record.sharded_param.requires_grad:
                record.sharded_param.requires_grad_(whole.requires_grad)
            if self._in_place:
                if watched.plain and whole.data_ptr() != watched.address:
                    watched.move_back()
                continue
            if watched.moved:
                watched.move_back()
            if watched.mine is None:
                watched.mine = part_of_whole(record)
            watched.version = whole._version
            sharded.append(record.sharded_param._local_tensor)
            parts.append(watched.mine)
        if parts and parts[0].dtype == sharded[0].dtype:  # a group has one type of each
            torch._foreach_copy_(sharded, parts)
            return
        for master, part in zip(sharded, parts, strict=True):
            torch.where(master.to(part.dtype) == part, master, part, out=master)


def _replaced(watched: _Watched) -> str:
    return (
        f"{watched.label} was replaced after initialize(), which sharding would undo; change its values "
        "instead, by copy_(), or replace it before initialize()"
    )


def _refuse_hook(name: str, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"{name} got a gradient hook after initialize(), which would never be called, or see one rank's "
        "gradient alone; register hooks on the model's parameters before initialize()"
    )
