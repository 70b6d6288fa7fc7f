"""Gradient hooks and attributes that a script has put on parameters, carried over to the sharded ones.

Sharding replaces each parameter by two: the sharded one, which the optimizer has, and the whole one, with
which the model computes. Attributes go to both, gradient hooks to the whole one. What can't be carried over
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.gradients import count_for_all_ranks
from parallel.state_dicts import set_state_dict_hooks
from parallel.topology import Topology
from parallel.zero import ZeroStages

GradientHook = Callable[[Tensor], Tensor | None]


class Extras(NamedTuple):
    """Attributes and gradient hooks that a script has put on one parameter."""

    attributes: dict[str, Any]
    hooks: list[GradientHook]


def find_extras(model: nn.Module) -> dict[str, Extras]:
    """Return the extras of each parameter that has some, by name.

    Raises:
        ValueError: a parameter has a hook that can't be carried over, or is also kept where sharding can't
            replace it; names it.
    """
    _check_kept_elsewhere(model)
    _check_memory(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            _check_embedding(name, module)
    found = {}
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook by register_post_accumulate_grad_hook, which would see one rank's "
                "gradient before it is reduced; use register_hook, or change .grad before step()"
            )
        hooks = list((parameter._backward_hooks or {}).values())
        if hooks or vars(parameter):
            found[name] = Extras(dict(vars(parameter)), hooks)
    return found


def set_hooks(module: nn.Module, zero: ZeroStages, extras: Mapping[str, Extras], topology: Topology) -> None:
    """Put the extras and our own hooks on this rank's parameters; from now on, changes of them are noticed.

    Raises:
        ValueError: see `carry_over`.
    """
    carry_over(module, zero, extras)
    count_for_all_ranks(module, topology)
    set_state_dict_hooks(module, topology)
    zero.start()


def carry_over(module: nn.Module, zero: ZeroStages, extras: Mapping[str, Extras]) -> None:
    """Put the extras on this rank's parameters.

    Raises:
        ValueError: a parameter with a hook is cut by tensor parallelism, so the hook would see a part of it.
    """
    for name, parameter in module.named_parameters():
        if (extra := extras.get(name)) is None:
            continue
        if (
            extra.hooks
            and isinstance(parameter, DTensor)
            and "tp" in (parameter.device_mesh.mesh_dim_names or ())
        ):
            raise ValueError(
                f"{name} has a gradient hook, which would see only the part that tensor parallelism leaves "
                "on a rank; use tp=1, or register it on a parameter outside the tp_plan"
            )
        vars(parameter).update(extra.attributes)
        zero.on_whole(parameter, lambda whole, extra=extra: _put_on(whole, extra))  # type: ignore[misc]


def _put_on(whole: nn.Parameter, extra: Extras) -> None:
    vars(whole).update(extra.attributes)
    trained = whole.requires_grad
    whole.requires_grad_(True)  # a frozen one takes no hooks, but may be trained later
    for hook in extra.hooks:
        whole.register_hook(hook)  # type: ignore[no-untyped-call]
    whole.requires_grad_(trained)


def _check_kept_elsewhere(model: nn.Module) -> None:
    """Refuse parameters that a module also keeps in a plain list, dict or tuple, or as a view."""
    names = {id(p): name for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in _REGISTRIES or (isinstance(module, nn.RNNBase) and attribute == "_flat_weights"):
                continue
            for tensor in tensors_in(value):
                name = names.get(id(tensor)) or names.get(id(tensor._base))
                if name is not None:
                    place = f"{prefix}.{attribute}" if prefix else attribute
                    raise ValueError(
                        f"the parameter {name} is also kept in {place}, a {type(value).__name__} of "
                        f"{type(module).__name__}, where sharding can't replace it; use a ParameterList or "
                        "ParameterDict, or look the parameter up in forward()"
                    )


def _check_embedding(name: str, module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.max_norm is not None:
        raise ValueError(
            f"{name} has max_norm, with which each rank would change the rows that it reads, and lose the "
            "change; leave max_norm out"
        )
    if module.sparse:
        raise ValueError(f"{name} has sparse gradients, which can't be sharded; leave out sparse=True")


def _check_memory(model: nn.Module) -> None:
    """Refuse parameters that share memory with another tensor, which sharding would separate."""
    named = [*model.named_parameters(), *model.named_buffers()]
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _REGISTRIES and isinstance(value, Tensor):
                named.append((f"{prefix}.{attribute}".removeprefix("."), value))
    spans = sorted((*_span(t), name, isinstance(t, nn.Parameter)) for name, t in named if _has_memory(t))
    for (_, end, name, is_parameter), (start, _, other, other_is) in pairwise(spans):
        if start < end and (is_parameter or other_is):
            raise ValueError(
                f"{name} and {other} share memory, which sharding would separate; tie parameters by "
                "assigning the same Parameter, and compute other tensors from them in forward()"
            )


def _has_memory(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor and of the one after its last."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
    return local.data_ptr(), local.data_ptr() + (last + 1) * local.element_size()


_REGISTRIES = frozenset(vars(nn.Module()))


def tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    """Yield the tensors in plain containers, a dict's keys among them."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, list | tuple | set | dict):
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from tensors_in(item, depth - 1)
