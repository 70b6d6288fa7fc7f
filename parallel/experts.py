"""Tensor parallelism of experts with stacked weights, as in Hugging Face's models.

The plan names the module (`moe_tp_experts`) and its parameters: `gate_up_proj (experts, 2 F, D)` is
`packed_colwise`, and `down_proj (experts, D, F)` is `rowwise`. Each rank computes a part of every expert's F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from parallel.tp_styles import EXPERT_STYLES, expert_division


def _placement(style: str) -> Placement:
    """Return how a parameter of experts is stored.

    A rank's parts of gate and up aren't adjacent, so all ranks store both whole. ZeRO stages 1 to 3 still
    shard them over dp.
    """
    return Replicate() if style == "packed_colwise" else Shard(-1)


class ExpertsParallel(ParallelStyle):
    """Style of experts `(hidden states, indices, weights) -> hidden states`; sums the ranks' outputs."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        """Take the styles of the module's own parameters, by name."""
        super().__init__()
        self._styles = parameters

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, style in self._styles.items():
            whole = module.get_parameter(name)
            split = distribute_tensor(whole, mesh, [_placement(style)], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(split, requires_grad=whole.requires_grad))
        forward = module.forward

        def local_forward(*args: Any) -> Tensor:
            parameters = dict(module._parameters)
            for name, style in self._styles.items():
                module._parameters[name] = _local(parameters[name], style, mesh)  # type: ignore[assignment]
            try:
                output = forward(*(_partial_gradient(arg, mesh) for arg in args))
            finally:
                module._parameters.update(parameters)
            summed = DTensor.from_local(output, mesh, [Partial()], run_check=False)
            return summed.redistribute(placements=[Replicate()]).to_local()

        module.forward = local_forward
        return module


def check_experts(model: nn.Module, plan: Mapping[str, str], degree: int) -> None:
    """Check that the parameters that an expanded plan names belong to experts and can be split.

    Raises:
        ValueError: naming the parameter and its style.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, style in plan.items():
        if name not in parameters:
            continue
        owner = name.rpartition(".")[0]
        if plan.get(owner) != "moe_tp_experts" or style not in EXPERT_STYLES:
            raise ValueError(
                f"tp_plan has {style!r} for the parameter {name}; only parameters of a module with "
                f"'moe_tp_experts' can be split, by {' or '.join(map(repr, EXPERT_STYLES))}"
            )
        if (why := expert_division(name, style, parameters[name].shape).refusal(degree)) is not None:
            raise ValueError(f"tp({degree}) {why}; choose a tp that does")


def _local(parameter: Any, style: str, mesh: DeviceMesh) -> Tensor:
    """Return this rank's part to compute with; of `packed_colwise`, its part of both gate and up."""
    if style != "packed_colwise":
        part: Tensor = parameter.to_local()
        return part
    whole: Tensor = parameter.to_local(grad_placements=[Partial()])
    halves = whole.chunk(2, dim=-2)
    return torch.cat([half.chunk(mesh.size(), dim=-2)[mesh.get_local_rank()] for half in halves], dim=-2)


def _partial_gradient(value: Any, mesh: DeviceMesh) -> Any:
    """Mark an input that all ranks have, so that its gradient is summed over the ranks."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).to_local(
        grad_placements=[Partial()]
    )
