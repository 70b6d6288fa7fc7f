"""Models whose parameters take no memory until a rank knows which parts of them it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Build models with parameters on the meta device, and buffers with their values, in this context.

    Inside `torch.device("meta")`, buffers would lose their values too, such as the frequencies of rotary
    embeddings. A parameter moves when a module gets it, and stays the same object. It applies to all modules
    of the process, so don't build others in other threads meanwhile.
    """
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(self, name, param)
        if param is not None and not param.is_meta:
            _move(param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _move(parameter: nn.Parameter) -> None:
    """Move a parameter to the meta device in place, so that others who have it see the same one."""
    attributes: dict[str, Any] = dict(vars(parameter))
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    moved = type(parameter)(empty, requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, moved)  # type: ignore[no-untyped-call]
    vars(parameter).update(attributes)
