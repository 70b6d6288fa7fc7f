"""Tied weights: found by name, and their gradients summed where stages share them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.placement import Placement
from parallel.topology import Topology


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the other names of parameters that have several, as `{alias: first name}`."""
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            ties[name] = first[id(parameter)]
    return ties


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
        self.shared: set[int] = set()
        """Ids of this rank's parameters that other stages hold too, and that are trained."""
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
                    self.shared |= {id(parameter) for parameter in copies.values()}
                self.copies |= {name for stage, name in here.items() if stage != holders[0]}

    def sum(self) -> None:
        """Replace each copy's gradient by the sum over its stages. Collective over the pipeline."""
        device = self._topology.device
        for copies, holders in self._shared:
            gradients = {stage: _gradient(parameter) for stage, parameter in copies.items()}
            example = next(iter(gradients.values()))
            if example.numel() == 0:  # a shard that is empty here is empty on every stage
                continue
            terms = {
                stage: torch.empty_like(example, device=device) for stage in holders if stage not in copies
            }
            # On the compute device, as an offloaded gradient can't be sent.
            terms |= {s: gradient.to(device, copy=True) for s, gradient in gradients.items()}
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


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # this stage holds the parameter without using it
        parameter.grad = torch.zeros_like(parameter)
    grad = parameter.grad
    return grad._local_tensor if isinstance(grad, DTensor) else grad
