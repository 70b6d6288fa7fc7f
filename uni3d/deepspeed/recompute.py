"""`deepspeed.checkpointing`: activations recomputed in the backward pass, by `torch.utils.checkpoint`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

_calls: list[None] = []


def configure(
    mpu_: Any = None,
    deepspeed_config: Any = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Accept DeepSpeed's options, as the config does: none of them has an effect, and a warning says so.

    `mpu_` and `deepspeed_config` aren't used: `initialize` reads the config.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    if asked := [name for name, value in given.items() if value]:
        warnings.warn(
            f"checkpointing.configure: {', '.join(asked)} has no effect: `checkpoint` keeps a call's inputs "
            "where they are, and computes the rest again",
            stacklevel=2,
        )
    _calls.append(None)


def is_configured() -> bool:
    """Return whether `configure` was called. `checkpoint` works without."""
    return bool(_calls)


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return `function(*args, **kwargs)`; call it once more in the backward pass, with the same dropout."""
    return torch_checkpoint(function, *args, use_reentrant=False, **kwargs)


non_reentrant_checkpoint = checkpoint


def reset() -> None:
    """Do nothing: no buffers are kept from one backward pass to the next."""
