"""Types of computing and of sums, as fully_shard takes them."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from parallel.settings import DType, Precision

DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def policy_of(precision: Precision, output: torch.dtype | None) -> MixedPrecisionPolicy:
    if not precision.mixed:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=DTYPES[precision.compute], reduce_dtype=DTYPES[precision.reduce], output_dtype=output
    )


def statistics_policy(precision: Precision) -> MixedPrecisionPolicy:
    """Return the policy of batch norms: they compute in fp32, which their running averages need."""
    return MixedPrecisionPolicy(
        param_dtype=torch.float32,
        reduce_dtype=DTYPES[precision.reduce],
        output_dtype=DTYPES[precision.compute],
    )
