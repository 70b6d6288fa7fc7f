"""Files in a folder: the one set of weights that is read, and everything that isn't read.

A set is a file, or an index with the files that it names. Only the user knows which of two sets is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from ckpt import CheckpointError

INDEX = ".index.json"
SUFFIXES = {".safetensors": "safetensors", ".bin": "torch"}
"""Suffixes of files of weights, and their readers."""

_PART = re.compile(r"-\d+-of-(\d+)\.")
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|sampler|scaler|dl_state_dict)(_\d+)?\.bin")
"""Files of transformers' Trainer and of Accelerate that hold no weights."""
_ONE_OF_MANY = (
    (r"(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt", "of a DeepSpeed checkpoint"),
    (r"layer_\d+-.*model_states\.pt", "of a DeepSpeed checkpoint"),
    (r"model_(optim_)?rng\.pt", "of Megatron's old format, of one model-parallel rank"),
    (r"consolidated\.\d+\.pth", "of one model-parallel rank"),
    (r".*_rank_?\d+\.(pt|pth|bin|safetensors)", "of one rank"),
)
"""Names of files that hold a part of the weights, though each by itself can be read."""
_ADAPTER_FILE = "adapter_model."
_LORA = re.compile(r"(?:.*\.)?lora[_.].*")
_NOT_READ = (
    ("optimizer*", "optimizer state in a file of its own"),
    ("scheduler*", "an LR schedule in a file of its own"),
    ("r*_state*", "states of random-number generators"),
)
"""Patterns of files that aren't read, and their likely content."""


class WeightFiles(NamedTuple):
    """One set of weights."""

    named: Path
    """The index, or the only file."""
    files: list[Path]
    placed: dict[Path, set[str]]
    """The index's tensor names by file; empty without an index."""


def kind_of_file(path: Path) -> str | None:
    """Return the reader of a file of weights or an index, judging by its name; None for other files."""
    name = path.name.lower().removesuffix(INDEX)
    return None if _TRAINING.fullmatch(name) else SUFFIXES.get(Path(name).suffix)


def sets(folder: Path, kind: str | None = None) -> dict[str, str]:
    """Return the sets of weights in a folder, of one kind or of all: name of an index or file -> kind.

    Files that are parts of one state_dict, without an index, count as one.
    """
    kinds = {path: kind_of_file(path) for path in sorted(folder.iterdir()) if not path.is_dir()}
    found = {path: each for path, each in kinds.items() if each and kind in (None, each)}
    placed = {part for path in found if is_index(path) for part in _weight_map(path)}
    parts: dict[tuple[str, str], Path] = {}
    for path, each in found.items():
        if path not in placed and (part := _PART.search(path.name)) and int(part[1]) > 1:
            parts.setdefault((each, part[1]), path)
            if parts[each, part[1]] != path:
                placed.add(path)
    return {path.name: each for path, each in found.items() if path not in placed}


def check_one(folder: Path, found: Mapping[str, str]) -> None:
    """Refuse a folder with several sets of weights: names, and kinds as in `--from`."""
    if len(found) > 1:
        by_kind = f", choose with --from ({' or '.join(found.values())})"
        raise CheckpointError(
            f"{folder} has several sets of weights: {' and '.join(found)}. Give the one to read as SRC (an "
            f"index stands for the files it names){by_kind if len({*found.values()}) > 1 else ''}, or "
            "delete the others"
        )


def files_of(path: Path, kind: str) -> WeightFiles:
    """Return the set of weights at `path`: a file, an index, or a folder with one of them."""
    if path.is_dir():
        found = sets(path, kind)
        check_one(path, found)
        if not found:
            suffix = next(suffix for suffix, each in SUFFIXES.items() if each == kind)
            raise CheckpointError(f"{path} has no file *{suffix} with weights")
        path /= next(iter(found))
    if is_index(path):
        placed = _indexed(path)
        return WeightFiles(path, list(placed), placed)
    part = _PART.search(path.name)
    if part and int(part[1]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(part[1])} files; give the folder, which must have their index"
        )
    if path.name.startswith(_ADAPTER_FILE):
        raise CheckpointError(adapter(path))
    return WeightFiles(path, [path], {})


def adapter(path: Path) -> str:
    """Return the error for a file of an adapter."""
    return (
        f"{path} is an adapter (LoRA or another of peft's), not a whole model. Merge it into its base model "
        "first, with peft's merge_and_unload() and save_pretrained(FOLDER), and import FOLDER"
    )


def is_adapter(names: Collection[str]) -> bool:
    """Return whether parameters of these names are an adapter's alone, without the base model's."""
    return bool(names) and all(_LORA.fullmatch(name) for name in names)


def unread(folders: Sequence[Path], read: Collection[Path]) -> list[str]:
    """Return lines for everything in the folders but the files `read` and the folders of these.

    The names are relative to the first folder, which has the others.
    """
    known = {*read, *(parent for path in read for parent in path.parents)}
    lines: dict[str, list[str]] = {}
    for folder in dict.fromkeys(folders):
        for path in sorted(folder.iterdir()):
            if path not in known:
                lines.setdefault(_content(path), []).append(str(path.relative_to(folders[0])))
    return [f"{', '.join(names)}: not read{what}" for what, names in lines.items()]


def _content(path: Path) -> str:
    """Return the likely content of a file that isn't read, in parentheses; empty if it may be anything."""
    if path.is_dir():
        return " (a folder)"
    if kind_of_file(path):
        return " (other weights)"
    name = path.name.lower()
    return next((f" ({words})" for pattern, words in _NOT_READ if fnmatchcase(name, pattern)), "")


def check_whole(path: Path) -> None:
    """Refuse a file that by its name has a part of the weights: one rank's, or one layer's."""
    if path.name == "consolidated.00.pth" and not path.with_name("consolidated.01.pth").exists():
        return  # Llama's name of an only file
    for pattern, whose in _ONE_OF_MANY:
        if re.fullmatch(pattern, path.name):
            raise CheckpointError(
                f"{path} is a file {whose}, so it may lack weights; give the folder of the whole checkpoint, "
                f"or if it has all of them, add --from {kind_of_file(path) or 'torch'}"
            )


def is_index(path: Path) -> bool:
    """Return whether the file is an index, judging by its name."""
    return path.name.lower().endswith(INDEX)


def _weight_map(index: Path) -> dict[Path, set[str]]:
    """Return the index's tensor names by file."""
    placed: dict[Path, set[str]] = {}
    try:
        for name, file in sorted(json.loads(index.read_text())["weight_map"].items(), key=lambda x: x[1]):
            placed.setdefault(index.parent / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} isn't an index of weights: {type(error).__name__}: {error}") from None
    if not placed:
        raise CheckpointError(f"{index} names no tensors")
    for file in placed:
        if file.parent != index.parent or is_index(file) or kind_of_file(file) != kind_of_file(index):
            kind = Path(index.name.lower().removesuffix(INDEX)).suffix
            raise CheckpointError(f"{index} names {file}, which isn't a {kind} file in its folder")
    return placed


def _indexed(index: Path) -> dict[Path, set[str]]:
    """Return the index's tensor names by file, after checking that each file exists and is named."""
    placed = _weight_map(index)
    for file in placed:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; {index.name} refers to it")
    totals = {int(part[1]) for file in placed if (part := _PART.search(file.name))}
    if totals and totals != {len(placed)}:
        raise CheckpointError(
            f"{index} names {len(placed)} files, but by their names there are {max(totals)}; save it again"
        )
    return placed
