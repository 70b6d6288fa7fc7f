"""Check of the parameters that tensor parallelism leaves whole: their gradients must agree on all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.topology import Topology

TOLERANCE = 0.05
"""Largest difference of a gradient between ranks, relative to its norm. Ranks that compute the same differ by
rounding; ranks that see different heads or tokens differ by about 1."""


class Replicas:
    """Parameters outside the `tp_plan`, which must see the same input on all tensor-parallel ranks.

    A norm over each head, for example, sees different heads on each rank, and its copies would silently drift
    apart. The plan doesn't show that, so the gradients of the first step are compared.
    """

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self._module = module
        self._topology = topology
        self._checked = topology.degrees.tp == 1

    def check(self) -> None:
        """Compare the gradients at the first call; later calls do nothing. Collective.

        Raises:
            ValueError: naming the parameters whose gradients differ; on all ranks.
        """
        if self._checked:
            return
        self._checked = True
        topology = self._topology
        apart = [name for name, part in self._gradients() if self._differs(part)]
        named: list[list[str]] = [[] for _ in range(topology.world_size)]
        dist.all_gather_object(named, apart)
        if wrong := sorted({name for names in named for name in names}):
            raise ValueError(
                f"tp({topology.degrees.tp}) ranks have different gradients of {', '.join(wrong[:4])}"
                f"{', ...' if len(wrong) > 4 else ''}, which the tp_plan leaves out: each rank sees only its "
                "own heads, features or tokens; give such a norm the style 'replicated_with_grad_allreduce' "
                "(between a column-wise and a row-wise layer) or 'sequence_parallel'"
            )

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's parts of the gradients of parameters outside the plan, zeros if missing."""
        for name, parameter in self._module.named_parameters():
            axes = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
            if parameter.requires_grad and "tp" not in axes:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def _differs(self, gradient: Tensor) -> bool:
        """Return whether a gradient differs between the tensor-parallel ranks. Collective over them."""
        topology = self._topology
        mine = gradient.detach().to(topology.device, torch.float32)
        mean = mine.clone()
        dist.all_reduce(mean, group=topology.tp_mesh.get_group())
        mean /= topology.degrees.tp
        squares = torch.stack([(mine - mean).square().sum(), mean.square().sum()])
        dist.all_reduce(squares, group=topology.tp_mesh.get_group())  # so that all ranks get the same answer
        return bool(squares[0] > TOLERANCE**2 * squares[1])
