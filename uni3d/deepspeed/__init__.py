"""DeepSpeed's names, for scripts and libraries that import them: `import uni3d.deepspeed as deepspeed`.

Programs that say `import deepspeed` themselves, such as Hugging Face's, get it after
`uni3d.deepspeed.install()`. Each name of DeepSpeed's is real, or raises an error that says what to use.

    names, modules     the table of names, and the modules that are made of it; `install`
    training           `initialize`, `init_distributed`, arguments of the command line
    engines            the engine of a parameter
    config_values      `runtime.config.DeepSpeedConfig`, and sections of a config
    gathering          `zero`: `Init`, `GatheredParameters`
    fragments          `utils`: fp32 values, gradients and optimizer states by parameter
    schedules          `runtime.lr_schedules`
    optimizers         `ops.adam`, `ops.lion`, `ops.adagrad`
    collectives, parallel_groups  `comm` and `utils.groups`
    devices            `accelerator`
    recompute          `checkpointing`, of activations
    process_topology   `runtime.pipe.topology`
    leaf_modules       modules that ZeRO-3 gathers as one
    stand_ins, no_experts, op_builders  classes that can only be named; what isn't there, and says so
    constants          keys and values of the config
    log, helpers       `utils.logging`; small functions of `utils` and `runtime.utils`

Importing this package loads no torch: each name is imported from its module when it is first asked for.
"""

from __future__ import annotations

from typing import Any

from uni3d.deepspeed.modules import INSTALLED, children, install, make_modules, resolve
from uni3d.deepspeed.names import PROVIDED, VERSION

__all__ = [*PROVIDED[""], "install"]

__version__ = INSTALLED
__git_hash__ = __git_branch__ = None
__version_major__, __version_minor__, __version_patch__ = (int(part) for part in VERSION.split("."))

make_modules()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = resolve("", name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PROVIDED[""], *children("")})
