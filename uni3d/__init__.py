"""uni3d: data, tensor and pipeline parallelism with ZeRO, and checkpoints that resume on any topology.

    engine, optimizer, loader, scheduler = uni3d.initialize(model=model, config="config.json", ...)
    loss = engine.train_batch()          # or forward, backward and step, in `for batch in loader:`
    engine.save_checkpoint("run")        # any later run, on any number of GPUs:
    engine.load_checkpoint("run")

The rooms, and the files beside them:

    config                   the JSON config
    engine, optim, observe   training: the engine, optimizers and schedules, lines and curves
    checkpoint, recovery     saving and restoring a run; a checkpoint's weights without one
    integrations             checkpoints for the loops of other libraries
    train_state, state       all that a step changes; its tensors as named shards
    stored_model             a model as checkpoints see it
    manifest, resume_rules   the run's part of a manifest; refusals and changes of a resume
    estimate, doctor, plot   memory, files and traffic on paper; advice on a resize; pictures
    bench                    speed and memory of a training, measured
    export, importers        other frameworks' checkpoints, out and in
    dcp                      storage for torch's distributed checkpoint
    export_torch             the same in files that torch writes
    name_map, zero_to_fp32   renaming of weights; the script that lies in every checkpoint
    argument_names, json_section  what messages call arguments; JSON that is checked as it is read
    cli, units               the command `uni3d`; sizes and rates as text
    pipe, deepspeed          DeepSpeed's form of a pipeline; DeepSpeed under its own names
    siblings, version        finding `parallel` and `ckpt`; the release

Importing this package loads no torch; `initialize` and `Engine` do when they are first asked for. From then
on, `import ckpt` and `import parallel` find uni3d's own packages, whatever else is named so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uni3d.siblings import claim_names

if TYPE_CHECKING:
    from ckpt import CheckpointError
    from uni3d import dcp as dcp
    from uni3d.checkpoint.checkpointer import Checkpointer
    from uni3d.checkpoint.functions import load, save
    from uni3d.deepspeed.training import add_config_arguments, init_distributed
    from uni3d.engine.build import initialize
    from uni3d.engine.data_loader import RepeatingLoader
    from uni3d.engine.engine import Engine
    from uni3d.engine.start import meta_parameters
    from uni3d.importers.in_place import open as open  # noqa: A004
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
    "Checkpointer",
    "Engine",
    "LayerSpec",
    "PipelineModule",
    "RepeatingLoader",
    "TiedLayerSpec",
    "add_config_arguments",
    "clone_tensors_for_torch_save",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "dcp",
    "get_fp32_state_dict_from_zero_checkpoint",
    "init_distributed",
    "initialize",
    "load",
    "load_state_dict_from_zero_checkpoint",
    "meta_parameters",
    "save",
]

_NAMES = {
    "ckpt": ["CheckpointError"],
    "uni3d.checkpoint.checkpointer": ["Checkpointer"],
    "uni3d.checkpoint.functions": ["load", "save"],
    "uni3d.deepspeed.training": ["add_config_arguments", "init_distributed"],
    "uni3d.engine.build": ["initialize"],
    "uni3d.engine.data_loader": ["RepeatingLoader"],
    "uni3d.engine.engine": ["Engine"],
    "uni3d.engine.start": ["meta_parameters"],
    "uni3d.importers.in_place": ["open"],  # not in `__all__`, as a star import would hide Python's
    "uni3d.pipe": ["LayerSpec", "PipelineModule", "TiedLayerSpec"],
    "uni3d.recovery": [
        "clone_tensors_for_torch_save",
        "convert_zero_checkpoint_to_fp32_state_dict",
        "get_fp32_state_dict_from_zero_checkpoint",
        "load_state_dict_from_zero_checkpoint",
    ],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

claim_names()


def __getattr__(name: str) -> Any:
    if name == "dcp":
        return import_module("uni3d.dcp")
    if name not in _HOME:
        raise AttributeError(f"module 'uni3d' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
