"""Check of what tensor parallelism leaves whole: gradients and losses must agree on all of its ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.loss import Loss
from parallel.topology import Topology

TOLERANCE = 0.05
"""Largest difference of a gradient between ranks, relative to its norm. Ranks that compute the same differ by
rounding; ranks that see different heads or tokens differ by about 1."""

LOSS_TOLERANCE = 1e-3
"""The same for the loss. Ranks that have different features of the model's output may differ by a percent."""

BUCKETS = 32
"""Number of sums that stand for a gradient: each element is added to one of them, with a random sign."""


class Replicas:
    """Parameters outside the `tp_plan`, which must see the same input on all tensor-parallel ranks.

    A norm over each head, for example, sees different heads on each rank, and its copies would silently drift
    apart. The plan doesn't show that, so gradients are compared: of each parameter once, at the first step at
    which it has one that isn't zero. So is the loss, at the first step.
    """

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self._module = module
        self._topology = topology
        self._here: dict[str, nn.Parameter] = {}
        self._unseen: list[list[str]] | None = None if topology.degrees.tp > 1 else []
        """Names not compared yet, at each place on the pipeline axis; None before the first step."""
        self._loss_seen = topology.degrees.tp == 1

    def check(self, loss: Loss | None) -> None:
        """Compare what hasn't been compared, in one collective over all ranks; nothing is done once all has.

        `loss` is None on ranks that don't know it.

        Raises:
            ValueError: naming the parameters whose gradients differ, or the losses; on all ranks.
        """
        if self._unseen is None:
            self._here = {n: p for n, p in self._module.named_parameters() if "tp" not in _axes(p)}
            self._unseen = [[] for _ in range(self._topology.degrees.pp)]
            dist.all_gather_object(self._unseen, list(self._here), group=self._topology.pp_group)
        rows = [(place, name) for place, names in enumerate(self._unseen) for name in names]
        if self._topology.degrees.pp == 1:  # else a rank doesn't know what is frozen elsewhere
            rows = [(place, name) for place, name in rows if self._here[name].requires_grad]
        if not rows and self._loss_seen:
            return
        table = self._table(rows, loss)
        finite, same = table[..., -1].sum(0) == 0, _same(table)
        seen = finite & (table[..., -2].sum(0) > 0)
        apart = [name for i, (_, name) in enumerate(rows) if finite[i] and not same[i]]
        if apart:
            raise ValueError(self._different_gradients(apart))
        if finite[-1] and not self._loss_seen and not same[-1]:
            raise ValueError(self._different_losses(table[:, -1, 0].tolist()))
        compared = {row for i, row in enumerate(rows) if seen[i]}
        self._unseen = [[n for n in names if (i, n) not in compared] for i, names in enumerate(self._unseen)]
        self._loss_seen |= bool(seen[-1])

    def _table(self, rows: list[tuple[int, str]], loss: Loss | None) -> Tensor:
        """Return all ranks' fingerprints `(tp rank, row, numbers)`, on the CPU; the last row is the loss.

        Parts on data-parallel ranks are added up. Collective.
        """
        topology = self._topology
        table = torch.zeros(topology.degrees.tp, len(rows) + 1, BUCKETS + 2, device=topology.device)
        mine = table[topology.tp_rank]
        shard = topology.mesh.get_local_rank("shard")
        for i, (place, name) in enumerate(rows):
            if place == topology.pp_rank and _counts_here(self._here[name], topology):
                gradient = self._here[name].grad
                if gradient is not None:
                    mine[i] = _fingerprint(gradient, shard, topology.device)
        if loss is not None:
            total = loss.total.detach().float()
            mine[-1, 0] = total.nan_to_num(0, 0, 0)
            mine[-1, -2], mine[-1, -1] = total.square().nan_to_num(0, 0, 0), ~total.isfinite()
        dist.all_reduce(table)
        return table.cpu()

    def _different_gradients(self, names: list[str]) -> str:
        return (
            f"tp({self._topology.degrees.tp}) ranks have different gradients of {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}, which the tp_plan leaves out: each rank sees only its "
            "own heads, features or tokens; give such a norm the style 'replicated_with_grad_allreduce' "
            "(between a column-wise and a row-wise layer) or 'sequence_parallel'"
        )

    def _different_losses(self, losses: list[float]) -> str:
        return (
            f"tp({self._topology.degrees.tp}) ranks have different losses, {losses[0]:g} and "
            f"{next(other for other in losses if other != losses[0]):g}: the loss is computed from outputs "
            "that are split; give the tp_plan's last layer the style 'colwise_gather_output' or, for logits, "
            "'colwise_logits'"
        )


def _same(table: Tensor) -> Tensor:
    """Return for each row of fingerprints whether the tensor-parallel ranks agree."""
    sums, squares = table[..., :BUCKETS], table[..., -2].sum(0)
    away = (sums - sums.mean(0)).square().sum((0, 2))
    tolerance = torch.full_like(squares, TOLERANCE**2)
    tolerance[-1] = LOSS_TOLERANCE**2
    loss = sums[:, -1, 0]
    squares[-1] = loss.square().sum()  # of sums over data-parallel ranks
    return away <= tolerance * squares


def _fingerprint(gradient: Tensor, shard: int, device: torch.device) -> Tensor:
    """Return the gradient's sums, its square and 0; all zeros and 1 if it isn't finite.

    The squared difference of two gradients' sums is that of the gradients, in expectation.
    """
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    flat = local.detach().flatten().to(device, torch.float32)
    dice = torch.Generator(device).manual_seed(shard)  # the same on all tensor-parallel ranks
    thrown = torch.randint(2 * BUCKETS, flat.shape, generator=dice, device=device)
    sums = flat.new_zeros(2 * BUCKETS).index_add_(0, thrown, flat).view(2, BUCKETS)
    square = flat.square().sum()
    numbers = torch.cat([sums[0] - sums[1], square[None], square.new_zeros(1)])
    return numbers.where(square.isfinite(), _NOT_FINITE.to(square))


_NOT_FINITE = torch.tensor([0.0] * (BUCKETS + 1) + [1.0])


def _axes(parameter: nn.Parameter) -> tuple[str, ...]:
    """Return the mesh axes on which a parameter is placed."""
    return parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()


def _counts_here(parameter: nn.Parameter, topology: Topology) -> bool:
    """Return whether this rank's part is the first copy of it among the data-parallel ranks."""
    whole = {"replicate", "shard"}
    if isinstance(parameter, DTensor):
        placed = zip(_axes(parameter), parameter.placements, strict=True)
        whole -= {axis for axis, placement in placed if not placement.is_replicate()}
    return all(topology.mesh.get_local_rank(axis) == 0 for axis in whole)
