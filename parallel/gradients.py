"""Gradients across ranks: tied weights, scalar parameters, the global norm."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.loss import Loss
from parallel.placement import Placement
from parallel.topology import Topology


class TiedGradients:
    """Gradients of tied weights that several pipeline stages hold, summed over these stages.

    The copies then take the same optimizer steps, so they stay equal bit for bit.
    """

    def __init__(
        self,
        module: nn.Module,
        ties: Mapping[str, str],
        stage_names: Sequence[set[str]],
        placement: Placement,
        topology: Topology,
    ) -> None:
        """Take `ties` (alias -> first name) and the parameter names on each stage."""
        self._topology = topology
        self._ranks = placement.ranks
        self._shared: list[tuple[dict[int, nn.Parameter], list[int]]] = []
        self.copies: set[str] = set()
        """This rank's parameters that an earlier stage holds too; that stage counts and saves them."""
        mine = dict(module.named_parameters())
        for first in sorted(set(ties.values())):
            names = {first, *(alias for alias, name in ties.items() if name == first)}
            holders = [stage for stage, held in enumerate(stage_names) if names & held]
            here = {
                stage: min(names & stage_names[stage] & mine.keys())
                for stage in holders
                if placement.ranks[stage] == topology.pp_rank
            }
            if len(holders) > 1 and here:
                copies = {stage: mine[name] for stage, name in here.items()}
                if all(parameter.requires_grad for parameter in copies.values()):
                    self._shared.append((copies, holders))
                self.copies |= {name for stage, name in here.items() if stage != holders[0]}

    def sum(self) -> None:
        """Replace each copy's gradient by the sum over its stages. Collective over the pipeline."""
        for copies, holders in self._shared:
            gradients = {stage: _gradient(parameter) for stage, parameter in copies.items()}
            example = next(iter(gradients.values()))
            if example.numel() == 0:  # a shard that is empty here is empty on every stage
                continue
            terms = {stage: torch.empty_like(example) for stage in holders if stage not in copies}
            terms |= {stage: gradient.clone() for stage, gradient in gradients.items()}
            self._exchange(terms, copies.keys())
            # In stage order on every rank, so that the copies get the same bits.
            total = torch.stack([terms[stage] for stage in holders]).sum(0)
            for gradient in gradients.values():
                gradient.copy_(total)

    def _exchange(self, terms: Mapping[int, Tensor], mine: Collection[int]) -> None:
        """Send this rank's terms to the other holders and receive theirs, in stage order."""
        group, me = self._topology.pp_group, self._topology.pp_rank
        others = {self._ranks[stage] for stage in terms} - {me}
        operations = []
        for stage in sorted(terms):
            if stage in mine:
                for rank in sorted(others):
                    peer = dist.get_global_rank(group, rank)
                    operations.append(dist.P2POp(dist.isend, terms[stage], peer, group))
            else:
                peer = dist.get_global_rank(group, self._ranks[stage])
                operations.append(dist.P2POp(dist.irecv, terms[stage], peer, group))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


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


def _cut_by(parameter: nn.Parameter) -> set[str]:
    """Return the mesh axes that cut the parameter."""
    if not isinstance(parameter, DTensor):
        return set()
    names = parameter.device_mesh.mesh_dim_names or ()
    # Not `is_shard`, which is false for the strided shards of a dim that two axes cut.
    return {n for n, p in zip(names, parameter.placements, strict=True) if not p.is_replicate()}


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # this stage holds the parameter without using it
        parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
