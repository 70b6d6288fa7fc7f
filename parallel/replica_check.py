"""Parameters that tensor parallelism leaves whole: whether their ranks do learn the same."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.topology import Topology

TOLERANCE = 0.05
"""By how much a gradient may differ between ranks, relative to its norm. Ranks that compute the same differ
by rounding; those that see different heads or tokens, by about 1."""


class Replicas:
    """What a `tp_plan` leaves out must see the same input on all tensor-parallel ranks.

    A norm over each head, say, sees other heads on each rank, and each would go its own way without a word.
    No plan can tell, so the gradients of the first step are compared.
    """

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self._module = module
        self._topology = topology
        self._checked = topology.degrees.tp == 1

    def check(self) -> None:
        """Collective, at the first call that finds gradients; nothing at later ones.

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
                f"{', ...' if len(wrong) > 4 else ''}, which the tp_plan leaves out: each sees only its own "
                "heads, features or tokens; give such a norm the style 'replicated_with_grad_allreduce' "
                "(between a column-wise and a row-wise layer) or 'sequence_parallel'"
            )

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parts of the gradients of what the plan leaves out, zeros where none came."""
        for name, parameter in self._module.named_parameters():
            axes = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
            if parameter.requires_grad and "tp" not in axes:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                yield name, gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def _differs(self, gradient: Tensor) -> bool:
        """Collective over the tensor-parallel ranks."""
        topology = self._topology
        mine = gradient.detach().to(topology.device, torch.float32)
        mean = mine.clone()
        dist.all_reduce(mean, group=topology.tp_mesh.get_group())
        mean /= topology.degrees.tp
        squares = torch.stack([(mine - mean).square().sum(), mean.square().sum()])
        dist.all_reduce(squares, group=topology.tp_mesh.get_group())  # so that all come to the same answer
        return bool(squares[0] > TOLERANCE**2 * squares[1])
