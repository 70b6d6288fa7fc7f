"""Changes to parameters that sharding would lose: carried over or refused.

A parameter has two tensors, the sharded one and the whole one, of which the module shows one at a time. What
is done to the one that is about to be put away would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from parallel.fsdp_internals import on_whole


class ParameterWatch:
    """Watch over fully_shard's records of parameters."""

    def __init__(self, root: nn.Module, records: Sequence[Any], *, in_place: bool) -> None:
        """Watch `records`; with `in_place`, writes aren't lost, as both tensors share their memory."""
        self._root = root
        self._records = records
        self._in_place = in_place
        self._versions: dict[int, int] = {}
        self._hooks: dict[int, int] = {}
        for record in records:
            on_whole(record, self._remember(record))

    def start(self) -> None:
        """Take the hooks on the sharded parameters for those that belong there."""
        self._hooks = {id(record): _hooks(record.sharded_param) for record in self._records}

    def before_gather(self) -> None:
        """Look at the sharded parameters before whole ones take their place in the modules.

        Raises:
            RuntimeError: one was replaced, or got a gradient hook.
        """
        for record in self._records:
            sharded = record.sharded_param
            if not record.sharded_state.name.startswith("SHARDED"):
                continue
            self._check_place(record, sharded)
            if _hooks(sharded) > self._hooks.get(id(record), 0):
                raise RuntimeError(
                    f"{self._name(record)} got a gradient hook after initialize(), which would never be "
                    "called; register hooks on the model's parameters before initialize()"
                )

    def before_reshard(self, group: Any) -> None:
        """Look at a group's whole parameters before they are freed; `requires_grad` is carried over.

        Raises:
            RuntimeError: one was replaced or written to.
        """
        if not group.is_unsharded:
            return
        for record in group.fsdp_params:
            whole, sharded = record._unsharded_param, record.sharded_param
            self._check_place(record, whole)
            if whole.requires_grad != sharded.requires_grad:
                sharded.requires_grad_(whole.requires_grad)
            gathered = record.all_gather_outputs[0]
            moved = not isinstance(whole, DTensor) and whole.data_ptr() != gathered.data_ptr()
            if moved or (not self._in_place and whole._version != self._versions.get(id(record))):
                self._versions[id(record)] = whole._version
                raise RuntimeError(
                    f"{self._name(record)} was written to while its whole value was gathered, so the change "
                    "would be lost; write to parameters after engine.step() and before the next forward "
                    "pass, and not in forward()"
                )

    def _remember(self, record: Any) -> Callable[[nn.Parameter], None]:
        def remember(whole: nn.Parameter) -> None:
            self._versions[id(record)] = whole._version

        return remember

    def _check_place(self, record: Any, parameter: nn.Parameter) -> None:
        place = record._module_info
        if place.module._parameters.get(place.param_name) is not parameter:
            raise RuntimeError(
                f"{self._name(record)} was replaced after initialize(), which sharding would undo; change "
                "its values instead, by copy_(), or replace it before initialize()"
            )

    def _name(self, record: Any) -> str:
        for name, module in self._root.named_modules():
            if module is record._module_info.module:
                return f"{name}.{record._module_info.param_name}".removeprefix(".")
        return str(record._module_info.param_name)


def _hooks(parameter: nn.Parameter) -> int:
    post = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return len(parameter._backward_hooks or ()) + len(post or ())
