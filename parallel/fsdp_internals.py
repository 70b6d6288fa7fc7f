"""Access to the private parameter records of torch's fully_shard, and changes to them.

torch has no public API for three things: zero gradients for parameters that a rank didn't use, adopting a
single rank's gradients without reduction, and computing with a parameter in place. They are all here, and
`check_records` refuses a torch that lacks one of the attributes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

GROUP_RECORDS = ("fsdp_params", "_partial_reduce_output")
PARAMETER_RECORDS = (
    "sharded_param",
    "unsharded_accumulated_grad",
    "accumulate_unsharded_grad_if_needed",
    "sharded_size",
    "to_sharded_dtensor",
    "all_gather_outputs",
    "_sharded_param_data",
    "init_all_gather_outputs",
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


def adopt_gradient(parameter: Any) -> None:
    """Make a single rank's accumulated gradient the reduced one."""
    unsharded = getattr(parameter, "_unsharded_param", None)
    if parameter.unsharded_accumulated_grad is not None:
        whole = parameter.unsharded_accumulated_grad_data
        parameter.unsharded_accumulated_grad = None
    elif unsharded is not None and unsharded.grad is not None:
        whole = parameter.unsharded_grad_data
        unsharded.grad = None
    else:
        return
    if whole.dtype != parameter.orig_dtype or not whole.is_contiguous():
        whole = whole.to(parameter.orig_dtype).contiguous()
    gradient = parameter.to_sharded_dtensor(whole.view(parameter.sharded_size))
    sharded = parameter.sharded_param
    # There is one already if an evaluation ran in the middle of the step.
    sharded.grad = gradient if sharded.grad is None else sharded.grad + gradient


def count_unused(parameter: Any) -> None:
    """Give a trained parameter that took no part in a backward pass a gradient of zero.

    Gradients are reduced in one flat buffer, without names. If ranks, or micro batches that are reduced late,
    used different parameters, such as experts, gradients of different parameters would be summed. torch's own
    `set_reduce_scatter_unused_params` isn't in 2.11, and fails if other gradients were accumulated in another
    type.
    """
    accumulate = parameter.accumulate_unsharded_grad_if_needed  # called first after each backward pass

    def fill_and_accumulate() -> None:
        whole = getattr(parameter, "_unsharded_param", None)
        nothing = parameter.unsharded_accumulated_grad is None and getattr(whole, "grad", None) is None
        if whole is not None and whole.requires_grad and nothing:
            whole.grad = torch.zeros_like(whole)
        accumulate()

    parameter.accumulate_unsharded_grad_if_needed = fill_and_accumulate


def check_records(module: FSDPModule) -> None:
    """Check that torch's private records have the attributes in use here.

    Raises:
        RuntimeError: an attribute is missing.
    """
    state = module._get_fsdp_state()
    group = getattr(state, "_fsdp_param_group", None)
    parameter = next(iter(getattr(group, "fsdp_params", [])), None)
    missing = [name for name in ("_fsdp_param_group",) if not hasattr(state, name)]
    for record, names in ((group, GROUP_RECORDS), (parameter, PARAMETER_RECORDS)):
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
