"""Access to the private records of torch's fully_shard, and changes to them.

torch has no public API for: gathering and reducing layers in an order of our own, gradients of zero for
parameters that a rank didn't use, taking whole gradients without reduction, and computing with a parameter in
place. All of it is here, and `check_records` refuses a torch that lacks one of the attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

STATE_RECORDS = (
    "_comm_ctx",
    "_fsdp_param_group",
    "_lazy_init",
    "_register_pre_backward_hook",
    "_root_post_backward_final_callback",
)
GROUP_RECORDS = (
    "fsdp_params",
    "_all_gather_result",
    "_post_forward_indices",
    "_register_state_dict_hooks",
    "_partial_reduce_output",
    "_register_post_backward_hook",
    "_training_state",
    "all_reduce_grads",
    "is_unsharded",
    "post_backward",
    "reduce_grads",
    "reshard",
    "reshard_after_backward",
    "unshard",
    "wait_for_unshard",
)
PARAMETER_RECORDS = (
    "sharded_param",
    "unsharded_accumulated_grad",
    "accumulate_unsharded_grad_if_needed",
    "sharded_size",
    "sharded_state",
    "to_sharded_dtensor",
    "all_gather_outputs",
    "_module_info",
    "_post_load_hook_handle",
    "fsdp_placement",
    "mesh_info",
    "_sharded_param_data",
    "init_all_gather_outputs",
    "init_unsharded_param",
    "free_unsharded_param",
)
"""Attributes in use, as of torch 2.13."""


def parameters_of(module: FSDPModule) -> list[Any]:
    """Return fully_shard's records of the parameters that it gathers together with `module`."""
    group = group_of(module)
    return [] if group is None else list(group.fsdp_params)


def group_of(module: FSDPModule) -> Any:
    """Return fully_shard's parameter group of `module`, or None if it has no parameters."""
    return module._get_fsdp_state()._fsdp_param_group


def set_root(modules: Sequence[FSDPModule]) -> None:
    """Make the first module the root; fully_shard would take whichever runs first for it."""
    root: Any = modules[0]._get_fsdp_state()
    for module in modules[1:]:
        state: Any = module._get_fsdp_state()
        state._lazy_init = root._lazy_init


def keep_class_names(root: nn.Module) -> None:
    """Give fully_shard's classes, such as FSDPLlama, the modules' own names: libraries look at them."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            made, own = type(module), type(module).__bases__[1]
            made.__name__, made.__qualname__, made.__module__ = own.__name__, own.__qualname__, own.__module__


def is_whole(group: Any) -> bool:
    """Return whether a group's parameters are gathered, or on their way."""
    return group._all_gather_result is not None or group.is_unsharded


def is_trained(parameter: Any) -> bool:
    """Return `requires_grad` of the one of a parameter's two tensors that the module shows."""
    whole = parameter.sharded_state.name == "UNSHARDED"
    return bool((parameter._unsharded_param if whole else parameter.sharded_param).requires_grad)


def has_gradients(group: Any) -> bool:
    """Return whether backward passes have left gradients that aren't reduced yet."""
    for parameter in group.fsdp_params:
        whole = getattr(parameter, "_unsharded_param", None)
        if parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
            return True
    return False


def fill_gradients(group: Any) -> list[int]:
    """Give trained parameters without a gradient one of zero; return the ids of the records that have one.

    Gradients are reduced in one flat buffer, without names. If ranks, or micro batches that are reduced late,
    used different parameters, such as experts, gradients of different parameters would be summed. torch's own
    `set_reduce_scatter_unused_params` isn't in 2.11, and fails if other gradients were accumulated in another
    type.
    """
    used = []
    for parameter in group.fsdp_params:
        whole = getattr(parameter, "_unsharded_param", None)
        if parameter.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
            used.append(id(parameter))
        elif whole is not None and whole.requires_grad:
            whole.grad = torch.zeros_like(whole)
    return used


def take_gradients(group: Any) -> list[tuple[Any, Tensor]]:
    """Take the gradients out of whole parameters; return them with their parameters' records.

    Gradients of tensor-parallel parameters are this rank's part of them.
    """
    if not hasattr(group.fsdp_params[0], "_unsharded_param"):  # not gathered yet
        return []
    taken = []
    for parameter in group.fsdp_params:
        unsharded = parameter._unsharded_param
        if parameter.unsharded_accumulated_grad is not None:
            if unsharded.grad is not None:  # of the last backward pass, in the type of computation
                parameter.unsharded_accumulated_grad += unsharded.grad
                unsharded.grad = None
            taken.append((parameter, parameter.unsharded_accumulated_grad_data))
            parameter.unsharded_accumulated_grad = None
        elif unsharded.grad is not None:
            taken.append((parameter, parameter.unsharded_grad_data))
            unsharded.grad = None
    return taken


def give_gradient(parameter: Any, whole: Tensor) -> None:
    """Make a whole gradient the reduced one of a parameter whose shard is the whole parameter."""
    if whole.dtype != parameter.orig_dtype or not whole.is_contiguous():
        whole = whole.to(parameter.orig_dtype).contiguous()
    gradient, sharded = parameter.to_sharded_dtensor(whole), parameter.sharded_param
    # There is one already if an evaluation ran in the middle of the step.
    sharded.grad = gradient if sharded.grad is None else sharded.grad + gradient


def on_whole(parameter: Any, do: Callable[[nn.Parameter], None]) -> None:
    """Call `do` with the whole parameter each time that it is made, which is once unless its memory moves."""
    init = parameter.init_unsharded_param

    def init_and_do() -> None:
        before = getattr(parameter, "_unsharded_param", None)
        init()
        if parameter._unsharded_param is not before:
            do(parameter._unsharded_param)

    parameter.init_unsharded_param = init_and_do


def part_of_whole(parameter: Any) -> Tensor:
    """Return this rank's part of a whole parameter, as live memory."""
    whole, mesh = parameter._unsharded_param.detach(), parameter.mesh_info
    local = whole._local_tensor if isinstance(whole, DTensor) else whole
    parts = local.chunk(mesh.shard_mesh_size, parameter.fsdp_placement.dim)
    return parts[mesh.shard_mesh_rank] if mesh.shard_mesh_rank < len(parts) else local[:0]


def sharded_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return the sharded parameter of a whole one that modules show in its place; others as they are."""
    return getattr(parameter, "_sharded", parameter)


def keep_whole(module: FSDPModule) -> None:
    """Keep the memory of whole parameters once it is allocated, so that references to them stay valid.

    Modules then load state_dicts into whole parameters, where torch's hook expects sharded ones.
    """
    for parameter in parameters_of(module):
        parameter.free_unsharded_param = lambda: None
        parameter._post_load_hook_handle.remove()


def show_in_state_dicts(module: FSDPModule) -> None:
    """Let `state_dict` and `load_state_dict` see whole parameters; torch would shard them first."""
    group = group_of(module)
    if group is not None:
        group._register_state_dict_hooks = lambda: None


def set_shower(module: FSDPModule, show: Callable[[], None]) -> None:
    """Note how to show the whole parameters of `module`, and of all that are gathered with it."""
    state: Any = module._get_fsdp_state()
    state.show_parameters = show


def showers(modules: Sequence[FSDPModule]) -> list[Callable[[], None]]:
    """Return what `set_shower` has noted, each once."""
    states = [module._get_fsdp_state() for module in modules]
    return list(dict.fromkeys(state.show_parameters for state in states if hasattr(state, "show_parameters")))


def take_over(
    module: FSDPModule, unshard: Callable[[Any], None], before_reshard: Callable[[Any], None]
) -> None:
    """Leave it to `unshard` to gather `module`, and its gradients to whoever calls `reduce_gradients`.

    It is called with the module's group at each use, and `before_reshard` before its parameters are put away.
    """
    state: Any = module._get_fsdp_state()
    group = group_of(module)
    state._register_pre_backward_hook = lambda output: output
    if group is not None:
        group.unshard = lambda async_op=False: unshard(group)
        group.reshard = partial(_reshard, group, before_reshard)
        group.post_backward = lambda *_: None
        group._register_post_backward_hook = lambda args, kwargs: (args, kwargs)


def _reshard(group: Any, before: Callable[[Any], None]) -> None:
    if group._training_state.name != "FORWARD":  # what `take_over` has taken over stays whole after it
        before(group)
        type(group).reshard(group)


def start_gathering(group: Any) -> None:
    """Start to gather a group that `take_over` has taken over, if it isn't whole."""
    type(group).unshard(group, async_op=True)


def reduce_gradients(group: Any, *, reduce: bool) -> None:
    """Reduce the gradients of a group that `take_over` has taken over, or accumulate them."""
    group.reduce_grads, group.reshard_after_backward = reduce, False
    type(group).post_backward(group)


def end_backward(root: FSDPModule) -> None:
    """Wait for reductions and reset fully_shard's records, as its callback does after a backward pass."""
    state: Any = root._get_fsdp_state()
    type(state)._root_post_backward_final_callback(state)


def forget_forward_order(root: FSDPModule) -> None:
    """Forget in which order forward passes ran, unless a backward pass is still to come.

    torch does so after a step's last backward pass alone. In those before, it would gather the last layer of
    an earlier micro batch for nothing, after the first layer of a later one.
    """
    state: Any = root._get_fsdp_state()
    order = state._comm_ctx.post_forward_order
    if not any(group._post_forward_indices for group in order):
        order.clear()


def allow_in_place_inputs(group: Any) -> None:
    """Let the layer of `group` change its inputs in place.

    torch hangs the layer's backward hook on its inputs by a function that returns views of them, on which a
    layer that begins with an operation in place, such as `ReLU(inplace=True)`, fails.
    """

    def register(args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not torch.is_grad_enabled():
            return args, kwargs
        inputs: list[Tensor] = []
        _collect((args, *kwargs.values()), inputs)
        if not inputs:
            return args, kwargs
        passed = iter(_PassOn.apply(group, *inputs))  # type: ignore[no-untyped-call]
        return _replaced(args, passed), {key: _replaced(value, passed) for key, value in kwargs.items()}

    group._register_post_backward_hook = register


def _collect(value: Any, found: list[Tensor]) -> None:
    """Append the tensors in nested tuples that require a gradient.

    Lists, dicts and objects stay as they are: a layer may write into them.
    """
    if isinstance(value, Tensor):
        if value.requires_grad:
            found.append(value)
    elif type(value) is tuple:
        for item in value:
            _collect(item, found)


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the value with the tensors that `_collect` found replaced, in the same order."""
    if isinstance(value, Tensor):
        return next(tensors) if value.requires_grad else value
    return tuple(_replaced(item, tensors) for item in value) if type(value) is tuple else value


class _PassOn(torch.autograd.Function):
    """Identity that calls `group.post_backward` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, group: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.group.post_backward()
        return None, *gradients


def see_attributes(state: Any) -> None:
    """Make fully_shard see the tensors of outputs that are objects of a class of their own.

    It finds tensors in tuples, lists, dicts and dataclasses, and would not gather the parameters for the
    backward pass of, say, a `SimpleNamespace`. A layer that returns None, as it writes into an argument,
    stays whole until the end of the backward pass.
    """
    register = state._register_pre_backward_hook

    def register_all(output: Any) -> Any:
        group = state._fsdp_param_group
        if output is None and group is not None and torch.is_grad_enabled():
            group.unshard()
            group.wait_for_unshard()
        elif not isinstance(output, Tensor | tuple | list | dict) and hasattr(output, "__dict__"):
            register(_opened(output))
        return register(output)

    state._register_pre_backward_hook = register_all


def _opened(value: Any, depth: int = 4) -> Any:
    """Return the attributes of an object as lists, those of its attributes included."""
    if isinstance(value, Tensor | tuple | list | dict) or not hasattr(value, "__dict__") or not depth:
        return value
    return [_opened(item, depth - 1) for item in vars(value).values()]


def check_records(module: FSDPModule) -> None:
    """Check that torch's private records have the attributes in use here.

    Raises:
        RuntimeError: an attribute is missing.
    """
    state = module._get_fsdp_state()
    group = getattr(state, "_fsdp_param_group", None)
    parameter = next(iter(getattr(group, "fsdp_params", [])), None)
    missing: list[str] = []
    for record, names in ((state, STATE_RECORDS), (group, GROUP_RECORDS), (parameter, PARAMETER_RECORDS)):
        missing += [name for name in names if record is not None and not hasattr(record, name)]
    if missing:
        raise RuntimeError(
            f"fully_shard of torch {torch.__version__} has no {', '.join(missing)}, which ZeRO needs; "
            "use a torch from 2.11 to 2.13"
        )


def compute_in_place(parameter: Any) -> None:
    """Compute with a parameter in place, where its shard is the whole parameter.

    fully_shard copies parameters before use even if there is no other rank to gather from. In fp32 the copy
    equals the shard, and would double the parameters' memory at ZeRO stage 0 and on a single rank.
    """

    def init_all_gather_outputs(*_: Any) -> None:
        data = parameter._sharded_param_data
        if not parameter.all_gather_outputs or parameter.all_gather_outputs[0] is not data:
            parameter.all_gather_outputs = [data]  # gathering then copies the tensor onto itself, a no-op
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param  # a view of the previous memory

    parameter.init_all_gather_outputs = init_all_gather_outputs
    parameter.free_unsharded_param = lambda: None
