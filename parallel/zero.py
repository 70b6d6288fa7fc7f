"""ZeRO stages 0-3 as settings of one mechanism, torch's `fully_shard`.

| ZeRO stage | optimizer state | gradients                             | parameters                      |
| 0          | replicated      | replicated, reduced at the boundary   | replicated                      |
| 1          | sharded         | whole until reduced at the boundary   | whole from step to step         |
| 2          | sharded         | reduce-scattered every micro batch    | whole from step to step         |
| 3          | sharded         | reduce-scattered every micro batch    | gathered for each layer's use   |

The boundary is the end of gradient accumulation, before the optimizer step. (ZeRO, Rajbhandari et al. 2020,
section 5.) Stage 0 is the same code on the mesh `(replicate=dp, shard=1)`. With a shard group smaller than
dp, stages 2 and 3 sum over the groups only at the boundary. Ranks may run different layers at stages 0-2
(`Reducer`), and must run the same ones at stage 3 (`Gatherer`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from parallel.agreement import Trace
from parallel.degrees import check_zero_stage
from parallel.fsdp_internals import (
    check_records,
    compute_in_place,
    group_of,
    is_trained,
    on_whole,
    parameters_of,
    set_root,
)
from parallel.gatherer import Gatherer
from parallel.gradients import stays_whole
from parallel.mixed_precision import DTYPES, policy_of, statistics_policy
from parallel.parameter_watch import ParameterWatch
from parallel.part_hooks import gather_for_parts
from parallel.reducer import Reducer
from parallel.settings import Precision
from parallel.sums import ExchangedSums


class Zero:
    """A module sharded by a ZeRO stage: parameters, gradients and optimizer state.

    Gradients are summed over the data-parallel ranks, not averaged: the engine divides once, by the
    number of tokens in the global batch.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[nn.Module],
        mesh: DeviceMesh,
        stage: int,
        *,
        precision: Precision = Precision(),  # noqa: B008 (it is frozen)
        offload: bool = False,
        persistence_threshold: int = 0,
        last: bool = True,
        output: torch.dtype | None = None,
    ) -> None:
        """Shard `root` in place. `units` are its submodules that are gathered and freed one by one.

        At stage 3, a unit of fewer than `persistence_threshold` elements stays whole from forward to
        backward. So do the root and the last unit of a model's `last` stage, where the backward pass begins:
        they would be gathered again at once. With `offload`, sharded parameters, their gradients and
        optimizer states stay in host memory. `output` is the type to which the root's outputs are cast, None
        for the type of computation.

        Raises:
            ValueError: `stage` isn't 0, 1, 2 or 3.
            RuntimeError: this torch's fully_shard lacks internals that this class uses.
        """
        check_zero_stage(stage)
        self.stage = stage
        self.precision = precision
        self.offload = offload
        self.root = cast(FSDPModule, root)
        # A single rank has nothing to sum, and fully_shard would copy its gradients twice.
        alone = mesh.size() == 1 and not offload
        in_place = mesh["shard"].size() == 1 and precision.compute == "fp32" and not offload
        self._layerwise = stage == 3 and not (alone and in_place)
        if alone and in_place:
            units = ()  # there is nothing to gather, cast or free, so their hooks would only take time
        self._mesh = mesh
        self._trained: bytes | None = None
        self._shard(units, persistence_threshold, last, output)
        sharded = [m for m in root.modules() if isinstance(m, FSDPModule)]
        self._sharded = sharded
        self._records = [record for module in sharded for record in parameters_of(module)]
        for module in sharded:
            check_records(module)
            _sum_plainly(module, mesh)
        set_root(sharded)
        if in_place:
            for record in self._records:
                compute_in_place(record)
        self._watch = watch = ParameterWatch(sharded, in_place=in_place)
        self._driver = self._make_driver(sharded, watch, alone=alone)
        gather_for_parts(sharded)

    def _shard(
        self, units: Sequence[nn.Module], threshold: int, last: bool, output: torch.dtype | None
    ) -> None:
        """Apply fully_shard to batch norms, to the units, and to the root with the remaining parameters."""
        root, precision, mesh = cast(nn.Module, self.root), self.precision, self._mesh
        if mesh["replicate"].size() == 1:  # else fully_shard would sum over each rank alone
            mesh = mesh["shard"]
        placed = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if self.offload else OffloadPolicy()
        whole = {p for p in root.parameters() if stays_whole(p)}
        statistics = [m for m in root.modules() if isinstance(m, _BatchNorm)] if precision.mixed else []
        parts = [*statistics, *(unit for unit in units if unit not in statistics)]
        sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
        covered = {p for part in parts for p in part.parameters()}
        sizes.append(sum(p.numel() for p in root.parameters() if p not in covered))
        policy = policy_of(precision, None)
        policies = [statistics_policy(precision) if part in statistics else policy for part in parts]
        policies.append(policy_of(precision, output))
        stays = {root, *units[-1:]} if last else set()
        for module, size, policy in zip([*parts, root], sizes, policies, strict=True):
            if self._layerwise:
                module.register_forward_hook(_own_outputs)
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=self._layerwise and size >= threshold and module not in stays,
                mp_policy=policy,
                offload_policy=placed,
                ignored_params=whole,
            )

    def _make_driver(
        self, sharded: Sequence[FSDPModule], watch: ParameterWatch, *, alone: bool
    ) -> Reducer | Gatherer:
        mesh, root = self._mesh, cast(nn.Module, self.root)
        if not self._layerwise:
            dtype, offload = DTYPES[self.precision.reduce], self.offload
            return Reducer(sharded, mesh, self.stage, watch, alone=alone, offload=offload, dtype=dtype)
        names = {module: name or "the layers outside of any list" for name, module in root.named_modules()}
        layers = [names[cast(nn.Module, module)] for module in sharded]
        return Gatherer(sharded, mesh, layers, watch, alone=alone)

    # --- backward passes ---------------------------------------------------------------------------------

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Enclose a backward pass, whose gradients are accumulated or reduced. Collective.

        `last` marks the last one of the accumulation, before an optimizer step.
        """
        self._driver.before_backward(last=last)
        self._compare_trained()
        yield
        self._driver.after_backward(last=last)
        if last:
            self.reshard()  # moves the step's gradients to `.grad`

    def _compare_trained(self) -> None:
        """Note which parameters require a gradient; before the first reduction, compare it over the ranks.

        Gradients of different parameters would be summed. Later differences show in the step's `trace`.

        Raises:
            ValueError: ranks train different parameters; on all ranks.
        """
        if self._mesh.size() == 1:
            return
        now = bytes(is_trained(record) for record in self._records)
        first, self._trained = self._trained is None, now
        for axis in ("replicate", "shard") if first else ():
            group = self._mesh.get_group(axis)
            everyone: list[Any] = [None] * group.size()
            torch.distributed.all_gather_object(everyone, now, group=group)
            if any(other != now for other in everyone):
                raise ValueError(
                    "data-parallel ranks train different parameters (requires_grad differs), so their "
                    "gradients can't be summed; freeze the same ones on all ranks"
                )

    def before_input_backward(self) -> None:
        """Set up the half of a split backward pass that computes the inputs' gradients, not the weights'.

        Nothing is reduced in this half. `weight_backward` encloses the other one.
        """
        self._driver.before_backward(last=False, early=False)

    @contextmanager
    def weight_backward(self, *, last: bool) -> Iterator[None]:
        """Enclose the half that computes the weights' gradients, and reduce them at its end. Collective."""
        self._driver.before_backward(last=last, early=False)
        self._driver.gather_all()  # no hook tells which parameters this half needs
        yield
        self._driver.after_backward(last=last, early=False)
        if last:
            self.reshard()

    # --- parameters --------------------------------------------------------------------------------------

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that a forward pass computed with, even if their memory was freed after it."""
        yield from (r._unsharded_param for r in self._records if hasattr(r, "_unsharded_param"))
        yield from (p for p in cast(nn.Module, self.root).parameters() if stays_whole(p))

    def start(self) -> None:
        """Begin to watch for changes of parameters, now that all hooks of our own are in place."""
        self._watch.start()

    def on_whole(self, parameter: nn.Parameter, do: Callable[[nn.Parameter], None]) -> None:
        """Call `do` with the whole parameter that belongs to a sharded one, each time that one is made."""
        for record in self._records:
            if record.sharded_param is parameter:
                on_whole(record, do)

    def reshard(self) -> None:
        """Put the whole parameters away, so that `parameters()` returns the sharded ones.

        Call it before the sharded ones are read or written outside of a step: the whole copies that a forward
        pass has left would be used again, though stale.

        Raises:
            RuntimeError: a whole parameter was replaced or written to, which would be lost.
        """
        self._driver.reshard()

    def show_parameters(self) -> None:
        """Show the parameters that the script may read and write until the next pass. Collective.

        At stages 0-2 they are whole, in the type of computation, as under DDP: any rank may read them alone,
        and what all ranks write to them counts. At stage 3 and with offload they are sharded.
        """
        self._driver.show_parameters()

    def carry_writes(self) -> None:
        """Bring the sharded parameters up to date with what the script wrote to shown whole ones. Local."""
        self._driver.carry_writes()

    def drop_gradients(self) -> None:
        """Drop all gradients, including those being accumulated."""
        self._driver.drop_sums()
        for parameter in cast(nn.Module, self.root).parameters():
            if stays_whole(parameter):
                parameter.grad = None
        for module in self._sharded:
            group = group_of(module)
            if group is not None:
                group._partial_reduce_output = None  # reduced within the shard group, not yet over the groups
        for record in self._records:
            record.unsharded_accumulated_grad = None
            record.sharded_param.grad = None
            if hasattr(record, "_unsharded_param"):
                record._unsharded_param.grad = None
        self.begin_step()

    # --- this step on this rank --------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Forget which layers and parameters the last step used."""
        self._driver.begin_step()

    @property
    def trace(self) -> Trace:
        """The layers that this rank has gathered and reduced."""
        driver = self._driver
        return Trace(driver.late, zlib.crc32(self._trained or b"", driver.digest) & 0xFFFF, driver.order)

    def used(self) -> dict[nn.Parameter, bool]:
        """Return, for each parameter that is summed over ranks, whether it had a gradient on this rank."""
        if self._mesh.size() == 1:
            return {}
        return {r.sharded_param: id(r) in self._driver.used for r in self._records}


class ZeroStages:
    """All pipeline stages of a rank, each of which is sharded by itself."""

    def __init__(self, stages: Sequence[Zero]) -> None:
        """Take at least one stage."""
        self._stages = stages
        self.stage = stages[0].stage
        """ZeRO stage."""
        self.compute_dtype, self.offload = DTYPES[stages[0].precision.compute], stages[0].offload

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Enclose a backward pass through all stages; see `Zero.backward`."""
        with ExitStack() as stack:
            for zero in self._stages:
                stack.enter_context(zero.backward(last=last))
            yield

    def reshard(self) -> None:
        for zero in self._stages:
            zero.reshard()

    def show_parameters(self) -> None:
        for zero in self._stages:
            zero.show_parameters()

    def carry_writes(self) -> None:
        for zero in self._stages:
            zero.carry_writes()

    def drop_gradients(self) -> None:
        for zero in self._stages:
            zero.drop_gradients()

    def begin_step(self) -> None:
        for zero in self._stages:
            zero.begin_step()

    def start(self) -> None:
        for zero in self._stages:
            zero.start()

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for zero in self._stages for parameter in zero.whole_parameters())

    def on_whole(self, parameter: nn.Parameter, do: Callable[[nn.Parameter], None]) -> None:
        for zero in self._stages:
            zero.on_whole(parameter, do)

    def used(self) -> dict[nn.Parameter, bool]:
        """Return, for each parameter that is summed over ranks, whether it had a gradient on this rank."""
        return {parameter: used for zero in self._stages for parameter, used in zero.used().items()}

    def traces(self) -> list[Trace]:
        return [zero.trace for zero in self._stages]


def _sum_plainly(module: FSDPModule, mesh: DeviceMesh) -> None:
    """Let gradients be summed, not averaged, in the way that is fastest on the mesh's devices."""
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    if mesh.device_type == "cpu":
        module.set_custom_reduce_scatter(cast(Any, ExchangedSums()))


def _own_outputs(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Clone outputs that are views.

    fully_shard hangs the gathering for the backward pass on a module's outputs, and an in-place operation on
    a view (`x += y` in the layer above) would silently drop that hook.
    """
    if not torch.is_grad_enabled():
        return output
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x._base is not None else x, output)
