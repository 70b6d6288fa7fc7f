"""States with tensors, infinities and counters as JSON: those of schedulers, and of other loops."""

from __future__ import annotations

import base64
import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ckpt

LARGEST = 1 << 20
"""Bytes of a tensor that a state may hold; larger ones belong in a module's buffers."""

_TENSOR, _FLOAT, _COUNTER = "uni3d.tensor", "uni3d.float", "uni3d.counter"


def encoded(value: Any, where: str) -> Any:
    """Return a state as JSON that `decoded` returns as it was.

    Raises:
        ckpt.CheckpointError: it can't be; names the place.
    """
    if type(value) is Counter:
        pairs = [[key, number] for key, number in value.items()]
        ckpt.check_json(pairs, where)
        return {_COUNTER: pairs}
    if isinstance(value, dict):
        ckpt.check_json(dict.fromkeys(value), where)
        return {key: encoded(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [encoded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if type(value) is not Tensor:
        ckpt.check_json(value, where)
        return value
    if value.nbytes > LARGEST:
        raise ckpt.CheckpointError(
            f"{where} is a tensor of {value.nbytes:,} bytes; up to {LARGEST:,} are kept: make it a buffer of "
            "the module"
        )
    flat = value.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    dtype = str(value.dtype).removeprefix("torch.")
    return {_TENSOR: [dtype, list(value.shape), base64.b64encode(data).decode()]}


def decoded(value: Any) -> Any:
    """Return what `encoded` was given; tensors are on the CPU."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_FLOAT}:
        return float(value[_FLOAT])
    if value.keys() == {_COUNTER}:
        return Counter(dict(value[_COUNTER]))
    if value.keys() == {_TENSOR}:
        dtype, shape, data = value[_TENSOR]
        flat = torch.from_numpy(np.frombuffer(base64.b64decode(data), np.uint8).copy())
        return flat.view(getattr(torch, dtype)).reshape(shape)
    return {key: decoded(item) for key, item in value.items()}
