"""Layers that compute with local parts of their parameters: fused projections, and a row for each head.

The parts of a fused projection, such as q, k and v, are cut one by one (`packed_colwise`). A rank's slices
aren't adjacent, so all ranks store the whole weight, and each computes with its own slices. ZeRO stages 1 to
3 still shard it over dp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


def store(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, source: int | None) -> None:
    """Replace one of a module's parameters by a DTensor."""
    whole = module.get_parameter(name)
    split = distribute_tensor(whole, mesh, [placement], src_data_rank=source)
    module.register_parameter(name, nn.Parameter(split, requires_grad=whole.requires_grad))


def slices(parameter: Any, mesh: DeviceMesh, sizes: Sequence[int], dim: int) -> Tensor:
    """Return this rank's slice of each part of a parameter that is stored whole."""
    whole: Tensor = parameter.to_local(grad_placements=[Partial()])
    parts = whole.split_with_sizes(list(sizes), dim)
    return torch.cat([part.chunk(mesh.size(), dim)[mesh.get_local_rank()] for part in parts], dim)


@contextmanager
def local_parameters(module: nn.Module, local: Callable[[str, Any], Tensor]) -> Iterator[None]:
    """Let a module compute with local tensors in place of its own parameters."""
    parameters = dict(module._parameters)
    for name, parameter in parameters.items():
        if parameter is not None:
            module._parameters[name] = local(name, parameter)  # type: ignore[assignment]
    try:
        yield
    finally:
        module._parameters.update(parameters)


class PackedColwise(ParallelStyle):
    """Column-wise style of a linear layer whose output has parts of these sizes."""

    def __init__(self, sizes: Sequence[int], layout: Placement) -> None:
        """Take the placement of the input."""
        super().__init__()
        self._sizes = sizes
        self._layout = layout

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                store(module, name, mesh, Replicate(), self.src_data_rank)
        forward = module.forward

        def local_forward(x: Any) -> Any:
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [self._layout], run_check=False)
            whole = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            with local_parameters(module, lambda _, parameter: slices(parameter, mesh, self._sizes, 0)):
                return forward(whole)

        module.forward = local_forward
        return module


class PerHead(ParallelStyle):
    """Style of a module whose parameters have a row for each head, and whose input is a rank's heads."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                store(module, name, mesh, Shard(0), self.src_data_rank)
        forward = module.forward

        def local_forward(*args: Any, **kwargs: Any) -> Any:
            with local_parameters(module, lambda _, parameter: parameter.to_local()):
                return forward(*args, **kwargs)

        module.forward = local_forward
        return module
