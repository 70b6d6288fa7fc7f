"""`uni3d import`: other frameworks' checkpoints as ours, after which any topology resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uni3d.cli.terminal import AsJson, in_bytes, progress_bar, say, say_json, say_table

if TYPE_CHECKING:
    from uni3d.importers.source import ForeignArray, Options, Source


def import_(
    src: Annotated[
        Path, typer.Argument(help="A run's folder of DeepSpeed's, a checkpoint's, or a file of weights.")
    ],
    dst: Annotated[
        str | None,
        typer.Argument(
            help="Folder or URL of the run to make; not needed with --dry-run.", show_default=False
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--from", help="auto, deepspeed, deepspeed-universal, dcp, megatron, safetensors or torch."
        ),
    ] = "auto",
    tag: Annotated[
        str | None, typer.Option(help="Of SRC, where it has several; its newest by default.")
    ] = None,
    as_tag: Annotated[
        str | None, typer.Option("--as", help="Tag to make.", show_default="global_step<N>")
    ] = None,
    name_map: Annotated[
        Path | None, typer.Option(help="JSON file, regex -> replacement, for models with other names.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would become of what, and what is left over.")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the optimizer's states and the schedule.")
    ] = False,
    optimizer: Annotated[
        str | None, typer.Option(help="Class of the optimizer in torch, where SRC doesn't say; e.g. AdamW.")
    ] = None,
    buffers: Annotated[
        list[str] | None,
        typer.Option(help="Names that are buffers, where SRC doesn't say; e.g. '*.inv_freq'."),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="How tensor-parallel parts go together, where SRC doesn't say: 'PATTERN=RULE', with the "
            "RULE 0 or 1 (along that dim), 0x2 or 0x3 (several in one, each cut along dim 0), replicated or "
            "average."
        ),
    ] = None,
    in_model_order: Annotated[
        bool,
        typer.Option(
            "--in-model-order", help="Take an optimizer's numbered states in the order of parameters."
        ),
    ] = False,
    frozen: Annotated[
        list[str] | None, typer.Option(help="With --in-model-order: parameters that weren't trained.")
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Store tensors that share memory, or look tied, each by itself.")
    ] = False,
    stand_in: Annotated[
        list[str] | None, typer.Option(help="A class of your own that is pickled in SRC, to be left out.")
    ] = None,
    no_checksums: Annotated[
        bool, typer.Option("--no-checksums", help="Don't check what SRC has checksums of, or has twice.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of another framework's, with the optimizer's states where it has them.

    Nothing in it is run. Pickles may hold tensors and plain containers; classes of the frameworks become
    inert stand-ins, and everything else is refused by name.
    """
    from ckpt import check_tag
    from uni3d.importers.detect import KINDS, read
    from uni3d.importers.source import Options

    if kind not in ("auto", *KINDS):
        raise ValueError(f"--from {kind} isn't one of auto, {', '.join(KINDS)}")
    if dst is None and not dry_run:
        raise ValueError("give DST, the run to make, or --dry-run")
    options = Options(
        tag=tag,
        buffers=tuple(buffers or ()),
        split=_rules(split or []),
        in_model_order=in_model_order,
        frozen=tuple(frozen or ()),
        untie=untie,
        stand_ins=tuple(stand_in or ()),
        weights_only=weights_only,
        verify=not no_checksums,
    )
    _check_place(src, dst)
    found = read(src, kind, options)
    _check_used(options, found)
    mapped = _renamed(found, name_map)
    if weights_only:
        mapped = mapped.weights_alone()
    _check_optimizer(mapped, optimizer)
    name = check_tag(f"global_step{mapped.step}" if as_tag is None else as_tag)
    if dry_run:
        _tell(found, mapped, name, as_json=as_json)
        return
    assert dst is not None, "checked above"
    _write(mapped, dst, name, optimizer, as_json=as_json)


def _write(source: Source, dst: str, tag: str, optimizer: str | None, *, as_json: bool) -> None:
    import ckpt
    from uni3d.importers.write import write

    before = ckpt.committed_tags(dst)
    with progress_bar("importing", sum(_size(array) for array in source.arrays)) as progress:
        report = write(source, dst, tag, optimizer=optimizer, progress=progress)
    if as_json:
        row = {"url": report.url, "tag": tag, "from": source.kind, "arrays": len(source.arrays)}
        say_json({**row, "bytes": report.bytes_written, **_beside(source)})
        return
    for line in source.left_out:
        say(f"left out: {line}")
    say(f"{report.url}: {len(source.arrays)} arrays, {in_bytes(report.bytes_written)}, from {_what(source)}")
    if before:
        say(f"{dst} had {', '.join(before)} already; its latest is now {tag}")
    say(_resumes(source))


def _tell(found: Source, mapped: Source, tag: str, *, as_json: bool) -> None:
    """What would become of what."""
    rows = _rows(mapped)
    if as_json:
        say_json({"tag": tag, "from": found.kind, "atoms": rows, **_beside(mapped)})
        return
    if rows:
        say_table(rows)
    for line in mapped.left_out:
        say(f"left over: {line}")
    for alias, name in mapped.aliases.items():
        say(f"tied: {alias} is another name of {name}")
    say(f"{len(rows)} atoms from {_what(mapped)} would become {tag}")
    say(_resumes(mapped))


def _rows(source: Source) -> list[dict[str, Any]]:
    """A row for each atom."""
    atoms: dict[str, list[ForeignArray]] = {}
    for array in source.arrays:
        atoms.setdefault(array.name, []).append(array)
    return [
        {
            "from": arrays[0].origin,
            "atom": name,
            "states": ", ".join(array.state for array in arrays),
            "dtype": arrays[0].dtype,
            "shape": "x".join(map(str, arrays[0].shape)) or "scalar",
            "bytes": sum(_size(array) for array in arrays),
        }
        for name, arrays in atoms.items()
    ]


def _beside(source: Source) -> dict[str, Any]:
    """What there is beside the arrays, for machines."""
    optimizer = source.optimizer
    return {
        "step": source.step,
        "aliases": source.aliases,
        "frozen": sorted(source.frozen),
        "optimizer": None if optimizer is None else optimizer.type,
        "scheduler": source.scheduler is not None,
        "left_out": source.left_out,
    }


def _resumes(source: Source) -> str:
    """How the checkpoint that is made can be loaded."""
    if source.optimizer is None:
        return "It has weights alone: load_checkpoint(..., load_module_only=True)."
    if source.scheduler is None:
        return (
            "It has the optimizer's states, but no schedule: a run that has one loads it with "
            "load_lr_scheduler_states=False."
        )
    return "It has the optimizer's states and the schedule: any topology resumes from it."


def _what(source: Source) -> str:
    return f"{source.kind}, step {source.step}" if source.step else source.kind


def _size(array: ForeignArray) -> int:
    from math import prod

    from ckpt import numpy_dtype

    return prod(array.shape) * numpy_dtype(array.dtype).itemsize


def _renamed(source: Source, name_map: Path | None) -> Source:
    if name_map is None:
        return source
    from uni3d.name_map import NameMap

    names = NameMap.load(name_map)
    renamed = source.renamed(names.rename)
    idle = [
        f"nothing by {pattern!r}: no name matches this pattern of the name map" for pattern in names.unused
    ]
    return replace(renamed, left_out=[*renamed.left_out, *idle])


def _check_place(src: Path, dst: str | None) -> None:
    """Refuse a DST among SRC's own files."""
    if dst is not None and "://" not in dst and src.is_dir() and src.resolve() in Path(dst).resolve().parents:
        raise ValueError(f"DST {dst} lies in SRC {src}; import into a folder elsewhere")


def _check_optimizer(source: Source, given: str | None) -> None:
    """The class of the optimizer must be known, said once, and one that there is."""
    said = None if source.optimizer is None else source.optimizer.type
    if source.optimizer is None:
        if given is not None:
            raise ValueError(f"--optimizer {given}: there are no states of an optimizer to take over")
    elif given is None and said is None:
        raise ValueError(
            f"{source.where} doesn't say which optimizer its states are of; say it, e.g. by --optimizer "
            "AdamW, or leave them by --weights-only"
        )
    elif given is not None and said not in (None, given):
        raise ValueError(f"--optimizer {given}: {source.where} says that its states are of {said}")
    elif given is not None and given not in _optimizers():
        raise ValueError(f"--optimizer {given} isn't one of {', '.join(_optimizers())}")


def _optimizers() -> list[str]:
    """Classes whose states can be taken up."""
    from uni3d.config import torch_optimizers as torch_optim

    return sorted({*torch_optim.names(), "Adam", "AdamW", "Lion", "MuonWithAdam"})


def _rules(split: list[str]) -> tuple[tuple[str, str], ...]:
    from uni3d.importers.deepspeed.tensor_parallel import RULES

    rules = []
    for each in split:
        pattern, equals, rule = each.rpartition("=")
        if not equals or rule not in RULES:
            raise ValueError(f"--split {each} isn't PATTERN=RULE with a RULE out of {', '.join(RULES)}")
        rules.append((pattern, rule))
    return tuple(rules)


def _check_used(options: Options, found: Source) -> None:
    """Refuse options that decide nothing: a mistyped one must not go unseen."""
    from fnmatch import fnmatchcase

    deepspeed = found.kind.startswith("deepspeed")
    for option, given in (("--split", options.split), ("--in-model-order", options.in_model_order)):
        if given and not deepspeed:
            raise ValueError(
                f"{option} is for DeepSpeed's checkpoints; {found.where} is of the kind {found.kind}"
            )
    if options.frozen and not options.in_model_order:
        raise ValueError("--frozen is for --in-model-order; elsewhere the source says what was trained")
    if options.untie and found.kind not in ("dcp", "torch"):
        raise ValueError(f"--untie is for state_dicts and DCP; {found.where} is of the kind {found.kind}")
    if options.buffers and deepspeed:
        raise ValueError("--buffers isn't for DeepSpeed's checkpoints, which say what is a buffer")
    names = {array.name for array in found.arrays}
    for option, patterns in (("--buffers", options.buffers), ("--split", [p for p, _ in options.split])):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{option} {pattern} matches none of the {len(names)} names in {found.where}"
                )
