"""Classes that can be named but not made: scripts import them, or ask for them in isinstance."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn


class NeverMadeType(type):
    """Type of the stand-ins: nothing is an instance of them, and calling one says why."""

    reason: str

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(cls.reason)


@cache
def stand_in(full: str, reason: str) -> type:
    """Return the class under one of DeepSpeed's full names; making one raises NotImplementedError."""
    home, _, name = full.rpartition(".")
    return NeverMadeType(
        name, (), {"__doc__": reason, "__module__": f"uni3d.deepspeed.{home}", "reason": reason}
    )


class ZeRORuntimeException(Exception):  # noqa: N818 (DeepSpeed's name)
    """Error that DeepSpeed raises where ZeRO can't do something. Never raised here; it can be caught."""
