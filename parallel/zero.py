"""ZeRO stages 0-3 as settings of one mechanism, torch's `fully_shard`.

| ZeRO stage | optimizer state | gradients                             | parameters                      |
| 0          | replicated      | replicated, reduced at the boundary   | replicated                      |
| 1          | sharded         | whole until reduced at the boundary   | whole from step to step         |
| 2          | sharded         | reduce-scattered every micro batch    | whole from step to step         |
| 3          | sharded         | reduce-scattered every micro batch    | gathered for each layer's use   |

The boundary is the end of gradient accumulation, before the optimizer step. (ZeRO, Rajbhandari et al. 2020,
section 5.) Stage 0 is the same code on the mesh `(replicate=dp, shard=1)`. With a shard group smaller than
dp, stages 2 and 3 sum over the groups only at the boundary. With more than one data-parallel rank, a trained
parameter that a rank doesn't use has a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from parallel.degrees import check_zero_stage
from parallel.fsdp_internals import (
    adopt_gradient,
    check_records,
    compute_in_place,
    count_unused,
    group_of,
    parameters_of,
)
from parallel.settings import DType, Precision

_DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        output: torch.dtype | None = None,
    ) -> None:
        """Shard `root` in place. `units` are its submodules that are gathered and freed one by one.

        At stage 3, a unit of fewer than `persistence_threshold` elements stays whole from forward to
        backward. With `offload`, sharded parameters, their gradients and optimizer states stay in host
        memory. `output` is the type to which the root's outputs are cast, None for the type of computation.

        Raises:
            ValueError: `stage` isn't 0, 1, 2 or 3.
            RuntimeError: this torch's fully_shard lacks internals that this class uses.
        """
        check_zero_stage(stage)
        self.stage = stage
        self._sums_late = stage >= 2 and mesh["replicate"].size() > 1
        self.precision = precision
        self.offload = offload
        self.root = cast(FSDPModule, root)
        # A single rank has nothing to sum, and fully_shard would copy its gradients twice.
        self._alone = mesh.size() == 1 and not offload
        if self._alone and precision.compute == "fp32":
            units = ()  # there is nothing to gather, cast or free, so their hooks would only take time
        self._shard(units, mesh, persistence_threshold, output)
        self._sharded = [m for m in root.modules() if isinstance(m, FSDPModule)]
        self._records = [record for sharded in self._sharded for record in parameters_of(sharded)]
        for sharded in self._sharded:
            self._set_up(sharded, mesh)

    def _shard(
        self, units: Sequence[nn.Module], mesh: DeviceMesh, threshold: int, output: torch.dtype | None
    ) -> None:
        """Apply fully_shard to batch norms, to the units, and to the root with the remaining parameters."""
        root, precision = cast(nn.Module, self.root), self.precision
        placed = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if self.offload else OffloadPolicy()
        scalars = {
            p for p in root.parameters() if p.ndim == 0
        }  # fully_shard refuses parameters without a dim
        statistics = [m for m in root.modules() if isinstance(m, _BatchNorm)] if precision.mixed else []
        parts = [*statistics, *(unit for unit in units if unit not in statistics)]
        sizes = [sum(p.numel() for p in part.parameters()) for part in parts]
        covered = {p for part in parts for p in part.parameters()}
        sizes.append(sum(p.numel() for p in root.parameters() if p not in covered))
        policy = _policy(precision, None)
        policies = [_statistics_policy(precision) if part in statistics else policy for part in parts]
        policies.append(_policy(precision, output))
        for module, size, policy in zip([*parts, root], sizes, policies, strict=True):
            module.register_forward_hook(_own_outputs)
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=self.stage == 3 and size >= threshold,
                mp_policy=policy,
                offload_policy=placed,
                ignored_params=scalars,
            )

    def _set_up(self, sharded: FSDPModule, mesh: DeviceMesh) -> None:
        """Configure reduction, prefetching and copies of the parameters gathered together with `sharded`."""
        check_records(sharded)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
        if self.stage < 3:
            # In the backward pass every layer is whole already. By default torch prefetches the next layer,
            # which at the end of accumulation is one that it has just freed. So each layer prefetches only
            # itself.
            sharded.set_modules_to_backward_prefetch([sharded])
        in_place = mesh["shard"].size() == 1 and self.precision.compute == "fp32" and not self.offload
        for parameter in parameters_of(sharded):
            if mesh.size() > 1:
                count_unused(parameter)
            if in_place:
                compute_in_place(parameter)

    def before_backward(self, *, last: bool) -> None:
        """Set how the next backward pass treats gradients and parameters.

        `last` marks the last one of the accumulation, before an optimizer step.
        """
        self.root.set_requires_gradient_sync((last or self.stage >= 2) and not self._alone)
        if self._sums_late:
            self.root.set_requires_all_reduce(last)
        self.root.set_reshard_after_backward(last or self.stage == 3)
        self.root.set_is_last_backward(last)

    def before_input_backward(self) -> None:
        """Set up the half of a split backward pass that computes the inputs' gradients, not the weights'.

        fully_shard reduces gradients in hooks on a layer's inputs, which run in this half: too early.
        `before_weight_backward` and `after_weight_backward` enclose the other half, where they are reduced.
        """
        self.root.set_requires_gradient_sync(False)
        self.root.set_reshard_after_backward(self.stage == 3)
        self.root.set_is_last_backward(False)

    def before_weight_backward(self) -> None:
        """Gather all parameters at once: no hook tells which ones this half needs."""
        self.before_input_backward()
        for module in self._sharded:
            module.unshard()

    def after_weight_backward(self, *, last: bool) -> None:
        """Do the work of an unsplit backward pass's hooks: accumulate or reduce gradients, free memory."""
        self.before_backward(last=last)
        for module in reversed(self._sharded):
            group = group_of(module)
            if group is not None:
                group.post_backward()
        cast(Any, self.root)._get_fsdp_state()._root_post_backward_final_callback()

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that a forward pass computed with, even if their memory was freed after it."""
        for record in self._records:
            yield record._unsharded_param
        yield from (p for p in cast(nn.Module, self.root).parameters() if p.ndim == 0)  # not fully_shard's

    def reshard(self) -> None:
        """Free the whole parameters, so that `parameters()` returns the sharded ones.

        Call it before the sharded ones are read or written outside of a step: the whole copies that a forward
        pass has left would be used again, though stale.
        """
        for module in self._sharded:
            module.reshard()
        if self._alone:
            for record in self._records:
                adopt_gradient(record)

    def drop_gradients(self) -> None:
        """Drop all gradients, including those being accumulated."""
        for parameter in cast(nn.Module, self.root).parameters():
            if parameter.ndim == 0:
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


class ZeroStages:
    """All pipeline stages of a rank, each of which is sharded by itself."""

    def __init__(self, stages: Sequence[Zero]) -> None:
        """Take at least one stage."""
        self._stages = stages
        self.stage = stages[0].stage
        """ZeRO stage."""
        self.compute_dtype, self.offload = _DTYPES[stages[0].precision.compute], stages[0].offload

    def before_backward(self, *, last: bool) -> None:
        for zero in self._stages:
            zero.before_backward(last=last)

    def reshard(self) -> None:
        for zero in self._stages:
            zero.reshard()

    def drop_gradients(self) -> None:
        for zero in self._stages:
            zero.drop_gradients()


def _own_outputs(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Clone outputs that are views.

    fully_shard hangs the gathering for the backward pass on a module's outputs, and an in-place operation on
    a view (`x += y` in the layer above) would silently drop that hook.
    """
    if not torch.is_grad_enabled():
        return output
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x._base is not None else x, output)


def _policy(precision: Precision, output: torch.dtype | None) -> MixedPrecisionPolicy:
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=_DTYPES[precision.compute], reduce_dtype=_DTYPES[precision.reduce], output_dtype=output
    )


def _statistics_policy(precision: Precision) -> MixedPrecisionPolicy:
    """Return the policy of batch norms: they compute in fp32, which their running averages need."""
    return MixedPrecisionPolicy(
        param_dtype=torch.float32,
        reduce_dtype=_DTYPES[precision.reduce],
        output_dtype=_DTYPES[precision.compute],
    )
