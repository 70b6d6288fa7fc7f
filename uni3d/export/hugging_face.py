"""A checkpoint as a folder that Hugging Face's `transformers` loads: config.json, and tensors by its names.

A model says what it is there (`uni3d/checkpoint/model_spec.py`), and its checkpoints keep it; where one doesn't, files do.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ckpt
from uni3d.export.new_folder import new_folder
from uni3d.manifest import RunManifest
from uni3d.name_map import NameMap
from uni3d.zero_to_fp32 import write_files

if TYPE_CHECKING:
    from torch import nn

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HuggingFaceModel:
    """What a model is to Hugging Face."""

    config: Json
    """The content of `config.json`."""
    names: NameMap
    """The checkpoint's names -> Hugging Face's."""


def parse(form: Any) -> HuggingFaceModel:
    """What a model says of itself, as the manifest's `model.declared.hugging_face` has it.

    Raises:
        ValueError: it isn't of this form.
    """
    if not isinstance(form, dict) or not {"config"} <= form.keys() <= {"config", "names"}:
        raise ValueError('hugging_face must be {"config": {...}, "names": {pattern: replacement}}')
    if not isinstance(form.get("names", {}), dict):
        raise ValueError(f"hugging_face's names must be pattern -> replacement, not {form['names']!r}")
    names = NameMap(form.get("names", {}), "the name map of the model")
    return HuggingFaceModel(config=_checked(form["config"], "hugging_face's config"), names=names)


def find(checkpoint: ckpt.Checkpoint, config: Path | None, names: Path | None) -> HuggingFaceModel:
    """What the files say, and beside them what the checkpoint says.

    Raises:
        ValueError: neither says what the model is, or a file isn't what it should be.
        OSError: a file can't be read.
    """
    model = RunManifest.of(checkpoint).model
    if left_out := model.left_out:
        raise ValueError(
            f"{checkpoint.url} was saved without frozen parameters ({', '.join(left_out[:4])}"
            f"{', ...' if len(left_out) > 4 else ''}): a model that lacks weights doesn't load"
        )
    declared = model.declared
    said = parse(declared["hugging_face"]) if "hugging_face" in declared else None
    if config is None and said is None:
        raise ValueError(
            f"{checkpoint.url} doesn't say what its model{_class(declared)} is to Hugging Face; give "
            "--hf-config FILE, the model's config.json, and --name-map FILE if its tensors have other names"
        )
    own = said or HuggingFaceModel(config={}, names=NameMap({}))
    return HuggingFaceModel(
        config=own.config if config is None else _read_config(config),
        names=own.names if names is None else NameMap.load(names),
    )


def renamed(checkpoint: ckpt.Checkpoint, names: NameMap) -> dict[str, str]:
    """Hugging Face's name -> the checkpoint's, for all that the name map doesn't leave out.

    A tied weight is there under each of its names that the map keeps: a model that doesn't tie them by itself
    lacks none of them, and one that does is given the same twice.

    Raises:
        ValueError: two names become the same one, or none is left.
    """
    holder = {name: name for name in ckpt.weights(checkpoint)}
    aliases = RunManifest.of(checkpoint).aliases
    holder |= {alias: first for alias, first in aliases.items() if first in holder}
    found = {new: holder[old] for old, new in names.rename_all(holder).items()}
    if not found:
        raise ValueError(f"{names.source} leaves out every tensor of {checkpoint.url}")
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
    """Write `config` and `tensors` (name there -> the checkpoint's), parameters as `dtype`, to a new folder.

    Files of at most `max_shard_size`, with an index if there are several. Of the tensors some MiB are in
    memory at a time. The folder appears when it is whole, and on the disk. Returns the files.

    Raises:
        FileExistsError: the folder is there.
        ckpt.CheckpointError: a chunk is damaged, or a number is too large for `dtype`.
        OSError: it can't be written.
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


def _class(declared: Json) -> str:
    return f" ({declared['class']})" if "class" in declared else ""


def _read_config(path: Path) -> Json:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--hf-config {path} can't be read as JSON: {error}") from None
    return _checked(config, f"--hf-config {path}")


def _checked(config: Any, what: str) -> Json:
    """The content of a config.json, if it names a kind of model and speaks of weights as they are written."""
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'{what} must be a JSON object with a "model_type", as a model\'s config.json has')
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{what} has a quantization_config, but the weights are written as they are; take it out"
        )
    return config


def _of_type(config: Json, dtype: str) -> Json:
    """The config for weights of this type; nested configs (of a text and an image part) may name one too."""

    def with_type(value: Any) -> Any:
        if isinstance(value, dict):
            known = {key: dtype for key in ("dtype", "torch_dtype") if value.get(key) is not None}
            return {key: with_type(item) for key, item in value.items()} | known
        return [with_type(item) for item in value] if isinstance(value, list) else value

    # transformers 5 reads the first and takes the second for it, older releases know only the second.
    return dict(with_type(config)) | {"dtype": dtype, "torch_dtype": dtype}


# --- what a model says of itself ------------------------------------------------------------------------


def declared(model: nn.Module) -> dict[str, Any] | None:
    """What a model that one of `transformers` can stand for says of it: its `hugging_face`.

    That is `{"config": the content of config.json, "names": a name map}` (`uni3d/name_map.py`); a model of
    `transformers` itself needn't say it. What can't be kept is warned of, and left out: it is no reason not
    to train.
    """
    try:
        form: dict[str, Any] | None = getattr(model, "hugging_face", None) or _of_transformers(model)
        if form is None:
            return None
        ckpt.check_json(form, "it")
        parse(form)
    except Exception as error:  # of any kind: a configuration's class may be anybody's
        warnings.warn(
            f"checkpoints won't say what {type(model).__name__} is to Hugging Face (hugging_face): {error}",
            stacklevel=4,
        )
        return None
    return copy.deepcopy(form)


def _of_transformers(model: nn.Module) -> dict[str, Any] | None:
    """What a model of Hugging Face's library says by its configuration; None if it isn't one.

    Its names are theirs. A weight that the library ties by itself is left out under its second name.
    """
    # A model can only be one of theirs if this module has been imported. Not here: that takes seconds.
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = [k for k, first in ties.items() if k in parameters and parameters[k] is parameters.get(first)]
    return {"config": config, "names": {re.escape(name): None for name in tied}}
