"""ZeRO stages 0-2: parameters gathered and gradients reduced in one order, whatever layers a rank runs.

Ranks may run different layers: task heads, a tower for one modality, layer drop. fully_shard gathers and
reduces a layer in hooks on its forward and backward pass, so such ranks would sum gradients of different
layers. Here the layers follow a fixed order, as in DDP's reducer (Li et al. 2020, section 4.2): a layer is
reduced during the backward pass, once its gradients and those of all layers before it are there. What is left
is reduced at the end, with zeros where a rank has no gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from parallel.fsdp_internals import (
    end_backward,
    fill_gradients,
    give_gradient,
    group_of,
    is_whole,
    keep_whole,
    reduce_gradients,
    set_shower,
    show_in_state_dicts,
    start_gathering,
    take_gradients,
    take_over,
)
from parallel.parameter_watch import ParameterWatch
from parallel.sums import WholeSums


class Reducer:
    """The layers of a module at ZeRO stage 0, 1 or 2.

    Attributes:
        used: ids of fully_shard's records of parameters that had a gradient in this step, on this rank.
        late: number of gradients that came after their layer had been reduced, and aren't in the sum.
        digest, order: nothing, as the order of layers is always the same; see `Gatherer`.
    """

    digest = 0
    order: tuple[str, ...] = ()

    def __init__(
        self,
        modules: Sequence[FSDPModule],
        mesh: DeviceMesh,
        stage: int,
        watch: ParameterWatch,
        *,
        alone: bool,
        offload: bool,
        dtype: torch.dtype,
    ) -> None:
        """Take over from fully_shard's hooks on `modules`, the first of which is the root.

        `watch` looks at parameters before they are gathered, all together, and put away. `dtype` is that of
        sums of gradients.
        With `alone`, the gradients of a single rank are adopted, not reduced. With `offload`, whole
        parameters are only there from a forward pass to the end of its backward pass.
        """
        self._root = modules[0]
        self._watch = watch
        self._mesh = mesh
        whole = mesh["shard"].size() == 1  # every rank keeps all of a gradient
        self._every = stage == 2 and not whole
        # Shard groups are summed over at the boundary alone.
        self._sums_late = self._every and mesh["replicate"].size() > 1
        self._last = not alone
        self._alone = alone
        # The backward pass runs through the layers in about this order, and through the root's last.
        self._groups = [group for module in reversed(modules) if (group := group_of(module)) is not None]
        self._next: int | None = None  # layer that is reduced next in a backward pass
        self._missing: list[set[int]] = []  # by layer: ids of the records without a gradient as yet
        self._layer_of: dict[int, int] = {}  # by the record's id
        self._hooked: dict[int, Any] = {}  # by the record's id: the parameter that has our hook
        self._stalled = False  # True if a layer was complete before the first one to be reduced
        self._early, self._agreed = mesh.size() > 1, mesh.size() == 1
        self._offload = offload
        self._sums = None
        self._layers: Sequence[Any] = self._groups  # in the order in which they are reduced
        if whole and not alone and not offload:
            self._sums = WholeSums(mesh.get_group("replicate"), dtype)
            self._layers = _with_root_cut(self._groups, modules[0])
        self._shown = False  # True while the script may write to whole parameters
        self.used: set[int] = set()
        self.late = 0
        for module in modules:
            take_over(module, self._unshard, self._before_reshard)
            if not offload:
                show_in_state_dicts(module)
                keep_whole(module)
                set_shower(module, self.show_parameters)

    # --- parameters --------------------------------------------------------------------------------------

    def show_parameters(self) -> None:
        """Show whole parameters in the modules, which the script may read and write until the next pass."""
        if self._offload:
            self.reshard()
            return
        self._wait()
        self._shown = True

    def carry_writes(self) -> None:
        """Carry what the script wrote to shown whole parameters over to the sharded ones, on this rank."""
        for group in self._groups if self._shown else ():
            self._watch.carry(group)

    def _unshard(self, group: Any) -> None:
        """Get a layer's parameters ready for use."""
        if self._shown or not is_whole(group):
            self._gather()

    def _before_gather(self) -> None:
        self.carry_writes()
        self._shown = False
        self._root._get_fsdp_state()._lazy_init()
        if not any(map(is_whole, self._groups)):
            self._watch.before_gather()

    def _gather(self) -> None:
        """Start to gather what isn't whole, in the order of the forward pass. A layer waits for its own."""
        self._before_gather()
        for group in reversed(self._groups):
            start_gathering(group)

    def _wait(self) -> None:
        """Make all parameters whole, those of layers that this rank didn't run included.

        One layer is gathered while the one before it is put into place, so that only two are in memory twice.
        """
        self._before_gather()
        order = [*reversed(self._groups)]
        for i, group in enumerate(order):
            for started in order[i : i + 2]:
                start_gathering(started)
            group.wait_for_unshard()

    def reshard(self) -> None:
        """Show the sharded parameters. A single rank's gradients move to the sharded ones."""
        for group in filter(is_whole, self._groups):
            group.wait_for_unshard()  # else a layer that didn't run would use stale parameters later
            group.reshard()
            if self._alone:
                for record, gradient in take_gradients(group):
                    give_gradient(record, gradient)

    def _before_reshard(self, group: Any) -> None:
        self.carry_writes()
        self._shown = False
        self._watch.before_reshard(group)

    def gather_all(self) -> None:
        """Do nothing: all parameters are whole before any backward pass."""

    # --- gradients ---------------------------------------------------------------------------------------

    def before_backward(self, *, last: bool, early: bool = True) -> None:
        """Prepare for a backward pass; with `early=False` nothing is reduced before its end."""
        self._wait()
        for group in self._groups:
            group.all_reduce_grads = last or not self._sums_late
        self._next = None
        if not (self._reduces(last) and early and self._early):
            return
        self._next, self._missing = 0, []
        for layer, group in enumerate(self._layers):
            trained = [record for record in group.fsdp_params if record._unsharded_param.requires_grad]
            self._missing.append({id(record) for record in trained})
            for record in trained:
                whole = record._unsharded_param
                if self._hooked.get(id(record)) is not whole:
                    self._hooked[id(record)] = whole
                    _hook(whole, _arrival(self, id(record)))
                self._layer_of[id(record)] = layer

    def arrived(self, record: int) -> None:
        """Note a gradient, and reduce the layers that are complete and whose turn it is."""
        if self._next is None:
            return
        layer = self._layer_of[record]
        if layer < self._next:
            self.late += 1
            return
        self._missing[layer].discard(record)
        self._stalled |= self._next == 0 < layer and not self._missing[layer]
        while self._next < len(self._layers) and not self._missing[self._next]:
            self._reduce(self._layers[self._next])
            self._next += 1

    def after_backward(self, *, last: bool, early: bool = True) -> None:
        """Reduce or accumulate the gradients that are left."""
        start, self._next = self._next, None
        if self._reduces(last):
            for group in self._layers[start or 0 :]:
                self._reduce(group)
            if start is not None and not self._agreed:
                self._agree(stalled=self._stalled or start == 0)
            if self._sums is not None:
                self._sums.finish()
        else:
            for group in self._groups:
                reduce_gradients(group, reduce=False)
        end_backward(self._root)

    def _reduces(self, last: bool) -> bool:
        return self._every or (last and self._last)

    def _reduce(self, group: Any) -> None:
        if self._mesh.size() > 1:
            self.used.update(fill_gradients(group))
        if self._sums is not None:
            self._sums.start(group)
        else:
            reduce_gradients(group, reduce=True)

    def drop_sums(self) -> None:
        """Drop sums that a backward pass has left which ended in an error."""
        self._next = None
        if self._sums is not None:
            self._sums.drop()

    def begin_step(self) -> None:
        """Forget what the last step used."""
        self.used.clear()
        self.late = 0

    def _agree(self, *, stalled: bool) -> None:
        """After the first pass: if gradients were late on some rank, reduce them, and never early again.

        They are late if a parameter gets several gradients in one pass, as under reentrant checkpointing of a
        layer that is used twice. If some rank was `stalled` by the first layer to be reduced, as it uses one
        of several heads, or an embedding is registered after the layers, the root is last from now on.
        """
        told = torch.tensor([float(self.late), float(stalled)], device=self._mesh.device_type)
        for axis in ("replicate", "shard"):
            dist.all_reduce(told, group=self._mesh.get_group(axis))
        self._agreed, self.late = True, 0
        late, stalls = told.tolist()
        if stalls > 0:
            self._layers = self._groups
        if late > 0:
            self._early = False
            for group in self._layers:
                self._reduce(group)


class _Part(NamedTuple):
    """Some of a group's parameters, which are reduced by themselves."""

    fsdp_params: list[Any]


def _with_root_cut(groups: Sequence[Any], root: FSDPModule) -> list[Any]:
    """Return the groups with the root's, the last one, cut at the layers.

    What follows the layers, such as a head, has its gradients before them, and needn't wait for those of what
    comes first, such as an embedding.
    """
    *layers, own = groups
    if own is not group_of(root):
        return [*groups]
    place = {id(parameter): i for i, parameter in enumerate(cast(nn.Module, root).parameters())}
    end = max(
        (place[id(record.sharded_param)] for group in layers for record in group.fsdp_params), default=-1
    )
    head = [record for record in own.fsdp_params if place[id(record.sharded_param)] > end]
    rest = [record for record in own.fsdp_params if place[id(record.sharded_param)] <= end]
    if not (head and layers):
        return [*groups]
    return [_Part(head), *layers, *([_Part(rest)] if rest else [])]


_hook: Any = Tensor.register_post_accumulate_grad_hook  # the parameter's own is refused to scripts


def _arrival(reducer: Reducer, record: int) -> Callable[[Tensor], None]:
    """Return a hook that tells the reducer of a gradient.

    Its reference is weak: torch keeps such hooks where Python's garbage collector can't see them, so that a
    strong one would keep the model and its process groups alive.
    """
    weak = weakref.ref(reducer)

    def hook(parameter: Tensor) -> None:
        alive = weak()
        # One that was frozen after the forward pass gets no gradient, but torch calls its hooks.
        if alive is not None and parameter.grad is not None:
            alive.arrived(record)

    return hook
