"""Detection of the framework that wrote a folder or file, and the choice of its reader."""

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
    """Read the checkpoint at `path`; `kind` is one of `KINDS` or `auto`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path} doesn't exist")
    chosen = kind_of(path, options.tag) if kind == "auto" else kind
    if options.tag is not None and not chosen.startswith("deepspeed"):
        raise CheckpointError(f"--tag only works with DeepSpeed checkpoints; {path} is a {chosen} one")
    return _READERS[chosen](path, options)


def kind_of(path: Path, tag: str | None = None) -> str:
    """Return the kind of checkpoint, one of `KINDS`, judging by file names.

    Raises:
        CheckpointError: no known kind has these files.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return "safetensors"
        if is_archive(path) or path.suffix in (".pt", ".pth", ".bin"):
            return "torch"
        raise CheckpointError(f"{path} is neither a safetensors file nor a file written by torch.save")
    if (path / MANIFEST).is_file() or committed_tags(path):
        raise CheckpointError(f"{path} already is a uni3d checkpoint or run; load it without an import")
    if (path / ".metadata").is_file():
        return "megatron" if (path / "metadata.json").is_file() else "dcp"
    newest = path / "latest_checkpointed_iteration.txt"
    if newest.is_file():
        content = newest.read_text().strip()
        name = f"iter_{int(content):07d}" if content.isdecimal() else content
        raise CheckpointError(
            f"{path} is the folder of a Megatron run; give one of its checkpoints, e.g. {path / name}"
        )
    folder = checkpoint_folder(path, tag)
    if folder is not None:
        return "deepspeed-universal" if is_universal(folder) else "deepspeed"
    for pattern, kind in (("*.safetensors", "safetensors"), ("*.bin", "torch")):
        if any(path.glob(pattern)):
            return kind
    raise CheckpointError(
        f"{path} isn't a known kind of checkpoint. Expected .metadata (torch's distributed checkpoint, "
        "Megatron), *_model_states.pt (DeepSpeed), *.safetensors or *.bin (Hugging Face). To override the "
        "detection, use --from"
    )
