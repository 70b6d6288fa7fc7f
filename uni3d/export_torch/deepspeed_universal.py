"""Export to a folder of DeepSpeed's universal format, which it loads on any number of ranks at ZeRO 1 to 3.

OUT/latest_universal                                        the tag
OUT/<tag>/zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
OUT/<tag>/zero/optimizer_state.pt                           groups, in the forms of ZeRO 1 and 2, and 3
OUT/<tag>/mp_rank_00_model_states.pt                        counters, schedule, client state; all weights
OUT/<tag>/zero_pp_rank_0_mp_rank_00_model_states.pt         the same without weights, which ZeRO 3 reads
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import ckpt
from uni3d.checkpoint.stored_weights import StoredWeights
from uni3d.export.new_folder import new_folder
from uni3d.export_torch.optimizer import ADAM_MOMENTS, TorchOptimizer, adam_step, read_optimizer
from uni3d.export_torch.torch_file import write_torch_file
from uni3d.manifest import RunManifest
from uni3d.resume_rules import IMPLEMENTATION_KEYS

_VERSION = "0.19.8"
"""Release of DeepSpeed whose form this is."""


def universal_files(checkpoint: ckpt.Checkpoint) -> dict[str, Any]:
    """Return the content of each file, by its path below the tag's folder.

    Raises:
        ValueError: the format can't hold the checkpoint.
    """
    manifest, weights = RunManifest.of(checkpoint), StoredWeights(checkpoint)
    if manifest.model.left_out:
        raise ValueError(
            f"{checkpoint.url} was saved without frozen parameters ({manifest.model.left_out[0]}, ...), "
            "which DeepSpeed's model file needs; save it whole"
        )
    if weights.extra_states:
        name = next(iter(weights.extra_states))
        raise ValueError(
            f"{checkpoint.url} has extra states of modules ({name}), which DeepSpeed's universal format lacks"
        )
    optimizer = read_optimizer(checkpoint)
    step = torch.tensor(adam_step(checkpoint, optimizer, "--format deepspeed-universal"))
    groups = _groups(optimizer)
    # ZeRO 1 and 2 look at the top level, ZeRO 3 one below, for the one step count of all parameters.
    found: dict[str, Any] = {
        "zero/optimizer_state.pt": {
            "ds_version": _VERSION,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        }
    }
    for name, state in optimizer.states.items():
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} can't be the name of a folder, which DeepSpeed's format makes of it")
        found[f"zero/{name}/fp32.pt"] = {"param": weights.infos[name]}
        found |= {f"zero/{name}/{key}.pt": {"param": state[key]} for key in ADAM_MOMENTS}
        found[f"zero/{name}/step.pt"] = state["step"]
    rest = _model_file(manifest, weights, optimizer)
    module: dict[str, Any] = dict(weights.infos)
    module |= {alias: module[first] for alias, first in weights.aliases.items()}
    found["mp_rank_00_model_states.pt"] = {"module": module, **rest}
    found["zero_pp_rank_0_mp_rank_00_model_states.pt"] = {"module": {}, **rest}
    return found


def write_universal(
    checkpoint: ckpt.Checkpoint,
    output: Path,
    contents: Mapping[str, Any],
    *,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `universal_files` to a new folder, that of a run; return its files.

    The folder appears when all of it is on disk. A few MiB of tensors are in memory at a time.

    Raises:
        FileExistsError: `output` exists.
        ckpt.CheckpointError: a chunk is damaged.
        OSError: a file can't be written.
    """
    with new_folder(output) as folder:
        for path, content in contents.items():
            target = folder / checkpoint.tag / path
            target.parent.mkdir(parents=True, exist_ok=True)
            write_torch_file(checkpoint, target, content, durable=False, progress=progress)
        (folder / "latest_universal").write_text(checkpoint.tag, encoding="utf-8")
    return [output / "latest_universal", *(output / checkpoint.tag / path for path in contents)]


def _groups(optimizer: TorchOptimizer) -> list[dict[str, Any]]:
    """Return the groups' hyperparameters; a group's parameters are the flat tensor of its number."""
    return [
        {key: value for key, value in group.items() if key not in IMPLEMENTATION_KEYS} | {"params": [i]}
        for i, group in enumerate(optimizer.groups)
    ]


def _model_file(manifest: RunManifest, weights: StoredWeights, optimizer: TorchOptimizer) -> dict[str, Any]:
    """Return a model file without the weights.

    Raises:
        ValueError: the script's client state has one of its keys.
    """
    engine, config = manifest.engine, dict[str, Any]()
    if engine.train_batch_size is not None:
        config["train_batch_size"] = engine.train_batch_size
    if manifest.schedule is not None:
        config["scheduler"] = manifest.schedule
    shapes = [
        {name: weights.shape(name) for name in group["params"] if name in optimizer.states}
        for group in optimizer.groups
    ]
    file = {
        "buffer_names": manifest.model.buffers,
        "param_shapes": shapes,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": weights.aliases,
        "sparse_tensor_module_names": [],
        "optimizer": None,
        "lr_scheduler": _schedule(manifest),
        "data_sampler": None,
        "random_ltd": None,
        "global_steps": engine.global_steps if engine.global_steps is not None else manifest.step or 0,
        "global_samples": engine.global_samples or 0,
        "skipped_steps": engine.skipped_steps,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": config,
        "ds_version": _VERSION,
    }
    if taken := sorted({*file, "module"} & manifest.client_state.keys()):
        raise ValueError(
            f"the client state has {', '.join(taken)}, which DeepSpeed's file has for itself; rename it"
        )
    return {**file, **manifest.client_state}


def _schedule(manifest: RunManifest) -> dict[str, Any] | None:
    """Return the schedule's state: DeepSpeed's own count from -1, others' is what torch has."""
    state = manifest.scheduler
    if state is None or manifest.schedule is None:
        return state
    return {"last_batch_iteration": int(state["last_epoch"]) - 1}
