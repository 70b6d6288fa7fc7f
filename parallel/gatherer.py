"""ZeRO stage 3: layers gathered for their use and freed after it, by fully_shard's hooks.

The order of gathers and reductions is that in which a rank runs its layers, so all data-parallel ranks must
run the same ones. They compare it by `digest`. Three things that fully_shard's hooks don't handle are added:
layers called by their parts, backward passes inside a loss, and outputs that are objects.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from parallel.fsdp_internals import (
    allow_in_place_inputs,
    end_backward,
    fill_gradients,
    forget_forward_order,
    give_gradient,
    group_of,
    has_gradients,
    is_whole,
    see_attributes,
    take_gradients,
)
from parallel.parameter_watch import ParameterWatch

KEPT = 4096
"""Length of the kept order: an evaluation may run many batches between two steps."""


class LayerGatherError(RuntimeError):
    """Gathering a layer failed, as when other ranks gather another one."""


class Gatherer:
    """The layers of a module at ZeRO stage 3.

    Attributes:
        used: ids of fully_shard's records of parameters that had a gradient in this step, on this rank.
        late: always 0; see `Reducer`.
        order: names of the layers in the order of this step's gathers and reductions, the first `KEPT`.
    """

    def __init__(
        self,
        modules: Sequence[FSDPModule],
        mesh: DeviceMesh,
        names: Sequence[str],
        watch: ParameterWatch,
        *,
        alone: bool,
    ) -> None:
        """Set up `modules`, the first of which is the root, and their `names`.

        `watch` looks at parameters before a step's first gather, and before they are freed.
        With `alone`, the gradients of a single rank are adopted, not reduced.
        """
        self._root = modules[0]
        self._watch = watch
        self._modules = modules
        self._alone = alone
        self._mesh = mesh
        self._fills = mesh.size() > 1
        self._first_step = mesh["shard"].size() > 1
        self._sums_late = mesh["replicate"].size() > 1
        self._inside = self._ended = self._outside = False
        self._names = names
        self.used: set[int] = set()
        self.late = 0
        self._clear()
        for number, module in enumerate(modules):
            self._set_up(number, module)

    def _set_up(self, number: int, module: FSDPModule) -> None:
        state: Any = module._get_fsdp_state()
        group = group_of(module)
        see_attributes(state)
        state._root_post_backward_final_callback = partial(self._end, state)
        if group is None:
            return
        allow_in_place_inputs(group)
        group.unshard = partial(self._unshard, number, group)
        group.reshard = partial(self._reshard, group)
        group.post_backward = partial(self._post_backward, number, group)

    def begin_step(self) -> None:
        """Forget what the last step used."""
        self._first_step = False
        self._clear()

    def _clear(self) -> None:
        self.used.clear()
        self._ran: set[int] = set()
        self._looked = False
        self.order: list[str] = []
        self._crc = 0

    @property
    def digest(self) -> int:
        """16 bits that differ, most likely, where the order of this step's gathers and reductions does."""
        return self._crc & 0xFFFF

    def _note(self, number: int) -> None:
        self._crc = zlib.crc32(number.to_bytes(4, "little"), self._crc)
        if len(self.order) < KEPT:
            self.order.append(self._names[number])

    # --- in the place of fully_shard's own methods -------------------------------------------------------

    def _unshard(self, number: int, group: Any, async_op: bool = False) -> None:
        self._ran.add(number)
        if is_whole(group):
            return
        self._root._get_fsdp_state()._lazy_init()  # a part may be called before the root is
        if not self._looked:
            self._looked = True
            self._watch.before_gather()
        self._note(number)
        if self._first_step:
            self._check_alike(number)
        try:
            type(group).unshard(group, async_op)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise LayerGatherError(
                f"gathering {self._names[number]} failed ({error}); at ZeRO stage 3 all ranks must run the "
                "same layers in the same order: if they don't, use stage 0, 1 or 2"
            ) from error

    def _check_alike(self, number: int) -> None:
        """Check, in the first step before each gather, that all ranks are at the same layer.

        Collectives of different sizes end the process under gloo, and wait forever under NCCL.
        """
        group = self._mesh.get_group("shard")
        mine = torch.tensor([number], device=self._mesh.device_type)
        numbers = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(numbers, mine, group=group)
        for place, other in enumerate(torch.cat(numbers).tolist()):
            if other != number:
                rank, me = dist.get_global_rank(group, place), dist.get_rank()
                raise LayerGatherError(
                    f"rank {me} is at {self._names[number]} and rank {rank} at {self._names[other]}: at ZeRO "
                    "stage 3 all ranks must run the same layers in the same order; use stage 0, 1 or 2, or "
                    "run all layers on all ranks"
                )

    def _reshard(self, group: Any) -> None:
        self._watch.before_reshard(group)
        type(group).reshard(group)

    def _post_backward(self, number: int, group: Any, *_: Any) -> None:
        if not self._inside:  # a backward pass inside the loss: its layers stay whole until the engine's own
            self._outside = True
            return
        self._note(number)
        if self._fills and number in self._ran:
            self.used.update(fill_gradients(group))
        type(group).post_backward(group)

    def _end(self, state: Any) -> None:
        if self._inside:
            self._ended = True
            type(state)._root_post_backward_final_callback(state)
            return
        self._outside = True
        state._state_ctx.post_backward_final_callback_queued = False
        for each in state._state_ctx.all_states:
            for part in (each, each._fsdp_param_group):
                if part is not None and part._training_state.name != "FORWARD":
                    part._training_state = type(part._training_state).IDLE

    # --- parameters and gradients ------------------------------------------------------------------------

    def _is_left(self, group: Any) -> bool:
        """Return whether gradients came after a reduction, as in reentrant checkpoints of a shared layer."""
        return not self._alone and has_gradients(group)

    def reshard(self) -> None:
        """Free the whole parameters. A single rank's gradients move to the sharded ones."""
        for module in self._modules:
            module.reshard()
            if self._alone and (group := group_of(module)) is not None:
                for record, gradient in take_gradients(group):
                    give_gradient(record, gradient)

    def show_parameters(self) -> None:
        """Show sharded parameters in the modules, which the script may read and write until the next pass."""
        self.reshard()

    def carry_writes(self) -> None:
        """Do nothing: the script writes to the sharded parameters."""

    def before_backward(self, *, last: bool, early: bool = True) -> None:
        """Prepare for a backward pass. `early=False` is its half that computes the inputs' gradients."""
        self._inside, self._ended = True, False
        early = early and not self._outside
        self._root.set_requires_gradient_sync(early and not self._alone)
        self._root.set_requires_all_reduce(last or not self._sums_late)
        self._root.set_reshard_after_backward(not self._outside)
        self._root.set_is_last_backward(early and last)

    def drop_sums(self) -> None:
        """Do nothing: sums of gradients are fully_shard's."""

    def gather_all(self) -> None:
        """Gather all parameters at once, for a backward pass whose layers no hook tells of."""
        for module in self._modules:
            module.unshard()

    def after_backward(self, *, last: bool, early: bool = True) -> None:
        """Reduce the gradients that no hook has reduced, and free memory."""
        everything = self._outside or not early
        if everything:
            self._outside = False
            self.before_backward(last=last)
            self._ended = False
        for module in reversed(self._modules):
            group = group_of(module)
            if group is not None and (everything or self._is_left(group)):
                group.post_backward()
                self._ended = False
        if not self._ended:  # or the forward pass didn't go through the root's hooks
            end_backward(self._root)
        forget_forward_order(self._root)
        self._inside = False
