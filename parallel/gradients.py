"""Gradients across ranks: scalar parameters, the global norm, clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.loss import Loss
from parallel.topology import Topology


class ScalarGradients:
    """Gradients of parameters without a dim, such as a temperature, which every rank holds whole."""

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self._topology = topology
        self._scalars = [p for p in module.parameters() if p.ndim == 0 and p.requires_grad]

    def sum(self) -> None:
        """Sum them over the data-parallel ranks, since fully_shard ignores these parameters. Collective."""
        if not self._scalars:
            return
        device = self._topology.device
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._scalars]
        total = torch.stack([part.to(device) for part in parts])
        for axis in ("replicate", "shard"):
            dist.all_reduce(total, group=self._topology.mesh.get_group(axis))
        for parameter, gradient in zip(self._scalars, total, strict=True):
            parameter.grad = gradient.to(parameter.device)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor | None]:
    """Return this rank's parts of the gradients, as live memory; None for a parameter without a gradient."""
    gradients = [parameter.grad for parameter in parameters]
    return [g._local_tensor if isinstance(g, DTensor) else g for g in gradients]


def counts_here(parameter: nn.Parameter, topology: Topology) -> bool:
    """Return whether this rank's part counts in a sum over all ranks: only the first holder's does."""
    coordinates = {axis: topology.mesh.get_local_rank(axis) for axis in ("replicate", "shard", "tp")}
    return all(coordinates[axis] == 0 for axis in coordinates.keys() - _cut_by(parameter))


def square_sum(counted: list[Tensor], device: torch.device) -> Tensor:
    """Return this rank's contribution to the squared norm of all gradients, a float64 scalar."""
    if not counted:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(counted, 2)
    return torch.stack(list(norms)).double().square().sum().to(device)  # they may be offloaded


def sum_over_ranks(
    loss: Loss | None, counted: list[Tensor], topology: Topology, alarm: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return summed loss, number of its terms, squared gradient norm and number of alarms. Collective.

    `loss` is None on ranks that don't know it; `counted` are the gradients that count on this rank. `alarm`
    is a flag that ranks raise between steps; it is summed along to save a collective. All results are float64
    scalars.
    """
    square = square_sum(counted, topology.device)
    known = torch.zeros_like(square), torch.zeros_like(square)
    if loss is not None and topology.tp_rank == 0:  # all tensor-parallel ranks have the same loss
        known = loss.total.double(), loss.tokens.to(square)
    sums = torch.stack([*known, square, torch.full_like(square, alarm)])
    dist.all_reduce(sums)
    total, tokens, square, alarms = sums.unbind()
    return total, tokens, square, alarms


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor, at most 1, that clips gradients of this norm; `torch.nn.utils.clip_grad_norm_`'s."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _cut_by(parameter: nn.Parameter) -> set[str]:
    """Return the mesh axes that cut the parameter."""
    if not isinstance(parameter, DTensor):
        return set()
    names = parameter.device_mesh.mesh_dim_names or ()
    # Not `is_shard`, which is false for the strided shards of a dim that two axes cut.
    return {n for n, p in zip(names, parameter.placements, strict=True) if not p.is_replicate()}
