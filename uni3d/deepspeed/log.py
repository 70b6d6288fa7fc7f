"""`deepspeed.utils.logger`, and messages of chosen ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch.distributed as dist

logger: Any = logging.getLogger("DeepSpeed")


@cache
def warning_once(message: str, *args: Any) -> None:
    """Log a warning, the first time."""
    logger.warning(message, *args)


logger.warning_once = warning_once


def log_dist(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message on these ranks; [-1] is all, and without a process group every process logs."""
    if (prefixed := _message(message, ranks)) is not None:
        logger.log(level, prefixed)


def print_dist(message: str, ranks: Sequence[int] | None = None) -> None:
    """Print a message on these ranks, whatever the logger's level."""
    if (prefixed := _message(message, ranks)) is not None:
        print(prefixed)


def log_dist_once(message: str, ranks: Sequence[int] | None = None, level: int = logging.INFO) -> None:
    """Log a message as `log_dist`, the first time."""
    _log_once(message, None if ranks is None else tuple(ranks), level)


@cache
def _log_once(message: str, ranks: tuple[int, ...] | None, level: int) -> None:
    log_dist(message, ranks, level)


def set_log_level_from_string(log_level_str: str, custom_logger: logging.Logger | None = None) -> None:
    """Set a logger's level: "debug", "info", "warning", "error" or "critical"."""
    levels = {
        name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")
    }
    if log_level_str.lower() not in levels:
        raise ValueError(f"the level is {log_level_str!r}; expected one of {', '.join(levels)}")
    (custom_logger or logger).setLevel(levels[log_level_str.lower()])


def _message(message: str, ranks: Sequence[int] | None) -> str | None:
    rank = dist.get_rank() if dist.is_initialized() else -1
    chosen = list(ranks or [])
    return f"[Rank {rank}] {message}" if rank < 0 or rank in chosen or chosen[:1] == [-1] else None
