"""Export of a checkpoint to a folder for Hugging Face's `transformers`: config.json and renamed tensors.

Checkpoints keep the model's own Hugging Face description (`uni3d/checkpoint/model_spec.py`), if it has one.
Files given by the user replace it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ckpt
from ckpt.format import Json
from uni3d.export.new_folder import new_folder
from uni3d.manifest import RunManifest
from uni3d.name_map import NameMap
from uni3d.zero_to_fp32 import write_files


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """Hugging Face's config of a model, and its tensor names."""

    config: Json
    """Content of `config.json`."""
    names: NameMap
    """The checkpoint's names -> Hugging Face's."""


def parse(form: Any) -> HuggingFaceModel:
    """Parse a model's Hugging Face description, the manifest's `model.declared.hugging_face`.

    Raises:
        ValueError: `form` isn't such a description.
    """
    if not isinstance(form, dict) or not {"config"} <= form.keys() <= {"config", "names"}:
        raise ValueError('hugging_face must be {"config": {...}, "names": {pattern: replacement}}')
    if not isinstance(form.get("names", {}), dict):
        raise ValueError(f"hugging_face's names must map patterns to replacements, not {form['names']!r}")
    names = NameMap(form.get("names", {}), "the name map of the model")
    return HuggingFaceModel(config=_checked(form["config"], "hugging_face's config"), names=names)


def find(checkpoint: ckpt.Checkpoint, config: Path | None, names: Path | None) -> HuggingFaceModel:
    """Return the description in the checkpoint, with the parts that are given as files replaced.

    Raises:
        ValueError: neither has a config, or a file is malformed.
        OSError: a file can't be read.
    """
    model = RunManifest.of(checkpoint).model
    if left_out := model.left_out:
        raise ValueError(
            f"{checkpoint.url} was saved without frozen parameters ({', '.join(left_out[:4])}"
            f"{', ...' if len(left_out) > 4 else ''}), so the exported model would lack weights"
        )
    declared = model.declared
    said = parse(declared["hugging_face"]) if "hugging_face" in declared else None
    if "peft" in declared and names is None:
        raise ValueError(
            f"{checkpoint.url}: its model has adapters of peft, which --format peft writes; for a "
            "whole model, give --name-map FILE"
        )
    if config is None and said is None:
        kind = f" ({declared['class']})" if "class" in declared else ""
        raise ValueError(
            f"{checkpoint.url} has no Hugging Face config for its model{kind}; give --hf-config "
            "FILE, the model's config.json, and --name-map FILE if Hugging Face names the tensors differently"
        )
    own = said or HuggingFaceModel(config={}, names=NameMap({}))
    return HuggingFaceModel(
        config=own.config if config is None else _read_config(config),
        names=own.names if names is None else NameMap.load(names),
    )


def renamed(checkpoint: ckpt.Checkpoint, names: NameMap) -> dict[str, str]:
    """Map Hugging Face's names to the checkpoint's, for every tensor that the name map keeps.

    A tied weight is written under each of its names, since the loading model may or may not tie them itself.

    Raises:
        ValueError: two tensors get the same name, or none is left.
    """
    holder = {name: name for name in ckpt.weights(checkpoint)}
    aliases = RunManifest.of(checkpoint).aliases
    holder |= {alias: first for alias, first in aliases.items() if first in holder}
    found = {new: holder[old] for old, new in names.rename_all(holder).items()}
    if not found:
        raise ValueError(f"{names.source} leaves out every tensor in {checkpoint.url}")
    return found


def write_folder(
    checkpoint: ckpt.Checkpoint,
    output: Path,
    config: Json,
    tensors: Mapping[str, str],
    *,
    dtype: str,
    max_shard_size: str,
    progress: Callable[[int], None] = lambda n: None,
) -> list[Path]:
    """Write `config` and `tensors` (exported name -> stored name) to a new folder; return its files.

    Parameters are stored as `dtype`, in files of at most `max_shard_size`, with an index if there are
    several. A few MiB of tensors are in memory at a time. The folder appears when all of it is on disk.

    Raises:
        FileExistsError: `output` exists.
        ckpt.CheckpointError: a chunk is damaged, or a value is too large for `dtype`.
        OSError: a file can't be written.
        ValueError: `max_shard_size` isn't a size.
    """
    infos = ckpt.weights(checkpoint)
    rounded = None if dtype == "float32" else dtype
    sizes = {name: ckpt.exported_bytes(infos[held], rounded) for name, held in tensors.items()}

    def write(path: Path, names: Collection[str], _: object) -> None:
        part = {name: tensors[name] for name in names}
        ckpt.export_safetensors(checkpoint, path, names=part, dtype=rounded, progress=progress)

    content = json.dumps(_of_type(config, dtype), indent=2, allow_nan=False)
    with new_folder(output) as folder:
        made = write_files(folder, sizes, {}, max_shard_size, True, write)
        (folder / "config.json").write_text(content + "\n", encoding="utf-8")
    return [output / name for name in ("config.json", *made)]


def _read_config(path: Path) -> Json:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--hf-config {path} can't be read as JSON: {error}") from None
    return _checked(config, f"--hf-config {path}")


def _checked(config: Any, what: str) -> Json:
    """Return `config` if it names a model type and describes weights that aren't quantized."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{what} must be a JSON object with a "model_type", like a model\'s config.json')
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{what} has a quantization_config, but the exported weights aren't quantized; remove it"
        )
    return config


def _of_type(config: Json, dtype: str) -> Json:
    """Set the config's weight type; nested configs (a text and an image part) may have one too."""

    def with_type(value: Any) -> Any:
        if isinstance(value, dict):
            known = {key: dtype for key in ("dtype", "torch_dtype") if value.get(key) is not None}
            return {key: with_type(item) for key, item in value.items()} | known
        return [with_type(item) for item in value] if isinstance(value, list) else value

    # transformers 5 reads `dtype` and falls back to `torch_dtype`; older releases know only `torch_dtype`.
    return dict(with_type(config)) | {"dtype": dtype, "torch_dtype": dtype}
