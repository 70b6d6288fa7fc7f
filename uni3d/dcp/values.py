"""Values of a state_dict that aren't tensors: as JSON, with what JSON doesn't show, and back."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt.format import Json

Kinds = dict[str, str]
"""Place in a value, a JSON pointer -> its type there, where JSON has another: `tuple`, `torch.Size`,
`numpy.float64`, ...; the type of a tensor's elements for a tensor of one, with `[1]` if it has a dim."""


def as_json(value: Any) -> tuple[Any, Kinds]:
    """Return a value as JSON, and its types.

    Raises:
        TypeError: it is or contains something that JSON can't represent.
    """
    kinds: Kinds = {}
    return _plain(value, "", kinds), kinds


def _plain(value: Any, place: str, kinds: Kinds) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, np.generic) and isinstance(value.item(), bool | int | float):
        kinds[place] = f"numpy.{value.dtype.name}"
        return _plain(value.item(), place, kinds)
    if kind is float:
        if not math.isfinite(value):
            raise TypeError(f"{value}")
        return value
    if kind in (list, tuple, torch.Size):
        if kind is not list:
            kinds[place] = "torch.Size" if kind is torch.Size else "tuple"
        return [_plain(each, f"{place}/{i}", kinds) for i, each in enumerate(value)]
    if kind in (dict, OrderedDict) and all(type(key) is str and "/" not in key for key in value):
        return {key: _plain(each, f"{place}/{key}", kinds) for key, each in value.items()}
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__}".replace("a builtins.", "a "))


def number_kind(tensor: Any) -> str:
    """Return the kind of a tensor of one element."""
    return str(tensor.dtype).removeprefix("torch.") + ("[1]" if tensor.ndim else "")


def restored(value: Any, kinds: Json, place: str = "") -> Any:
    """Return the value that `as_json` took; a tensor of one element is made anew."""
    if isinstance(value, list):
        value = [restored(each, kinds, f"{place}/{i}") for i, each in enumerate(value)]
    elif isinstance(value, dict):
        value = {key: restored(each, kinds, f"{place}/{key}") for key, each in value.items()}
    kind = kinds.get(place)
    if kind is None:
        return value
    if kind == "tuple":
        return tuple(value)
    if kind == "torch.Size":
        return torch.Size(value)
    if kind.startswith("numpy."):
        return np.dtype(kind.removeprefix("numpy.")).type(value)
    tensor = torch.tensor(value, dtype=getattr(torch, kind.removesuffix("[1]")))
    return tensor.reshape(1) if kind.endswith("[1]") else tensor


def in_place_of(current: Any, value: Any, kinds: Json) -> Any:
    """Return a stored value in the form of the one that it replaces.

    A number for a tensor goes into the tensor's own memory.

    Raises:
        TypeError: a tensor can't hold the value.
    """
    if isinstance(current, Tensor):
        fits = isinstance(value, bool | int) or (isinstance(value, float) and current.is_floating_point())
        if not fits or current.numel() != 1:
            raise TypeError(f"{value!r:.80}, but a {current.dtype} of shape {list(current.shape)}")
        with torch.no_grad():
            current.fill_(value)
        return current
    of_tensor = isinstance(value, bool | int | float) and not kinds.get("", "numpy.").startswith("numpy.")
    if of_tensor and isinstance(current, bool | int | float):
        return value
    if not kinds and isinstance(current, tuple) and isinstance(value, list):
        return tuple(value)  # what an engine has saved doesn't tell them apart
    return restored(value, kinds)
