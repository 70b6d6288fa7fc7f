"""Which framework wrote a folder or a file, and what reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ckpt import CheckpointError, committed_tags
from ckpt.format import MANIFEST
from uni3d.importers.dcp import read_dcp
from uni3d.importers.deepspeed import read_deepspeed
from uni3d.importers.deepspeed.folders import checkpoint_folder, is_universal
from uni3d.importers.deepspeed.universal import read_universal
from uni3d.importers.megatron import read_megatron
from uni3d.importers.source import Options, Source
from uni3d.importers.state_dicts import read_safetensors, read_torch
from uni3d.importers.torch_files import is_archive

_READERS: dict[str, Callable[[Path, Options], Source]] = {
    "deepspeed": read_deepspeed,
    "deepspeed-universal": read_universal,
    "dcp": read_dcp,
    "megatron": read_megatron,
    "safetensors": read_safetensors,
    "torch": read_torch,
}
KINDS = tuple(_READERS)


def read(path: Path, kind: str, options: Options) -> Source:
    """What there is in a checkpoint of the kind `kind`, or `auto`.

    Raises:
        CheckpointError: there is none of that kind, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} doesn't exist")
    chosen = kind_of(path, options.tag) if kind == "auto" else kind
    if options.tag is not None and not chosen.startswith("deepspeed"):
        raise CheckpointError(f"--tag is for a run's folder of DeepSpeed's; {path} is of the kind {chosen}")
    return _READERS[chosen](path, options)


def kind_of(path: Path, tag: str | None = None) -> str:
    """What wrote it, by the files that are there.

    Raises:
        CheckpointError: none of them is known.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors"
        if is_archive(path) or path.suffix in (".pt", ".pth", ".bin"):
            return "torch"
        raise CheckpointError(f"{path} is neither a safetensors file nor one of torch.save")
    if (path / MANIFEST).is_file() or committed_tags(path):
        raise CheckpointError(f"{path} holds checkpoints of uni3d's own, which need no import")
    if (path / ".metadata").is_file():
        return "megatron" if (path / "metadata.json").is_file() else "dcp"
    newest = path / "latest_checkpointed_iteration.txt"
    if newest.is_file():
        content = newest.read_text().strip()
        name = f"iter_{int(content):07d}" if content.isdecimal() else content
        raise CheckpointError(f"{path} is a run's folder of Megatron's; give a checkpoint: {path / name}")
    folder = checkpoint_folder(path, tag)
    if folder is not None:
        return "deepspeed-universal" if is_universal(folder) else "deepspeed"
    for pattern, kind in (("*.safetensors", "safetensors"), ("*.bin", "torch")):
        if any(path.glob(pattern)):
            return kind
    raise CheckpointError(
        f"{path} is no checkpoint that is known here: it has neither .metadata (torch's distributed "
        "checkpoint, Megatron), nor *_model_states.pt below it (DeepSpeed), nor *.safetensors or *.bin "
        "(Hugging Face); if it is one, say which by --from"
    )
