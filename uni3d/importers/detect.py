"""Detection of the framework that wrote a folder or file, and the choice of its reader."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ckpt import CheckpointError, committed_tags
from ckpt.format import MANIFEST
from uni3d.importers.accelerate import is_sharded, read_accelerate
from uni3d.importers.dcp import read_dcp
from uni3d.importers.dcp.layout import METADATA
from uni3d.importers.deepspeed import read_deepspeed
from uni3d.importers.deepspeed.folders import checkpoint_folder, is_universal
from uni3d.importers.deepspeed.universal import read_universal
from uni3d.importers.megatron import BACKEND, read_megatron
from uni3d.importers.source import PARAMETER, Array, ForeignArray, Options, Source
from uni3d.importers.state_dicts import read_safetensors, read_torch
from uni3d.importers.torch_files import is_archive
from uni3d.importers.trainer_files import with_optimizer
from uni3d.importers.weight_files import (
    SUFFIXES,
    check_one,
    check_whole,
    is_adapter,
    is_index,
    kind_of_file,
    sets,
    unread,
)

_READERS: dict[str, Callable[[Path, Options], Source]] = {
    "deepspeed": read_deepspeed,
    "deepspeed-universal": read_universal,
    "dcp": read_dcp,
    "accelerate": read_accelerate,
    "megatron": read_megatron,
    "safetensors": read_safetensors,
    "torch": read_torch,
}
KINDS = tuple(_READERS)
_OF_A_WRONG_FORM: tuple[type[Exception], ...] = (ArithmeticError, AttributeError, LookupError, MemoryError)
_OF_A_WRONG_FORM += (RecursionError, TypeError, ValueError)
"""Errors of Python's that code raises which follows a form that isn't there."""
_TORCH = (".pt", ".pth", ".bin")
_NUMBERED = re.compile(r"(?:checkpoint|step|epoch)[-_](\d+)")
"""Names of checkpoints in the folder of a run of transformers, accelerate and scripts like theirs."""


class UnknownKindError(CheckpointError):
    """A file or folder in which nothing looks like a checkpoint."""


def check_exists(path: Path, what: str = "") -> None:
    """Raise CheckpointError if there is nothing at a path, or it can't be known; `what` comes before it."""
    if re.match("[a-z][a-z0-9+.-]+:/", str(path)):  # pathlib leaves one slash of a URL's two
        raise CheckpointError(
            f"{what}{path} is a URL, but only files of this machine can be read here; copy it to a folder"
        )
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{what}{path} doesn't exist") from None
    except OSError as error:
        raise CheckpointError(f"{what}{path} can't be read: {error.strerror}") from None


def read(path: Path, kind: str, options: Options) -> Source:
    """Read the checkpoint at `path`; `kind` is one of `KINDS` or `auto`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    check_exists(path)
    with telling_of(path, "known"):
        chosen = kind_of(path, options.tag) if kind == "auto" else kind
    if options.tag is not None and not chosen.startswith("deepspeed"):
        raise CheckpointError(f"a tag only works with DeepSpeed checkpoints; {path} is a {chosen} one")
    with telling_of(path, chosen):
        found = _READERS[chosen](path, options)
        if chosen in SUFFIXES.values() and path.is_dir():
            found = with_config(with_optimizer(found, path, options), path)
        found = replace(found, arrays=[_telling(array, path, chosen) for array in found.arrays])
    folders = [path, Path(found.where)] if path.is_dir() else [path.parent] if is_index(path) else []
    left_out = [*found.left_out, *unread(folders, found.files)]
    if is_adapter([array.name for array in found.arrays if array.state == PARAMETER]):
        left_out.append("the base model: SRC has the weights of an adapter (LoRA) alone")
    return replace(found, left_out=left_out)


@contextmanager
def telling_of(path: Path, kind: str) -> Iterator[None]:
    """Let errors of the block name the checkpoint at `path`, and turn those of a wrong form into one.

    Files of other frameworks have no schema: a number may be a string, a key absent, a list too short, in
    places without number. Readers check what would be read wrongly; what they can't follow ends here.
    """
    try:
        yield
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error
    except _OF_A_WRONG_FORM as error:
        raise CheckpointError(
            f"{path} hasn't the form of a {kind} checkpoint: {type(error).__name__}: {str(error)[:300]}; if "
            "it loads in the framework that wrote it, report this as an error of uni3d"
        ) from error


def _telling(array: ForeignArray, path: Path, kind: str) -> ForeignArray:
    """Return an array whose read tells of the checkpoint as `telling_of` does."""

    def telling(read: Callable[..., Array]) -> Callable[..., Array]:
        def told(*part: Any) -> Array:
            with telling_of(path, kind):
                return read(*part)

        return told

    part = array.read_part
    return replace(array, read=telling(array.read), read_part=None if part is None else telling(part))


def with_config(source: Source, folder: Path) -> Source:
    """Return the source of a folder's weights with Hugging Face's description of the model, if any."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return source
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return source
    if config.get("quantization_config") is not None:  # of no use for weights that aren't quantized
        return source
    declared = {"hugging_face": {"config": config}}
    return replace(source, declared=declared, files=source.files | {file})


def kind_of(path: Path, tag: str | None = None) -> str:
    """Return the kind of checkpoint, one of `KINDS`, judging by file names.

    Raises:
        CheckpointError: no known kind has these files.
    """
    if path.is_file():
        check_whole(path)
        kind = kind_of_file(path) or ("torch" if is_archive(path) or path.suffix.lower() in _TORCH else None)
        if kind is None:
            raise UnknownKindError(f"{path} is neither a safetensors file nor a file written by torch.save")
        return kind
    if (path / MANIFEST).is_file() or committed_tags(path):
        raise CheckpointError(f"{path} already is a uni3d checkpoint or run; load it without an import")
    newest = path / "latest_checkpointed_iteration.txt"
    if newest.is_file() and not (path / METADATA).is_file():
        content = newest.read_text().strip()
        name = f"iter_{int(content):07d}" if content.isdecimal() else content
        raise CheckpointError(
            f"{path} is the folder of a Megatron run; give one of its checkpoints, e.g. {path / name}"
        )
    place, found = path, dict[str, str]()
    if (path / METADATA).is_file():
        found[METADATA] = "megatron" if (path / BACKEND).is_file() else "dcp"
    elif is_sharded(path):
        found["pytorch_model_fsdp_0"] = "accelerate"
    elif folder := checkpoint_folder(path, tag):
        place = folder
        found["*_model_states.pt"] = "deepspeed-universal" if is_universal(folder) else "deepspeed"
    found |= sets(place)
    check_one(place, found)
    if not found:
        _refuse_unknown(path)
    return next(iter(found.values()))


def _refuse_unknown(path: Path) -> NoReturn:
    """Raise the error for a folder of no known kind, with its folders that may be of one."""
    numbered = {int(m[1]): each for each in path.iterdir() if (m := _NUMBERED.fullmatch(each.name))}
    if numbered:
        names = ", ".join(numbered[n].name for n in sorted(numbered))
        newest = numbered[max(numbered)]
        raise CheckpointError(f"{path} is the folder of a run ({names}); did you mean {newest}?")
    marks = (METADATA, "latest", "*_model_states.pt", *(f"*{suffix}" for suffix in SUFFIXES))
    inside = [
        each.name
        for each in sorted(path.iterdir())
        if each.is_dir() and any(any(each.glob(mark)) for mark in marks)
    ]
    text = (
        f"{path} isn't a known kind of checkpoint. Expected {METADATA} (torch's distributed checkpoint, "
        "Megatron), *_model_states.pt (DeepSpeed), *.safetensors or *.bin (Hugging Face). "
        + (f"Its folders {', '.join(inside)} may be; give one of them. " if inside else "")
        + "To override the detection, use --from"
    )
    raise CheckpointError(text) if inside else UnknownKindError(text)
