"""`deepspeed.ops.op_builder`: which extensions of DeepSpeed's have a counterpart. Nothing is built."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn

import torch


def _nccl() -> str:
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version[:2]))


torch_info = {
    "version": ".".join(torch.__version__.split(".")[:2]),
    "bf16_support": True,
    "cuda_version": ".".join((torch.version.cuda or "0.0").split(".")[:2]),
    "nccl_version": _nccl() if torch.cuda.is_available() else "0.0",
    "hip_version": "0.0",
}


class NothingToBuild:
    """An extension of DeepSpeed's, whose work torch does here."""

    NAME = ""

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def load(self, verbose: bool = True) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: there are no extensions to build; torch does the work"
        )


class CPUAdamBuilder(NothingToBuild):
    NAME = "cpu_adam"


class CPUAdagradBuilder(NothingToBuild):
    NAME = "cpu_adagrad"


class CPULionBuilder(NothingToBuild):
    NAME = "cpu_lion"


class FusedAdamBuilder(NothingToBuild):
    NAME = "fused_adam"


class FusedLionBuilder(NothingToBuild):
    NAME = "fused_lion"


class NotHere(NothingToBuild):
    """An extension whose work nothing does here."""

    def is_compatible(self, verbose: bool = False) -> bool:
        return False


class AsyncIOBuilder(NotHere):
    NAME = "async_io"


class FPQuantizerBuilder(NotHere):
    NAME = "fp_quantizer"


class FusedLambBuilder(NotHere):
    NAME = "fused_lamb"


class QuantizerBuilder(NotHere):
    NAME = "quantizer"


_kinds = [CPUAdamBuilder, CPUAdagradBuilder, CPULionBuilder, FusedAdamBuilder, FusedLionBuilder]
compatible_ops: dict[str, Any] = defaultdict(bool, {kind.NAME: True for kind in _kinds})
installed_ops = compatible_ops
