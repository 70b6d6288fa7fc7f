"""`uni3d import`: convert other frameworks' checkpoints, after which any topology can resume from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, answer, progress_bar, say, say_json, say_table
from uni3d.units import format_bytes

if TYPE_CHECKING:
    from uni3d.importers.source import ForeignArray, Options, Source


def import_(
    src: Annotated[
        Path,
        Argument(help="Folder of a run or checkpoint, or a file (or index) of weights.", show_default=False),
    ],
    dst: Annotated[
        str | None,
        Argument(help="Folder or URL of the run to write. Optional with --dry-run.", show_default=False),
    ] = None,
    kind: Annotated[
        str,
        Option(
            "--from",
            help="auto, deepspeed, deepspeed-universal, dcp, accelerate, megatron, safetensors or torch.",
        ),
    ] = "auto",
    tag: Annotated[
        str | None, Option(help="Tag to read, if SRC has several.", show_default="its newest")
    ] = None,
    as_tag: Annotated[str | None, Option("--as", help="Tag to write.", show_default="global_step<N>")] = None,
    name_map: Annotated[
        Path | None, Option(help="JSON file of regex -> replacement that renames the tensors.")
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show what would be imported and left out; write nothing.")
    ] = False,
    weights_only: Annotated[
        bool, Option("--weights-only", help="Leave out the optimizer states and the LR schedule.")
    ] = False,
    optimizer: Annotated[
        str | None, Option(help="Class of the optimizer, e.g. AdamW, if SRC doesn't record it.")
    ] = None,
    buffers: Annotated[
        list[str] | None,
        Option(
            help="Names of tensors that are buffers, e.g. '*.inv_freq', if SRC doesn't record it. "
            "Can be repeated."
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        Option(
            help="How to merge tensor-parallel shards, if SRC doesn't record it: 'PATTERN=RULE', where RULE "
            "is 0 or 1 (concatenate along that dim), 0x2 or 0x3 (2 or 3 fused tensors, each split along "
            "dim 0), replicated or average. Can be repeated."
        ),
    ] = None,
    in_model_order: Annotated[
        bool,
        Option("--in-model-order", help="Match an optimizer's numbered states to parameters by their order."),
    ] = False,
    frozen: Annotated[
        list[str] | None,
        Option(help="With --in-model-order: parameters that were not trained. Can be repeated."),
    ] = None,
    untie: Annotated[
        bool, Option("--untie", help="Store tensors that share memory, or look tied, separately.")
    ] = False,
    stand_in: Annotated[
        list[str] | None,
        Option(help="Your own class that is pickled in SRC, to be ignored. Can be repeated."),
    ] = None,
    trust: Annotated[
        bool,
        Option("--trust", help="Read SRC's pickles without trying them in a process with limits first."),
    ] = False,
    no_checksums: Annotated[
        bool, Option("--no-checksums", help="Skip SRC's checksums and the comparison of its copies.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert another framework's checkpoint, with its optimizer states if it has them.

    Never runs code from the checkpoint. Pickles may hold tensors and plain containers; known classes of the
    frameworks become inert stand-ins, and anything else is refused by name.
    """
    from ckpt import check_tag
    from uni3d.importers.detect import read
    from uni3d.importers.source import Options

    _check_arguments(kind, src, dst, dry_run)
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
        trust=trust,
    )
    found = read(src, kind, options)
    _check_used(options, found)
    mapped = _renamed(found, name_map)
    if weights_only:
        mapped = mapped.weights_alone()
    _check_optimizer(mapped, optimizer)
    name = check_tag(f"global_step{mapped.step}" if as_tag is None else as_tag)
    if dry_run:
        _tell(found, mapped, name, as_json=as_json)
    else:
        _write(mapped, str(dst), name, optimizer, as_json=as_json)


def _check_arguments(kind: str, src: Path, dst: str | None, dry_run: bool) -> None:
    from uni3d.importers.detect import KINDS

    if kind not in ("auto", *KINDS):
        raise ValueError(f"--from {kind}: expected auto, {', '.join(KINDS)}")
    if dst is None and not dry_run:
        raise ValueError("DST is missing; give the run to write, or --dry-run")
    if dst is not None and "://" not in dst and src.is_dir() and src.resolve() in Path(dst).resolve().parents:
        raise ValueError(f"DST {dst} lies inside SRC {src}; choose a folder outside it")


def _write(source: Source, dst: str, tag: str, optimizer: str | None, *, as_json: bool) -> None:
    import ckpt
    from uni3d.importers.write import write

    before = ckpt.committed_tags(dst)
    with progress_bar("importing", sum(array.nbytes for array in source.arrays)) as progress:
        report = write(source, dst, tag, optimizer=optimizer, progress=progress)
    row = {"url": report.url, "tag": tag, "from": source.kind, "arrays": len(source.arrays)}
    row |= {"bytes": report.bytes_written, **_metadata(source)}
    size = format_bytes(report.bytes_written)
    lines = [f"left out: {line}" for line in source.left_out]
    lines.append(f"{report.url}: {len(source.arrays)} arrays, {size}, from {_origin(source)}")
    if before:
        lines.append(f"{dst} already had {', '.join(before)}; its latest is now {tag}")
    answer(row, [*lines, _resumes(source)], as_json)


def _tell(found: Source, mapped: Source, tag: str, *, as_json: bool) -> None:
    """Print what an import would write."""
    rows = _rows(mapped)
    if as_json:
        say_json({"tag": tag, "from": found.kind, "atoms": rows, **_metadata(mapped)})
        return
    if rows:
        say_table(rows)
    for line in mapped.left_out:
        say(f"left out: {line}")
    for alias, name in mapped.aliases.items():
        say(f"tied: {alias} is an alias of {name}")
    say(f"{len(rows)} atoms from {_origin(mapped)} would become {tag}")
    say(_resumes(mapped))


def _rows(source: Source) -> list[dict[str, Any]]:
    """Return a row for each atom."""
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
            "bytes": sum(array.nbytes for array in arrays),
        }
        for name, arrays in atoms.items()
    ]


def _metadata(source: Source) -> dict[str, Any]:
    """Return everything but the arrays, for JSON."""
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
    """Return how the new checkpoint can be loaded."""
    if source.optimizer is None:
        return "It has weights only; load it with load_checkpoint(..., load_module_only=True)."
    if source.scheduler is None:
        return (
            "It has optimizer states but no LR schedule; a run with a scheduler loads it with "
            "load_lr_scheduler_states=False."
        )
    return "It has optimizer states and the LR schedule; any topology can resume from it."


def _origin(source: Source) -> str:
    return f"{source.kind}, step {source.step}" if source.step else source.kind


def _renamed(source: Source, name_map: Path | None) -> Source:
    if name_map is None:
        return source
    from uni3d.importers.in_place import renamed
    from uni3d.name_map import NameMap

    return renamed(source, NameMap.load(name_map))


def _check_optimizer(source: Source, given: str | None) -> None:
    """Check that the optimizer's class is known, unambiguous and supported."""
    said = None if source.optimizer is None else source.optimizer.type
    if source.optimizer is None:
        if given is not None:
            raise ValueError(f"--optimizer {given}: {source.where} has no optimizer states")
    elif given is None and said is None:
        raise ValueError(
            f"{source.where} doesn't record the class of its optimizer; give it, e.g. --optimizer AdamW, or "
            "leave the optimizer states out with --weights-only"
        )
    elif given is not None and said not in (None, given):
        raise ValueError(f"--optimizer {given}: {source.where} has states of {said}")
    elif given is not None and given not in _optimizers():
        raise ValueError(f"--optimizer {given}: expected one of {', '.join(_optimizers())}")


def _optimizers() -> list[str]:
    """Return the optimizer classes whose states can be loaded."""
    from uni3d.config.torch_optimizers import names

    return sorted({*names(), "Adam", "AdamW", "Lion", "MuonWithAdam"})


def _rules(split: list[str]) -> tuple[tuple[str, str], ...]:
    from uni3d.importers.deepspeed.tensor_parallel import RULES

    rules = []
    for each in split:
        pattern, equals, rule = each.rpartition("=")
        if not equals or rule not in RULES:
            raise ValueError(f"--split {each}: expected PATTERN=RULE with RULE of {', '.join(RULES)}")
        rules.append((pattern, rule))
    return tuple(rules)


def _check_used(options: Options, found: Source) -> None:
    """Refuse options that have no effect: they are likely a mistake."""
    from fnmatch import fnmatchcase

    deepspeed = found.kind.startswith("deepspeed")
    this = f"{found.where} is a {found.kind} one"
    for option, given, fits, kinds in (
        ("--split", options.split, deepspeed, "DeepSpeed"),
        ("--in-model-order", options.in_model_order, deepspeed, "DeepSpeed"),
        ("--untie", options.untie, found.kind in ("dcp", "accelerate", "torch"), "torch, dcp and accelerate"),
    ):
        if given and not fits:
            raise ValueError(f"{option} only works with {kinds} checkpoints; {this}")
    if options.frozen and not options.in_model_order:
        raise ValueError("--frozen needs --in-model-order; otherwise SRC records what was trained")
    if options.buffers and deepspeed:
        raise ValueError("--buffers doesn't work with DeepSpeed checkpoints, which record their buffers")
    names = {array.name for array in found.arrays}
    for pattern in options.buffers:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--buffers {pattern} matches no tensor of {len(names)} in {found.where}")
