"""`deepspeed.checkpointing`: activations recomputed in the backward pass, by `torch.utils.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint as torch_checkpoint

from uni3d.config.deepspeed_keys import REFUSED

_KEYS = {
    "partition_activations": "partition_activations",
    "contiguous_checkpointing": "contiguous_memory_optimization",
    "num_checkpoints": "number_checkpoints",
    "checkpoint_in_cpu": "cpu_checkpointing",
    "synchronize": "synchronize_checkpoint_boundary",
    "profile": "profile",
}
"""Arguments of `configure`, as keys of the config's section."""
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
    """Accept DeepSpeed's defaults. `mpu_` and `deepspeed_config` aren't used: `initialize` reads the config.

    Raises:
        ValueError: an option that isn't supported, with the reason.
    """
    given = {
        "partition_activations": partition_activations,
        "contiguous_checkpointing": contiguous_checkpointing,
        "num_checkpoints": num_checkpoints,
        "checkpoint_in_cpu": checkpoint_in_cpu,
        "synchronize": synchronize,
        "profile": profile,
    }
    for name, value in given.items():
        if value:
            reason = REFUSED[f"activation_checkpointing.{_KEYS[name]}"]
            raise ValueError(f"checkpointing.configure: {name} isn't supported: {reason}")
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
