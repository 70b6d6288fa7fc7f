"""Tensor parallelism of experts with stacked weights, as in Hugging Face's models.

The plan names the module (`moe_tp_experts`) and its parameters: `gate_up_proj (experts, 2 F, D)` is
`packed_colwise`, and `down_proj (experts, D, F)` is `rowwise`; transposed, they are `packed_rowwise` and
`colwise`. Each rank computes a part of every expert's F.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from parallel.packed import local_parameters, slices, store
from parallel.tp_styles import EXPERT_STYLES, expert_division


class ExpertsParallel(ParallelStyle):
    """Style of experts `(hidden states, indices, weights) -> hidden states`; sums the ranks' outputs."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        """Take the styles of the module's own parameters, by name."""
        super().__init__()
        self._styles = parameters

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, style in self._styles.items():
            dim, packed = EXPERT_STYLES[style]
            # Gate and up are stored whole, as a rank's parts of them aren't adjacent.
            placement = Replicate() if packed else Shard(module.get_parameter(name).ndim + dim)
            store(module, name, mesh, placement, self.src_data_rank)
        forward = module.forward

        def local(name: str, parameter: Any) -> Tensor:
            dim, packed = EXPERT_STYLES[self._styles[name]]
            if packed:
                return slices(parameter, mesh, [parameter.shape[dim] // 2] * 2, dim)
            part: Tensor = parameter.to_local()
            return part

        def local_forward(*args: Any) -> Tensor:
            with local_parameters(module, local):
                output = forward(*(_partial_gradient(arg, mesh) for arg in args))
            summed = DTensor.from_local(output, mesh, [Partial()], run_check=False)
            return summed.redistribute(placements=[Replicate()]).to_local()

        module.forward = local_forward
        return module


def check_experts(model: nn.Module, plan: Mapping[str, str], degree: int) -> None:
    """Check that the parameters that an expanded plan names belong to experts and can be split.

    Experts must have no others: the ranks' outputs are summed, so a bias would count once for each rank.

    Raises:
        ValueError: naming the parameter and its style.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for owner in [name for name, style in plan.items() if style == "moe_tp_experts"]:
        whole = [n for n in parameters if n.startswith(f"{owner}.") and n not in plan]
        if whole:
            raise ValueError(
                f"tp_plan has 'moe_tp_experts' for {owner} but no style for its parameter {whole[0]}, which "
                "would then count once for each rank; name it in the plan, or leave the experts out"
            )
    for name, style in plan.items():
        if name not in parameters:
            continue
        owner = name.rpartition(".")[0]
        if plan.get(owner) != "moe_tp_experts" or style not in EXPERT_STYLES:
            raise ValueError(
                f"tp_plan has {style!r} for the parameter {name}; only parameters of a module with "
                f"'moe_tp_experts' can be split, by {' or '.join(map(repr, EXPERT_STYLES))}"
            )
        if parameters[name].ndim != 3:
            raise ValueError(
                f"tp_plan has {style!r} for {name} of shape {list(parameters[name].shape)}; the weights of "
                "experts have the shape (experts, outputs, inputs) or (experts, inputs, outputs)"
            )
        if (why := expert_division(name, style, parameters[name].shape).refusal(degree)) is not None:
            raise ValueError(f"tp({degree}) {why}; choose a tp that does")


def _partial_gradient(value: Any, mesh: DeviceMesh) -> Any:
    """Mark an input that all ranks have, so that its gradient is summed over the ranks."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return DTensor.from_local(value, mesh, [Replicate()], run_check=False).to_local(
        grad_placements=[Partial()]
    )
