"""Records of what a rank computes and sends, by torch's dispatch modes."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ComputedShapes(TorchDispatchMode):
    """Records the shapes of all plain tensors that are computed, those inside of DTensors too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # so that it computes on its local tensors, which are seen then
        output = func(*args, **(kwargs or {}))
        # Not the tensors without data with which DTensor tries out shapes.
        self.seen.update(tuple(t.shape) for t in tree_leaves(output) if type(t) is Tensor and not t.is_meta)
        return output


ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
"""Rounds of each collective as a ring."""
EXCHANGE = "alltoall"
"""Collective by which gradients are reduced and scattered on CPUs (`parallel.sums.ExchangedSums`)."""


class SentBytes(TorchDispatchMode):
    """Counts the calls in which this rank sends, and their bytes, by the kinds of `ROUNDS` and "send"."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter(dict.fromkeys(ROUNDS, 0))
        self.calls: Counter[str] = Counter(dict.fromkeys(ROUNDS, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, Tensor)]
        if name == "c10d::send":
            self.bytes["send"] += tensors[0].nbytes
            self.calls["send"] += 1
        elif "c10d" in name:
            plain = name.replace("_", "").replace(EXCHANGE, "reducescatter")
            if kind := next((kind for kind in ROUNDS if kind.replace("_", "") in plain), None):
                size = _group_size(args)  # the larger of input and output is the whole tensor
                self.bytes[kind] += ROUNDS[kind] * max(x.nbytes for x in tensors) * (size - 1) // size
                self.calls[kind] += size > 1
        return result


def _group_size(args: Any) -> int:
    """Return the size of a collective's group, which is among its arguments as an object or a name."""
    for arg in reversed(args):
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return int(dist.ProcessGroup.unbox(arg).size())
        if isinstance(arg, str):
            return int(c10d._resolve_process_group(arg).size())
    raise AssertionError("a collective without a group")
