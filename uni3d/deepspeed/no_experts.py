"""`deepspeed.moe.utils`: answers for models without DeepSpeed's expert layers, as there are none here."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Return False, and 0 experts."""
    return False, 0


def is_moe_param(param: Tensor) -> bool:
    return False


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    return False


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | list[dict[str, Any]] | tuple[dict[str, Any], ...],
    max_group_size: float | None = None,
) -> list[dict[str, Any]]:
    """Return the groups as they are, in a list: no parameter is an expert's."""
    return [param_groups] if isinstance(param_groups, dict) else list(param_groups)
