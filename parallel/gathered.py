"""Sharded parameters made whole for a while: the same objects, as plain tensors that scripts read and write.

A script holds parameters, not names, so the object itself changes: a sharded parameter, a DTensor, becomes a
plain tensor of the whole value (`WholeParameter`), and afterwards a DTensor again. Modules, the optimizer and
`fully_shard` know it by identity, and notice nothing. Its shard stays where it was all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.dtensor_layout import copy_from_full, local_part, narrow_to
from parallel.fsdp_internals import group_of, parameters_of
from parallel.topology import Topology

_AXES = ("replicate", "shard", "tp")
"""Axes of the mesh along which all ranks have the same parameters, or parts of them."""
_CHUNK = 1 << 20


class WholeParameter(torch.Tensor):
    """A parameter while its whole value is gathered. Copies and results of operations are plain tensors."""

    __slots__ = (
        "_local_tensor",
        "_spec",
    )  # as in DTensor, so that an object can change from one to the other
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.detach().clone(), requires_grad=self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), requires_grad=self.requires_grad).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


@torch.no_grad()
def whole_of(tensor: Tensor) -> Tensor:
    """Return the whole value of a sharded tensor, new memory on the device that computes. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    here = cast(DTensor, tensor.detach().to(tensor.device_mesh.device_type))  # it may be offloaded
    whole = here.full_tensor()
    return whole.clone() if whole.data_ptr() == here.to_local().data_ptr() else whole


def set_whole(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor, sharded or not, to a whole value; each rank takes its part. Local."""
    copy_from_full(tensor, value.to(tensor.device))


def part_here(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, as live memory."""
    return local_part(tensor).data


@contextmanager
def gathered(
    module: nn.Module,
    topology: Topology,
    named: Sequence[tuple[str, nn.Parameter]],
    source: int | None,
    *,
    run_alike: bool,
) -> Iterator[None]:
    """Make parameters of `module`, each given once with its name, whole and plain inside. Collective.

    Each rank keeps its part of what was written. With `source`, that rank's values count (under pipelines, in
    each stage those of the rank at its place). Without it all ranks must have written the same. If the body
    raises, what it wrote to sharded parameters is lost. `run_alike` says that all ranks run the same layers,
    as at ZeRO stage 3, so that they can agree on whether the model may run inside.

    Raises:
        RuntimeError: parameters are in use by a pass; on all ranks, they differ over the ranks at the end; a
            parameter was given another shape.
    """
    _check_unused(module)
    sharded: list[tuple[str, nn.Parameter]] = [(name, p) for name, p in named if isinstance(p, DTensor)]
    with _guarded(module, topology, [p for _, p in named], may_run=run_alike and source is None):
        twins = [whole_of(p) for _, p in sharded]
        for (_, parameter), twin in zip(sharded, twins, strict=True):
            _become_whole(parameter, twin)
        try:
            yield
            if source is not None:
                for _, parameter in named:
                    broadcast(parameter, topology, source)
            elif unlike := _differing(sharded, topology):
                raise RuntimeError(
                    f"{unlike} differs over the ranks at the end of GatheredParameters; write the same on "
                    "all ranks, or pass modifier_rank, the rank whose values count"
                )
        finally:
            for (_, parameter), twin in zip(sharded, twins, strict=True):
                _become_sharded(parameter, twin)
    for (name, parameter), whole in zip(sharded, twins, strict=True):
        if whole.shape != parameter.shape:
            raise RuntimeError(
                f"{name} was given the shape {tuple(whole.shape)} inside GatheredParameters; it has "
                f"{tuple(parameter.shape)}, and a model changes its shapes before initialize()"
            )
        copy_from_full(parameter, whole.detach())


def _become_whole(parameter: nn.Parameter, twin: Tensor) -> None:
    twin.requires_grad_(parameter.requires_grad)
    parameter.__class__ = WholeParameter  # type: ignore[assignment]
    torch._C._swap_tensor_impl(parameter, twin)


def _become_sharded(parameter: nn.Parameter, twin: Tensor) -> None:
    torch._C._swap_tensor_impl(parameter, twin)
    parameter.__class__ = DTensor  # type: ignore[assignment]


@torch.no_grad()
def broadcast(parameter: Tensor, topology: Topology, source: int) -> None:
    """Give a plain tensor the values of rank `source`, or in another stage of the rank at its place."""
    at = dict(zip(topology.mesh.mesh_dim_names or (), _place(topology, source), strict=True))
    value = as_bytes(parameter, topology.device)
    for axis in reversed(_AXES):  # along the source's own line first, then from there on
        group = topology.mesh.get_group(axis)
        if group.size() > 1:
            dist.broadcast(value, src=dist.get_global_rank(group, at[axis]), group=group)
    from_bytes(parameter, value)


def as_bytes(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor's memory as bytes: gloo doesn't support every type."""
    return tensor.detach().to(device).reshape(-1).clone().view(torch.uint8)


def from_bytes(tensor: Tensor, value: Tensor) -> None:
    """Copy the bytes of a tensor of the same type and shape into it."""
    with torch.no_grad():
        tensor.detach().copy_(value.view(tensor.dtype).view(tensor.shape))


def _place(topology: Topology, rank: int) -> list[int]:
    found = (topology.mesh.mesh == rank).nonzero().tolist()
    if not found:
        raise ValueError(f"modifier_rank is {rank}; the ranks are 0 to {topology.world_size - 1}")
    place: list[int] = found[0]
    return place


def _differing(sharded: Sequence[tuple[str, nn.Parameter]], topology: Topology) -> str | None:
    """Return the name of a whole parameter that ranks of a stage hold different values of. Collective."""
    if not sharded:
        return None
    prints = torch.stack([fingerprint(parameter).to(topology.device) for _, parameter in sharded])
    extremes = torch.stack([prints, ~prints])
    for axis in _AXES:
        group = topology.mesh.get_group(axis)
        if group.size() > 1:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    unlike = (extremes[0] != ~extremes[1]).nonzero()
    return sharded[int(unlike[0])][0] if len(unlike) else None


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return 64 bits that differ, most likely, where the bits or the shape of a tensor do."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().reshape(-1)
    bits = flat.view(integers[tensor.element_size()])
    total = torch.tensor(hash(tuple(tensor.shape)), device=tensor.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        place = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        mixed = (
            chunk ^ (place * -7046029254386353131)
        ) * -4417276706812531889  # odd: each step is a bijection
        total = total * 31 + (mixed ^ (mixed >> 29)).sum()
    return total


def _groups(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield fully_shard's states and groups of the sharded modules."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            yield part._get_fsdp_state(), group_of(part)


def _check_unused(module: nn.Module) -> None:
    for state, _ in _groups(module):
        state._lazy_init()  # it would not know the parameters while they are whole
        if state._training_state.name != "IDLE":
            raise RuntimeError(
                "GatheredParameters was entered inside a forward or backward pass, which would lose the "
                "gradients of what it gathers; enter it between two steps"
            )


@contextmanager
def _guarded(
    module: nn.Module, topology: Topology, parameters: Iterable[nn.Parameter], *, may_run: bool
) -> Iterator[None]:
    """Refuse passes inside that would compute with other values than the script sees.

    A layer is gathered from its shards. So if all ranks run the same layers, a forward pass `may_run` as long
    as nothing was written.
    """
    mine = {id(p) for p in parameters}
    changed: list[tuple[Any, Callable[..., Any], Callable[..., Any], list[Any]]] = []
    for part in module.modules():
        records = parameters_of(part) if isinstance(part, FSDPModule) else []
        here = [r for r in records if mine & {id(r.sharded_param), id(getattr(r, "_unsharded_param", None))}]
        if here:
            group = group_of(cast(FSDPModule, part))
            changed.append((group, group.unshard, group.post_backward, here))
            check = partial(_check_fresh, here, topology, may_run=may_run)
            group.unshard = partial(_unshard, group.unshard, check)
            group.post_backward = _refuse_backward
            for record in here:  # load_state_dict calls it, to see whether the shard has moved
                record.reset_sharded_param = lambda: None
    try:
        yield
    finally:
        for state, group in _groups(module):  # a pass that was refused has left them as in the middle of it
            for part in (state, group):
                if part is not None:
                    part._training_state = type(part._training_state).IDLE
        for group, unshard, post_backward, records in changed:
            group.unshard, group.post_backward = unshard, post_backward
            for record in records:
                del record.reset_sharded_param


def _unshard(unshard: Callable[..., None], check: Callable[[], None], async_op: bool = False) -> None:
    check()
    unshard(async_op)


def _check_fresh(records: list[Any], topology: Topology, *, may_run: bool) -> None:
    """Check that the shards of a layer hold what the script sees. Collective if passes `may_run`."""
    stale = torch.tensor(float(not may_run), device=topology.device)
    for parameter in (r.sharded_param for r in records if may_run):
        if isinstance(parameter, WholeParameter):
            part = local_part(_shard_of(parameter))
            if not torch.equal(narrow_to(parameter.detach(), part).to(part.data), part.data):
                stale.fill_(1.0)
    for axis in _AXES if may_run else ():
        dist.all_reduce(stale, op=dist.ReduceOp.MAX, group=topology.mesh.get_group(axis))
    if stale > 0:
        raise RuntimeError(
            "a forward pass inside GatheredParameters would compute with the values from before it; leave it "
            "first (at ZeRO-3 the model may run inside if there is no modifier_rank and nothing was written)"
        )


def _shard_of(parameter: Tensor) -> Tensor:
    """Return a new DTensor of the shard of a parameter that is whole."""
    local, spec = cast(Any, parameter)._local_tensor, cast(Any, parameter)._spec
    return DTensor.from_local(
        local.detach(), spec.mesh, spec.placements, run_check=False, shape=spec.shape, stride=spec.stride
    )


def _refuse_backward(*_: Any) -> NoReturn:
    raise RuntimeError("a backward pass inside GatheredParameters would lose its gradients; leave it first")
