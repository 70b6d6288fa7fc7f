"""uni3d: data, tensor and pipeline parallelism with ZeRO, and checkpoints that resume on any topology.

    engine, optimizer, loader, scheduler = uni3d.initialize(model=model, config="config.json", ...)
    loss = engine.train_batch(iter(loader))
    engine.save_checkpoint("run")        # any later run, on any number of GPUs:
    engine.load_checkpoint("run")

Importing this package loads no torch; `initialize` and `Engine` do when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckpt import CheckpointError
    from uni3d.deepspeed import add_config_arguments, init_distributed
    from uni3d.engine.build import initialize
    from uni3d.engine.engine import Engine
    from uni3d.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from uni3d.recovery import (
        clone_tensors_for_torch_save,
        convert_zero_checkpoint_to_fp32_state_dict,
        get_fp32_state_dict_from_zero_checkpoint,
        load_state_dict_from_zero_checkpoint,
    )

from uni3d.version import __version__ as __version__

__all__ = [
    "CheckpointError",
    "Engine",
    "LayerSpec",
    "PipelineModule",
    "TiedLayerSpec",
    "add_config_arguments",
    "clone_tensors_for_torch_save",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "get_fp32_state_dict_from_zero_checkpoint",
    "init_distributed",
    "initialize",
    "load_state_dict_from_zero_checkpoint",
]

_HOME = {
    "CheckpointError": "ckpt",
    "Engine": "uni3d.engine.engine",
    "LayerSpec": "uni3d.pipe",
    "PipelineModule": "uni3d.pipe",
    "TiedLayerSpec": "uni3d.pipe",
    "add_config_arguments": "uni3d.deepspeed",
    "clone_tensors_for_torch_save": "uni3d.recovery",
    "convert_zero_checkpoint_to_fp32_state_dict": "uni3d.recovery",
    "get_fp32_state_dict_from_zero_checkpoint": "uni3d.recovery",
    "init_distributed": "uni3d.deepspeed",
    "initialize": "uni3d.engine.build",
    "load_state_dict_from_zero_checkpoint": "uni3d.recovery",
}
"""Where each public name lives; looked up when it is first asked for."""


def _check_siblings() -> None:
    """`parallel` and `ckpt` are common names: make sure that the ones found are ours.

    Raises:
        ImportError: naming the file that stands in the way.
    """
    here = Path(__file__).resolve().parent.parent
    for name in ("parallel", "ckpt"):
        spec = find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin != here / name / "__init__.py":
            raise ImportError(
                f"uni3d needs its own package {name!r} at {here / name}, but Python finds "
                f"{origin or 'none'}; rename that file, or take its folder off sys.path"
            )


_check_siblings()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'uni3d' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
