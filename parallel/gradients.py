"""Gradients across ranks: scalar parameters, the global norm, clipping."""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.agreement import Trace
from parallel.loss import Loss
from parallel.topology import Topology


def stays_whole(parameter: Tensor) -> bool:
    """Return whether every rank holds the parameter whole: fully_shard can't cut it."""
    return parameter.ndim == 0 or parameter.numel() == 0


class ScalarGradients:
    """Gradients of parameters without a dim, such as a temperature, which every rank holds whole."""

    def __init__(self, module: nn.Module, topology: Topology) -> None:
        self._topology = topology
        self._scalars = [p for p in module.parameters() if p.ndim == 0]
        self.begin_step()

    def begin_step(self) -> None:
        """Forget what the last step has summed."""
        self._are_sums = False
        self._apart: list[Tensor | None] = [None] * len(self._scalars)

    def before_backward(self) -> None:
        """Put sums apart, so that a further backward pass doesn't add to them what is yet to be summed."""
        if self._are_sums:
            self._apart, self._are_sums = [p.grad for p in self._scalars], False
            for parameter in self._scalars:
                parameter.grad = None

    def used(self) -> bool:
        """Return whether any of them has a gradient."""
        return any(p.grad is not None for p in self._scalars)

    def sum(self) -> None:
        """Sum them over the data-parallel ranks; without a gradient on any, one keeps None. Collective."""
        if not self._scalars:
            return
        device = self._topology.device
        gradients = [p.grad if p.requires_grad else None for p in self._scalars]
        parts = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self._scalars, gradients, strict=True)
        ]
        used = [torch.tensor(float(g is not None)) for g in gradients]
        total = torch.stack([part.to(device, torch.float32) for part in (*parts, *used)])
        for axis in ("replicate", "shard"):
            dist.all_reduce(total, group=self._topology.mesh.get_group(axis))
        gradient_sums, times_used = total.chunk(2)
        for parameter, gradient, times in zip(self._scalars, gradient_sums, times_used.tolist(), strict=True):
            parameter.grad = gradient.to(parameter.device) if times and parameter.requires_grad else None
        for parameter, earlier in zip(self._scalars, self._apart, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier + parameter.grad
        self._apart, self._are_sums = [None] * len(self._scalars), True


def count_for_all_ranks(module: nn.Module, topology: Topology) -> None:
    """Let gradients of sharded parameters that a loss uses by itself count as those of its forward pass do.

    An example is `p.full_tensor().square().sum()`, added to the loss. All data-parallel ranks add it, but a
    rank's shard of its gradient isn't summed over them.
    """
    ranks = topology.degrees.dp
    for parameter in module.parameters() if ranks > 1 else ():
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            parameter.register_hook(lambda gradient: gradient * ranks)  # type: ignore[no-untyped-call]


def drop_unused(used: Mapping[nn.Parameter, bool], topology: Topology, keep: Container[int]) -> None:
    """Set the gradients of parameters that no data-parallel rank has used to None, as on a single rank.

    An optimizer then neither decays them nor moves them by their momentum. `used` is `Zero.used` of this
    rank, `keep` has ids of parameters to leave alone. Collective over the data-parallel ranks.
    """
    flags = torch.tensor([float(u) for u in used.values()], device=topology.device)
    for axis in ("replicate", "shard"):
        dist.all_reduce(flags, group=topology.mesh.get_group(axis))
    for parameter, times in zip(used, flags.tolist(), strict=True):
        if times == 0 and id(parameter) not in keep:
            parameter.grad = None


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


class Step(NamedTuple):
    """Terms that one rank adds to the step's sums besides its loss and gradients. See `Sums`."""

    unused: int = 0
    """Trained parameters that had no gradient on this rank."""
    idle: bool = False
    """True if none had one."""
    traces: Sequence[Trace] = ()
    mode: int = 0
    """Number that says how the losses were weighed before the backward pass; the same on all ranks."""
    alarm: bool = False
    """A flag that ranks raise between steps."""
    unfit: bool = False
    """True if this rank's micro batches can't be weighed rightly."""
    extra: int = 0
    """Number of samples of this rank beyond the config's; negative if there were fewer."""


class Sums(NamedTuple):
    """Sums over all ranks, float64 scalars."""

    loss: Tensor
    terms: Tensor
    """Number of terms in the loss."""
    square: Tensor
    """Squared norm of the gradients."""
    alarms: Tensor
    unused: Tensor
    idle: Tensor
    apart: Tensor
    """0 if the ranks ran what they must run alike, so that the gradients are right; else positive."""
    unfit: Tensor
    """Number of ranks whose micro batches can't be weighed rightly."""
    extra: Tensor
    """Number of samples beyond the config's."""


def sum_over_ranks(
    loss: Loss | None,
    counted: list[Tensor],
    topology: Topology,
    step: Step = Step(),  # noqa: B008 (frozen)
) -> Sums:
    """Sum loss, gradients' norm and what `step` says over all ranks, in one collective.

    `loss` is None on ranks that don't know it; `counted` are the gradients that count on this rank.
    """
    square = square_sum(counted, topology.device)
    known = torch.zeros_like(square), torch.zeros_like(square)
    if loss is not None and topology.tp_rank == 0:  # all tensor-parallel ranks have the same loss
        known = loss.total.double(), loss.tokens.to(square)
    late = sum(trace.late for trace in step.traces)
    extra = step.extra if topology.tp_rank == 0 else 0  # the other tensor-parallel ranks have the same ones
    told = [step.alarm, step.unused, step.idle, late, step.unfit, extra]
    # Ranks of one stage must have the same mode and digest. Each adds them to its stage's slots, and their
    # squares: the variance shows a difference. They are integers of 16 bits, so the sums are exact.
    slots, at = [0] * (4 * topology.degrees.pp), 2 * topology.pp_rank
    digest = zlib.crc32(repr([trace.digest for trace in step.traces]).encode()) & 0xFFFF if step.traces else 0
    mode = step.mode & 0xFFFF
    slots[at : at + 2] = mode, digest
    slots[at + len(slots) // 2 : at + len(slots) // 2 + 2] = mode**2, digest**2
    here = torch.tensor([*told, *slots], dtype=torch.float64).to(topology.device, non_blocking=True)
    sums = torch.cat([torch.stack([*known, square]), here])
    dist.all_reduce(sums)
    total, tokens, square, alarms, unused, idle, late_sum, unfit, extras, *_ = sums.unbind()
    means, of_squares = sums[-len(slots) :].mul(topology.degrees.pp / topology.world_size).chunk(2)
    apart = late_sum + of_squares.sub(means.square()).gt(1e-5).sum()
    return Sums(total, tokens, square, alarms, unused, idle, apart, unfit, extras)


def clip_factor(norm: Tensor, max_norm: float) -> Tensor | float:
    """Return the factor, at most 1, that clips gradients of this norm: `torch.nn.utils.clip_grad_norm_`'s.

    A `max_norm` of 0 clips nothing.
    """
    return 1.0 if max_norm == 0 else (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _cut_by(parameter: nn.Parameter) -> set[str]:
    """Return the mesh axes that cut the parameter."""
    if not isinstance(parameter, DTensor):
        return set()
    names = parameter.device_mesh.mesh_dim_names or ()
    # Not `is_shard`, which is false for the strided shards of a dim that two axes cut.
    return {n for n, p in zip(names, parameter.placements, strict=True) if not p.is_replicate()}
