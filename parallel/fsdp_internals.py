"""What is used of fully_shard's private records of parameters, and what is changed in them.

torch gives no public way to these: gradients of zero where a rank used a parameter not at all, gradients of a
single rank taken as they are, parameters that are computed with where they lie. All of it is here, and
`check_records` refuses a torch in which something is missing.
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
"""What is used of fully_shard's private records; read in torch 2.13."""


def parameters_of(module: FSDPModule) -> list[Any]:
    """fully_shard's own records of the parameters that it gathers together with `module`."""
    group = group_of(module)
    return [] if group is None else list(group.fsdp_params)


def group_of(module: FSDPModule) -> Any:
    """fully_shard's own record of what it gathers together with `module`; None if that is nothing."""
    return module._get_fsdp_state()._fsdp_param_group


def adopt_gradient(parameter: Any) -> None:
    """Take what a single rank has accumulated for the sum over the ranks."""
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
    # There is one already if something was evaluated in the midst of the step.
    sharded.grad = gradient if sharded.grad is None else sharded.grad + gradient


def count_unused(parameter: Any) -> None:
    """Give a trained parameter that took no part in a backward pass a gradient of zero.

    What is reduced together has no names: if ranks, or micro batches that are summed late, use different
    parameters, as experts are, gradients would be added up that don't belong together. torch's own
    `set_reduce_scatter_unused_params` isn't in 2.11, and fails if others were accumulated in another type.
    """
    accumulate = parameter.accumulate_unsharded_grad_if_needed  # the first thing after each backward pass

    def fill_and_accumulate() -> None:
        whole = getattr(parameter, "_unsharded_param", None)
        nothing = parameter.unsharded_accumulated_grad is None and getattr(whole, "grad", None) is None
        if whole is not None and whole.requires_grad and nothing:
            whole.grad = torch.zeros_like(whole)
        accumulate()

    parameter.accumulate_unsharded_grad_if_needed = fill_and_accumulate


def check_records(module: FSDPModule) -> None:
    """See that torch's records, which are its private matter, have what is used of them here.

    Raises:
        RuntimeError: they haven't.
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
    """Let a parameter whose shard is the whole be computed with where it lies.

    fully_shard makes a whole copy before use even if there is nobody to gather from. In fp32 that is the
    same again, which would double the memory of ZeRO stage 0 and of a single rank.
    """

    def init_all_gather_outputs(*_: Any) -> None:
        data = parameter._sharded_param_data
        if not parameter.all_gather_outputs or parameter.all_gather_outputs[0] is not data:
            parameter.all_gather_outputs = [data]  # gathering is then a copy of a tensor onto itself: none
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param  # a view of memory that the parameter has left

    parameter.init_all_gather_outputs = init_all_gather_outputs
    parameter.free_unsharded_param = lambda: None
