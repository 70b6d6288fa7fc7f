"""Export of a model's adapters to a folder for `peft`: what its `save_pretrained` would have written.

Checkpoints keep each adapter's config, and its tensors' names (`uni3d/checkpoint/adapters.py`). As with peft,
the adapter `default` is in the folder itself, and each other one in a folder of its name in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ckpt
from ckpt.format import Json
from uni3d.export.new_folder import new_folder
from uni3d.manifest import RunManifest

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_FIRST = "default"


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """One adapter."""

    config: Json
    """Content of `adapter_config.json`."""
    tensors: Mapping[str, str]
    """Names in peft's file -> names in the checkpoint."""


def find_adapters(checkpoint: ckpt.Checkpoint) -> dict[str, PeftAdapter]:
    """Return the adapters in a checkpoint, by name.

    Raises:
        ValueError: it has none, or one that can't be exported, or lacks a tensor of one.
    """
    manifest = RunManifest.of(checkpoint)
    declared = manifest.model.declared
    if "peft" not in declared:
        kind = f" ({declared['class']})" if "class" in declared else ""
        raise ValueError(
            f"{checkpoint.url} has no record of adapters of peft in its model{kind}; export the whole model "
            "with another --format"
        )
    held = ckpt.weights(checkpoint)
    found = {}
    for name, form in declared["peft"].items():
        _check(name, form)
        if "refused" in form:
            raise ValueError(
                f"{checkpoint.url}: the adapter {name} can't be exported: {form['refused']}; load the "
                "checkpoint into the model with uni3d.load, and call its save_pretrained"
            )
        tensors = {new: manifest.aliases.get(old, old) for new, old in form["tensors"].items()}
        if lost := [old for old in tensors.values() if old not in held]:
            raise ValueError(
                f"{checkpoint.url} lacks {lost[0]}, a tensor of the adapter {name}; use another tag"
            )
        found[name] = PeftAdapter(config=form["config"], tensors=tensors)
    return found


def _check(name: str, form: Any) -> None:
    """Check the record of an adapter, whose name becomes that of a folder.

    Raises:
        ValueError: it isn't one.
    """
    parts = [form.get("config"), form.get("tensors")] if isinstance(form, dict) else []
    known = all(isinstance(part, dict) for part in parts) or (isinstance(form, dict) and "refused" in form)
    if not parts or not known:
        raise ValueError(
            f"the adapter {name} in the manifest must have a config and tensors; use another tag"
        )
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} can't be the name of a folder, which peft makes of an adapter's")


def write_adapters(
    checkpoint: ckpt.Checkpoint,
    output: Path,
    adapters: Mapping[str, PeftAdapter],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write a new folder that `PeftModel.from_pretrained` reads; return its files.

    Parameters are rounded to `dtype`, if given. The folder appears when all of it is on disk.

    Raises:
        FileExistsError: `output` exists.
        ckpt.CheckpointError: a chunk is damaged, or a value is too large for `dtype`.
        OSError: a file can't be written.
    """
    made: list[str] = []
    with new_folder(output) as folder:
        for name, adapter in adapters.items():
            place = "" if name == _FIRST else f"{name}/"
            (folder / place).mkdir(exist_ok=True)
            ckpt.export_safetensors(
                checkpoint,
                folder / place / TENSORS,
                names=adapter.tensors,
                dtype=dtype,
                durable=False,  # the folder is synced when it is whole
                progress=progress,
            )
            content = json.dumps(adapter.config, indent=2, sort_keys=True)
            (folder / place / CONFIG).write_text(content + "\n", encoding="utf-8")
            made += [place + CONFIG, place + TENSORS]
    return [output / file for file in made]


def tensors_of(adapters: Mapping[str, PeftAdapter]) -> list[str]:
    """Return the checkpoint's names of all their tensors, as often as they are written."""
    return [name for adapter in adapters.values() for name in adapter.tensors.values()]
