"""`uni3d export`: write a checkpoint, or its weights alone, in another format."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from uni3d.cli.terminal import AnyRun, AsJson, From, Tag, answer, left_out, open_any, progress_bar
from uni3d.units import format_bytes

if TYPE_CHECKING:
    from ckpt import Checkpoint

_SUFFIXES = {".safetensors": "safetensors", ".bin": "torch", ".pt": "torch", ".pth": "torch"}
_FOLDERS = ("hf", "peft", "dcp", "megatron", "deepspeed-universal")
_WITH_OPTIMIZER = ("dcp", "megatron")
_DTYPES = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


def export(
    run: AnyRun,
    output: Annotated[
        Path,
        Argument(
            help="File to write, or folder with --max-shard-size or a format that is one. Must not exist.",
            show_default=False,
        ),
    ],
    tag: Tag = None,
    file_format: Annotated[
        str | None,
        Option(
            "--format",
            help="safetensors, torch; or a folder: hf for Hugging Face's transformers, peft for the adapters "
            "of a model of peft, dcp for "
            "torch.distributed.checkpoint, megatron for Megatron-core's dist_checkpointing, "
            "deepspeed-universal for DeepSpeed's load_universal.",
            show_default="from the suffix of OUTPUT",
        ),
    ] = None,
    dtype: Annotated[str, Option(help="Type of the parameters: fp32, bf16 or fp16.")] = "fp32",
    max_shard_size: Annotated[
        str | None,
        Option(
            help="Write several files of at most this size, and an index, with Hugging Face's file names.",
            show_default="one file; 5GB with --format hf",
        ),
    ] = None,
    include: Annotated[
        list[str] | None, Option(help="Only tensors whose names match, e.g. 'layers.0.*'. Can be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, Option(help="Leave out tensors whose names match. Can be repeated.")
    ] = None,
    optimizer: Annotated[
        bool,
        Option("--optimizer", help="With --format dcp or megatron: the optimizer's states and groups, too."),
    ] = False,
    hf_config: Annotated[
        Path | None, Option(help="With --format hf: the model's config.json, if the checkpoint has none.")
    ] = None,
    name_map: Annotated[
        Path | None,
        Option(
            help="With --format hf or megatron: JSON file that maps name patterns (regex) to the format's "
            "names, or to null to leave tensors out; for hf, if the checkpoint has none."
        ),
    ] = None,
    kind: From = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint's weights as one state_dict, in fp32 by default.

    Three formats hold the optimizer, too, and another trainer goes on from them: dcp and megatron with
    --optimizer, and deepspeed-universal. The result doesn't depend on the topology that saved the checkpoint.
    """
    import ckpt

    _check_options(
        file_format, dtype, max_shard_size, bool(include or exclude), optimizer, hf_config, name_map
    )
    hf = file_format == "hf"
    plain = None if file_format in _FOLDERS else _format(output, file_format, whole=max_shard_size is None)
    states = optimizer or file_format == "deepspeed-universal"
    checkpoint, of = open_any(run, tag, kind, states=states, trains=states), _DTYPES[dtype]
    if not ckpt.weights(checkpoint):
        raise ckpt.CheckpointError(f"{checkpoint.url}: the checkpoint has no weights")
    if file_format == "peft":
        files, names = _adapters(checkpoint, output, of)
    elif hf:
        files, names = _hugging_face(checkpoint, output, of, max_shard_size or "5GB", hf_config, name_map)
    else:
        names = _chosen(list(ckpt.weights(checkpoint)), include or [], exclude or [])
        if file_format == "dcp":
            files = _dcp(checkpoint, output, of, names if include or exclude else None, optimizer)
        elif file_format == "megatron":
            files, names = _megatron(checkpoint, output, of, names, name_map, optimizer)
        elif plain is None:
            files = _universal(checkpoint, output)
        else:
            files = _plain(checkpoint, output, plain, of, max_shard_size, names)
    by = "" if include or exclude else " by the name map"
    _report(checkpoint, output, files, names, f"left out{by}" if hf or name_map else None, as_json)


def _report(
    checkpoint: Checkpoint,
    output: Path,
    files: list[Path],
    names: list[str],
    without: str | None,
    as_json: bool,
) -> None:
    """Say what was written; `without` introduces the tensors that weren't."""
    import ckpt

    kept = set(names)
    unwanted = [name for name in ckpt.weights(checkpoint) if name not in kept]
    size = sum(file.stat().st_size for file in files)
    row = {"output": str(output), "tag": checkpoint.tag, "tensors": len(names), "bytes": size}
    row |= {"files": [str(file) for file in files], "left_out": unwanted}
    several = f" in {len(files)} files" if len(files) > 1 else ""
    lines = [f"{output}: {len(names)} tensors, {format_bytes(size)}{several}, from {checkpoint.tag}"]
    if unwanted and without:
        lines.append(f"{without}: {', '.join(unwanted)}")
    lines += [f"left out: {line}" for line in left_out(checkpoint)]
    answer(row, lines, as_json)


def _check_options(
    file_format: str | None,
    dtype: str,
    max_shard_size: str | None,
    chosen: bool,
    optimizer: bool,
    hf_config: Path | None,
    name_map: Path | None,
) -> None:
    """Raise ValueError if an option isn't for this format; `chosen` is whether tensors are."""
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype {dtype}: expected {', '.join(_DTYPES)}")
    if file_format in ("hf", "peft", "deepspeed-universal") and chosen:
        what = "whole adapters" if file_format == "peft" else "whole models"
        raise ValueError(f"--format {file_format} writes {what}; leave out --include and --exclude")
    if file_format == "deepspeed-universal" and dtype != "fp32":
        raise ValueError(f"--format {file_format} writes the fp32 weights; leave out --dtype {dtype}")
    if file_format != "hf" and hf_config is not None:
        raise ValueError("--hf-config needs --format hf")
    if file_format not in ("hf", "megatron") and name_map is not None:
        raise ValueError("--name-map needs --format hf or megatron")
    if file_format in _FOLDERS[1:] and max_shard_size is not None:
        each = "adapter" if file_format == "peft" else "tensor"
        raise ValueError(f"--format {file_format} writes a file for each {each}; leave out --max-shard-size")
    if optimizer and file_format not in _WITH_OPTIMIZER:
        raise ValueError(f"--optimizer needs --format {' or '.join(_WITH_OPTIMIZER)}")
    if optimizer and chosen:
        raise ValueError("--optimizer writes whole models; leave out --include and --exclude")
    if optimizer and dtype != "fp32":
        raise ValueError(f"--optimizer writes the fp32 weights that it trains; leave out --dtype {dtype}")


def _adapters(checkpoint: Checkpoint, output: Path, dtype: str | None) -> tuple[list[Path], list[str]]:
    """Write a folder that peft loads; return its files, and the stored names of its tensors."""
    import ckpt
    from uni3d.export import peft_adapters

    adapters = peft_adapters.find_adapters(checkpoint)
    names, infos = peft_adapters.tensors_of(adapters), ckpt.weights(checkpoint)
    with progress_bar("exporting", sum(ckpt.exported_bytes(infos[n], dtype) for n in names)) as progress:
        files = peft_adapters.write_adapters(checkpoint, output, adapters, dtype=dtype, progress=progress)
    return files, names


def _dcp(
    checkpoint: Checkpoint, output: Path, dtype: str | None, names: list[str] | None, optimizer: bool
) -> list[Path]:
    """Write a folder that torch.distributed.checkpoint loads; return its files."""
    import ckpt
    from uni3d.export_torch.dcp import dcp_content, write_dcp
    from uni3d.export_torch.torch_file import arrays_in

    content = dcp_content(checkpoint, names, optimizer=optimizer)
    total = sum(ckpt.exported_bytes(info, dtype) for info in arrays_in(content))
    with progress_bar("exporting", total) as progress:
        return write_dcp(checkpoint, output, content, dtype=dtype, progress=progress)


def _megatron(
    checkpoint: Checkpoint,
    output: Path,
    dtype: str | None,
    names: list[str],
    name_map: Path | None,
    optimizer: bool,
) -> tuple[list[Path], list[str]]:
    """Write a folder that Megatron-core loads; return its files, and the stored names of its tensors."""
    import ckpt
    from uni3d.export_torch.megatron import megatron_content, write_megatron
    from uni3d.name_map import NameMap

    renamed = NameMap({}) if name_map is None else NameMap.load(name_map)
    kept = renamed.rename_all(names)
    if not kept:
        raise ValueError(f"{renamed.source} leaves out every tensor in {checkpoint.url}")
    content = megatron_content(checkpoint, kept, optimizer=optimizer)
    total = sum(ckpt.exported_bytes(info, dtype) for info in content.arrays)
    with progress_bar("exporting", total) as progress:
        return write_megatron(checkpoint, output, content, dtype=dtype, progress=progress), list(kept)


def _universal(checkpoint: Checkpoint, output: Path) -> list[Path]:
    """Write a folder that DeepSpeed loads as a universal checkpoint; return its files."""
    from uni3d.export_torch.deepspeed_universal import universal_files, write_universal
    from uni3d.export_torch.torch_file import arrays_in

    contents = universal_files(checkpoint)
    total = sum(info.nbytes for content in contents.values() for info in arrays_in(content))
    with progress_bar("exporting", total) as progress:
        return write_universal(checkpoint, output, contents, progress=progress)


def _plain(
    checkpoint: Checkpoint,
    output: Path,
    kind: str,
    dtype: str | None,
    max_shard_size: str | None,
    names: list[str],
) -> list[Path]:
    """Write one file, or a folder of several, with the checkpoint's own tensor names; return the files."""
    import ckpt
    from uni3d.export.new_folder import new_folder
    from uni3d.manifest import RunManifest
    from uni3d.zero_to_fp32 import write_files

    infos = ckpt.weights(checkpoint)
    sizes = {name: ckpt.exported_bytes(infos[name], dtype) for name in names}
    aliases = {k: v for k, v in RunManifest.of(checkpoint).aliases.items() if v in sizes}
    with progress_bar("exporting", sum(sizes.values())) as progress:

        def write(path: Path, names: list[str], aliases: dict[str, str]) -> None:
            if kind == "safetensors":
                ckpt.export_safetensors(checkpoint, path, names=names, dtype=dtype, progress=progress)
            else:
                from uni3d.export_torch.torch_file import write_torch_file

                tensors = {name: infos[name] for name in names}
                tensors |= {alias: infos[first] for alias, first in aliases.items()}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_torch_file(checkpoint, path, tensors, dtype=dtype, progress=progress)

        if max_shard_size is None:
            if output.exists():
                raise FileExistsError(f"{output} already exists; delete it, or choose another name")
            write(output, names, aliases)
            return [output]
        with new_folder(output) as folder:
            made = write_files(folder, sizes, aliases, max_shard_size, kind == "safetensors", write)
        return [output / name for name in made]


def _hugging_face(
    checkpoint: Checkpoint,
    output: Path,
    dtype: str | None,
    max_shard_size: str,
    hf_config: Path | None,
    name_map: Path | None,
) -> tuple[list[Path], list[str]]:
    """Write a folder that transformers loads; return its files, and the stored names of its tensors."""
    import ckpt
    from uni3d.export import hugging_face

    model = hugging_face.find(checkpoint, hf_config, name_map)
    tensors = hugging_face.renamed(checkpoint, model.names)
    infos = ckpt.weights(checkpoint)
    total = sum(ckpt.exported_bytes(infos[held], dtype) for held in tensors.values())
    with progress_bar("exporting", total) as progress:
        files = hugging_face.write_folder(
            checkpoint,
            output,
            model.config,
            tensors,
            dtype=dtype or "float32",
            max_shard_size=max_shard_size,
            progress=progress,
        )
    return files, list(tensors.values())


def _format(output: Path, asked: str | None, *, whole: bool) -> str:
    """Return the format asked for, else that of the file's suffix; safetensors by default for a folder."""
    if asked not in (None, "safetensors", "torch"):
        raise ValueError(f"--format {asked}: expected safetensors, torch, {', '.join(_FOLDERS)}")
    named = _SUFFIXES.get(output.suffix) if whole else None
    if whole and named is None:
        raise ValueError(
            f"{output}: expected a suffix of {', '.join(_SUFFIXES)}; for a folder, give --max-shard-size"
        )
    if asked is not None and named not in (None, asked):
        raise ValueError(f"{output}: its suffix contradicts --format {asked}")
    return asked or named or "safetensors"


def _chosen(names: list[str], include: list[str], exclude: list[str]) -> list[str]:
    """Return the names that match a pattern of `include`, if there are any, and none of `exclude`."""
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"{option} {pattern} matches no tensor of {len(names)}")
    kept = [n for n in names if not include or any(fnmatchcase(n, pattern) for pattern in include)]
    kept = [n for n in kept if not any(fnmatchcase(n, pattern) for pattern in exclude)]
    if not kept:
        raise ValueError("--include and --exclude leave no tensor to export")
    return kept
