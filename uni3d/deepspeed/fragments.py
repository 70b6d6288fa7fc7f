"""`safe_get_*` and `safe_set_*` of `deepspeed.utils`: values, gradients and optimizer states by parameter.

The full forms give and take whole tensors, and are collective over the ranks that hold the parameter. The
local ones give and take this rank's part: neighbouring rows of the parameter, at any ZeRO stage. Parameters
are those of `engine.module`, at any moment at which modules show them. Gradients are there between the
backward pass that ends the accumulation and `step()`: those of the mean loss, without fp16's loss scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.fsdp_internals import sharded_of
from parallel.gathered import WholeParameter, part_here, set_whole, whole_of
from parallel.gradients import sum_over_ranks
from uni3d.deepspeed.engines import engine_of, name_of


def safe_get_full_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return a trained parameter's whole fp32 value; None before `initialize`, and of a frozen one."""
    found = _found(param, "safe_get_full_fp32_param")
    return None if found is None or not param.requires_grad else whole_of(_master(*found))


def safe_set_full_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set a parameter to a whole value, the same on all ranks. Local."""
    found = _found(param, "safe_set_full_fp32_param")
    if found is not None:
        engine, sharded = found
        value = _plain(value)
        _check_settable(engine, "safe_set_full_fp32_param")
        _check_shape(value, sharded.shape, "safe_set_full_fp32_param")
        for tensor in (sharded, _shown_whole(engine, sharded)):
            if tensor is not None:
                set_whole(tensor, value)


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return a whole state of the optimizer, such as "exp_avg"; None before the first step.

    Raises:
        KeyError: the optimizer has no state of that name.
    """
    state = _state(param, optim_state_key, "safe_get_full_optimizer_state")
    return None if state is None else whole_of(state)


def safe_set_full_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set a state of the optimizer to a whole value, the same on all ranks. Local.

    Raises:
        KeyError: the optimizer has no state of that name.
        RuntimeError: the parameter has no states before the first step.
    """
    state = _existing(_state(param, optim_state_key, "safe_set_full_optimizer_state"), optim_state_key)
    value = _plain(value)
    _check_shape(value, state.shape, "safe_set_full_optimizer_state")
    set_whole(state, value)


def safe_get_full_grad(param: nn.Parameter) -> Tensor | None:
    """Return a parameter's whole gradient in fp32; None if there is none."""
    found = _found(param, "safe_get_full_grad")
    if found is None:
        return param.grad
    engine, sharded = found
    divisor = _gradient_divisor(engine, "safe_get_full_grad")
    return None if sharded.grad is None else whole_of(sharded.grad).float() / divisor


def safe_set_full_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set a parameter's gradient to a whole value, the same on all ranks. Collective.

    Raises:
        RuntimeError: it has no gradient to replace.
    """
    found = _found(param, "safe_set_full_grad")
    if found is None:
        _existing(param.grad, "gradient").copy_(value)
        return
    engine, sharded = found
    divisor = _gradient_divisor(engine, "safe_set_full_grad")
    gradient, value = _existing(sharded.grad, "gradient"), _plain(value)
    _check_shape(value, gradient.shape, "safe_set_full_grad")
    set_whole(gradient, value * divisor)


def safe_update_full_grad_vectorized(
    param_list: Iterable[nn.Parameter], update_func: Callable[[Tensor, nn.Parameter], Tensor]
) -> None:
    """Set each gradient to `update_func(gradient, parameter)`. Collective."""
    for param in param_list:
        gradient = safe_get_full_grad(param)
        if gradient is not None:
            safe_set_full_grad(param, update_func(gradient, param))


# --- this rank's part ----------------------------------------------------------------------------------


def safe_get_local_fp32_param(param: nn.Parameter) -> Tensor | None:
    """Return a copy of this rank's part of a trained parameter, in fp32; None of a frozen one. Local."""
    found = _found(param, "safe_get_local_fp32_param")
    return None if found is None or not param.requires_grad else part_here(_master(*found)).clone()


def safe_set_local_fp32_param(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of a parameter. Collective at ZeRO 0 to 2, where modules show the whole one."""
    found = _found(param, "safe_set_local_fp32_param")
    if found is None:
        return
    engine, sharded = found
    _check_settable(engine, "safe_set_local_fp32_param")
    whole, zero = _shown_whole(engine, sharded), engine.model.zero
    if whole is not None:
        zero.reshard()  # else the whole one would bring the old value back
    _set_part(sharded, value, "safe_set_local_fp32_param")
    if whole is not None:
        zero.show_parameters()


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> Tensor | None:
    """Return a copy of this rank's part of an optimizer's state; None before the first step. Local."""
    state = _state(param, optim_state_key, "safe_get_local_optimizer_state")
    return None if state is None else part_here(state).clone()


def safe_set_local_optimizer_state(param: nn.Parameter, value: Tensor, optim_state_key: str) -> None:
    """Set this rank's part of an optimizer's state. Local."""
    state = _existing(_state(param, optim_state_key, "safe_set_local_optimizer_state"), optim_state_key)
    _set_part(state, value, "safe_set_local_optimizer_state")


def safe_get_local_grad(param: nn.Parameter) -> Tensor | None:
    """Return a copy of this rank's part of a gradient. Collective where a loss is `(sum, count)`."""
    found = _found(param, "safe_get_local_grad")
    if found is None:
        return param.grad
    divisor = _gradient_divisor(found[0], "safe_get_local_grad")
    gradient = found[1].grad
    return None if gradient is None else part_here(gradient).float() / divisor


def safe_set_local_grad(param: nn.Parameter, value: Tensor) -> None:
    """Set this rank's part of a gradient. Collective where a loss is `(sum, count)`."""
    found = _found(param, "safe_set_local_grad")
    if found is None:
        return
    divisor = _gradient_divisor(found[0], "safe_set_local_grad")
    _set_part(_existing(found[1].grad, "gradient"), value * divisor, "safe_set_local_grad")


# --- the tensors behind a parameter --------------------------------------------------------------------


def _found(parameter: nn.Parameter, call: str) -> tuple[Any, nn.Parameter] | None:
    """Return a parameter's engine and its sharded form, or None before `initialize`."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{call} got a {type(parameter).__name__}; pass a parameter of engine.module")
    if isinstance(parameter, WholeParameter):
        raise RuntimeError(f"{call} can't be called inside GatheredParameters, where the parameter is whole")
    engine = engine_of(parameter)
    return None if engine is None else (engine, sharded_of(parameter))


def _master(engine: Any, sharded: nn.Parameter) -> nn.Parameter:
    engine.model.zero.carry_writes()  # what the script wrote to the whole parameter
    return sharded


def _shown_whole(engine: Any, sharded: nn.Parameter) -> nn.Parameter | None:
    """Return the whole parameter that modules show in the place of a sharded one, or None."""
    shown = (p for p in engine.module.parameters() if p is not sharded and sharded_of(p) is sharded)
    return next(shown, None)


def _state(parameter: nn.Parameter, key: str, call: str) -> Tensor | None:
    found = _found(parameter, call)
    if found is None or found[0].optimizer is None:
        return None
    states = found[0].optimizer.state.get(found[1], {})
    if states and not isinstance(states.get(key), Tensor):
        known = ", ".join(name for name, value in states.items() if isinstance(value, Tensor))
        raise KeyError(f"{name_of(*found)} has no optimizer state {key!r}; it has {known}")
    state: Tensor | None = states.get(key)
    return state


def _existing(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise RuntimeError(
            f"the parameter has no {what} to set: optimizer states are there from the first step on, and "
            "gradients between the backward pass that ends the accumulation and step()"
        )
    return tensor


def _plain(value: Tensor) -> Tensor:
    """Return a whole value as a plain tensor. One made by `torch.empty_like(parameter)` may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _check_shape(value: Tensor, shape: torch.Size, call: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{call} got the shape {tuple(value.shape)}; expected {tuple(shape)}")


def _set_part(tensor: Tensor, value: Tensor, call: str) -> None:
    part = part_here(tensor)
    if value.numel() != part.numel():
        raise ValueError(
            f"{call} got {value.numel()} elements; this rank's part is {tuple(part.shape)}, {part.numel()}"
        )
    part.copy_(value.reshape(part.shape))


# --- the moment in a step ------------------------------------------------------------------------------


def _check_settable(engine: Any, call: str) -> None:
    if engine._micro.losses and not engine._micro.awaits_step:
        raise RuntimeError(
            f"{call} can't be called between the micro batches of a step; call it after the last backward "
            "pass, or between two steps"
        )


def _gradient_divisor(engine: Any, call: str) -> float:
    """Return by how much the accumulated gradients are larger than those of the mean loss.

    Raises:
        RuntimeError: gradients aren't complete, as only some micro batches are done.
    """
    micro, scaler = engine._micro, engine.scaler
    if not micro.losses:
        return 1.0  # there are none, or ones that the script has put there
    if micro._inside_no_sync:
        raise RuntimeError(
            f"{call} can't be called inside no_sync(), where gradients are each rank's own; call it after "
            "the next backward() outside"
        )
    if not micro.awaits_step:
        raise RuntimeError(
            f"{call} needs the gradients of the whole step, which are summed over ranks in its last backward "
            f"pass: {len(micro.losses)} of {engine.gradient_accumulation_steps()} micro batches are done"
        )
    if scaler is None and micro.share != 1.0:
        return 1.0  # means, which were divided before the backward passes
    terms = sum_over_ranks(micro.total(), [], engine.model.topology).terms.item()
    return float(terms * (micro.share if scaler is None else scaler.factor))
