"""ZeRO stages 0-3 as settings of one mechanism, torch's `fully_shard`.

| ZeRO stage | optimizer state | gradients                             | parameters                      |
| 0          | replicated      | replicated, reduced at the boundary   | replicated                      |
| 1          | sharded         | whole until reduced at the boundary   | whole from step to step         |
| 2          | sharded         | reduce-scattered every micro batch    | whole from step to step         |
| 3          | sharded         | reduce-scattered every micro batch    | gathered for each layer's use   |

(ZeRO, Rajbhandari et al. 2020, section 5.) Stage 0 is the same code on the mesh `(replicate=dp, shard=1)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from parallel.settings import Precision

STAGES = (0, 1, 2, 3)


class Zero:
    """A module whose parameters, gradients and optimizer state are sharded as the ZeRO stage says.

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
        output: torch.dtype | None = None,
    ) -> None:
        """Shard `root` in place. `units` are its submodules that are gathered and freed one by one.

        With `offload`, sharded parameters and all that is of their shape lie in the host's memory.
        `output` is the type that the root's outputs are cast to, None that in which they are computed.

        Raises:
            ValueError: `stage` isn't 0, 1, 2 or 3.
        """
        if stage not in STAGES:
            raise ValueError(f"ZeRO stage {stage} doesn't exist; expected 0, 1, 2 or 3")
        self.stage = stage
        self.root = cast(FSDPModule, root)
        placed = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
        for module in [*units, root]:
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=stage == 3,
                mp_policy=_policy(precision, output if module is root else None),
                offload_policy=placed,
            )
        for sharded in self._sharded_modules():
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
            if mesh["shard"].size() == 1 and precision.compute == torch.float32 and not offload:
                for parameter in _parameters_of(sharded):
                    _compute_in_place(parameter)

    def before_backward(self, *, last: bool) -> None:
        """Set what the next backward pass does with gradients and parameters.

        `last` says that it is the accumulation's last: the boundary before an optimizer step.
        """
        self.root.set_requires_gradient_sync(last or self.stage >= 2)
        self.root.set_reshard_after_backward(last or self.stage == 3)
        self.root.set_is_last_backward(last)

    def before_input_backward(self) -> None:
        """Set up the half of a split backward pass that gives the inputs' gradients, and no parameter's.

        fully_shard sums gradients over the ranks in hooks on a layer's inputs, which run in this half: too
        early. `before_weight_backward` and `after_weight_backward` enclose the half that gives them.
        """
        self.root.set_requires_gradient_sync(False)
        self.root.set_reshard_after_backward(self.stage == 3)
        self.root.set_is_last_backward(False)

    def before_weight_backward(self) -> None:
        """Make the whole parameters be there, all at once, as no hook says which are needed in this half."""
        self.before_input_backward()
        for module in self._sharded_modules():
            module.unshard()

    def after_weight_backward(self, *, last: bool) -> None:
        """Do what an unsplit backward pass does in its hooks: add up or sum gradients, free parameters."""
        self.before_backward(last=last)
        for module in reversed(list(self._sharded_modules())):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group.post_backward()
        cast(Any, self.root)._get_fsdp_state()._root_post_backward_final_callback()

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a forward pass computed with, even if their memory was freed after it."""
        for module in self._sharded_modules():
            for parameter in _parameters_of(module):
                yield parameter._unsharded_param

    def reshard(self) -> None:
        """Free the whole parameters, so that the sharded ones are what `parameters()` gives.

        Needed before the sharded ones are read or written from outside the step: whole copies that were
        left from a forward pass would be used again, stale.
        """
        for module in self._sharded_modules():
            module.reshard()

    def drop_gradients(self) -> None:
        """Forget all gradients, those too that are being accumulated."""
        for module in self._sharded_modules():
            for parameter in _parameters_of(module):
                parameter.unsharded_accumulated_grad = None
                parameter.sharded_param.grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None

    def _sharded_modules(self) -> Iterator[FSDPModule]:
        for module in cast(nn.Module, self.root).modules():
            if isinstance(module, FSDPModule):
                yield module


class ZeroStages:
    """What is told to all pipeline stages of a rank, each of which is sharded by itself."""

    def __init__(self, stages: Sequence[Zero]) -> None:
        """`stages` is not empty."""
        self._stages = stages
        self.stage = stages[0].stage
        """ZeRO's."""

    def before_backward(self, *, last: bool) -> None:
        for zero in self._stages:
            zero.before_backward(last=last)

    def reshard(self) -> None:
        for zero in self._stages:
            zero.reshard()

    def drop_gradients(self) -> None:
        for zero in self._stages:
            zero.drop_gradients()


def _policy(precision: Precision, output: torch.dtype | None) -> MixedPrecisionPolicy:
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=precision.compute, reduce_dtype=precision.reduce, output_dtype=output
    )


def _parameters_of(module: FSDPModule) -> list[Any]:
    """fully_shard's own records of the parameters that it gathers together with `module`."""
    group = module._get_fsdp_state()._fsdp_param_group
    return [] if group is None else list(group.fsdp_params)


def _compute_in_place(parameter: Any) -> None:
    """Let a parameter whose shard is the whole be computed with where it lies.

    fully_shard makes a whole copy before use even if there is nobody to gather from. In fp32 that is the
    same again, which would double the memory of ZeRO stage 0 and of a single rank.
    """

    def init_all_gather_outputs(*_: Any) -> None:
        data = parameter._sharded_param_data
        if not parameter.all_gather_outputs or parameter.all_gather_outputs[0] is not data:
            parameter.all_gather_outputs = [data]  # gathering is then a copy of a tensor onto itself: none
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param  # a view of memory that the parameter has left

    parameter.init_all_gather_outputs = init_all_gather_outputs
    parameter.free_unsharded_param = lambda: None
