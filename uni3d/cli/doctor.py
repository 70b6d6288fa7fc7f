"""`uni3d doctor`: check whether a checkpoint would resume on a number of ranks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from uni3d.cli.terminal import AnyRun, AsJson, CommandError, From, Tag, answer, plural
from uni3d.units import BYTES, format_bytes, parse

if TYPE_CHECKING:
    from ckpt import CheckpointError
    from uni3d.doctor.topologies import Asked

FEW = 3
"""Number of reasons up to which the verdict already contains all of them."""
COLUMNS = 110
LABEL = 12
SHOWN = 12
"""Maximum of topologies in the table, and of degrees in one line; JSON has all."""

Degree = Annotated[int | None, Option(min=1, help="Only topologies with this degree.", show_default="any")]


def doctor(
    run: AnyRun,
    world_size: Annotated[
        int | None,
        Option(min=1, help="Number of ranks to resume on.", show_default="as many as wrote it"),
    ] = None,
    tag: Tag = None,
    config: Annotated[
        Path | None, Option(help="JSON config of the run, to check its batch sizes, precision and optimizer.")
    ] = None,
    pp: Degree = None,
    dp: Degree = None,
    tp: Degree = None,
    zero: Annotated[
        int | None,
        Option(min=0, max=3, help="Only this ZeRO stage.", show_default="the config's, else the run's"),
    ] = None,
    memory: Annotated[
        str | None,
        Option(help="Only topologies that fit this much memory per rank, e.g. 80GB.", show_default="any"),
    ] = None,
    model: Annotated[
        Path | None,
        Option(help="JSON file as in examples/megatron_gpt/configs, to include activation memory."),
    ] = None,
    kind: From = "auto",
    as_json: AsJson = False,
) -> None:
    """Check whether a checkpoint would resume on a number of ranks, and recommend a topology.

    Starts no ranks and reads no tensor data. For another framework's checkpoint, it says what a load in place
    restores, and what isn't there. Of the topologies that fit in --memory, the recommended one has
    the fewest tensor-parallel ranks, then the fewest pipeline stages, then the run's current ZeRO stage.
    Exits with 0 if the checkpoint would resume as asked, 1 if it wouldn't, and 2 if the checkpoint can't be
    read or an option is invalid.
    """
    from ckpt import CheckpointError
    from uni3d.doctor import examine

    try:
        asked = _asked(world_size or 0, {"pp": pp, "dp": dp, "tp": tp}, zero, memory)
        report = examine(run, tag, asked, config, model, kind)
    except (CheckpointError, OSError, ValueError) as error:
        others = _other_checkpoints(run, error) if isinstance(error, CheckpointError) else ""
        raise CommandError(f"{error}{others}", exit_code=2) from None
    answer(report, _lines(report), as_json)
    if not report["would_resume"]:
        raise Exit(1)


def _other_checkpoints(run: str, error: CheckpointError) -> str:
    """Return the tags and unfinished saves of a run whose checkpoint can't be opened, as a hint."""
    import ckpt

    found = ""
    with contextlib.suppress(ckpt.CheckpointError, OSError):
        store = ckpt.open_store(run)
        tags, names = ckpt.committed_tags(store), store.leftovers()
        if not all(tag in str(error) for tag in tags):
            found += f" (committed tags: {', '.join(tags)})"
        if names:
            found += f" (not committed, so they can't be loaded: {', '.join(names)})"
    return found


def _asked(world: int, degrees: dict[str, int | None], zero: int | None, memory: str | None) -> Asked:
    from uni3d.doctor.topologies import Asked

    limit = None if memory is None else parse(memory, BYTES, "--memory", "80GiB or 80GB")
    return Asked(world=world, **degrees, zero=zero, memory=limit)


# --- report --------------------------------------------------------------------------------------------


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the report, the verdict first, in lines of at most `COLUMNS` characters."""
    best, yes = report["recommended"], report["would_resume"]
    ranks = plural(report["world_size"], "rank")
    where = f"{report['checkpoint']} on {ranks}"
    if yes:
        yield from _wrapped(
            "YES", f"{where} as pp {best['pp']}, dp {best['dp']}, tp {best['tp']}, ZeRO {best['zero']}"
        )
    else:
        yield from _wrapped("NO", where)
        for reason in report["reasons"]:
            yield from _wrapped("", reason)
    if nearby := report["nearby_world_sizes"]:
        yield from _wrapped("", f"nearby numbers of ranks that work: {', '.join(map(str, nearby))}")
    yield ""
    if yes:
        yield from _config(report)
    yield from _wrapped("checkpoint", _about(report))
    if report["in_place"] is None:
        yield from _wrapped("files", _files(report["whole"]))
    else:
        yield from _restored(report["in_place"])
    if yes:
        yield from _memory(report)
        yield from _reads(best["reads"])
    for label, key in (("warning", "warnings"), ("note", "notes")):
        for text in report[key]:
            yield from _wrapped(label, text)
    yield from _unchanged_config(report)
    if report["topologies"]:
        yield ""
        yield from _table(report)
    in_verdict = not report["topologies"] and len(report["refused"]) <= FEW
    if report["refused"] and not in_verdict:
        yield ""
        yield f"Not possible on {ranks}:"
        for reason in report["refused"]:
            yield from _wrapped(f"  {reason['axis']} {_some(reason['degrees'])}", reason["why"], least=2)


def _restored(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a load of another framework's checkpoint restores, and what isn't there."""
    for i, (name, what) in enumerate(found["restored"].items()):
        yield from _wrapped("restores" if not i else "", f"{name}: {what}")
    for i, (name, why) in enumerate(found["lacks"].items()):
        yield from _wrapped("lacks" if not i else "", f"{name}: {why}" if why else name)
    for line in found["not_read"]:
        yield from _wrapped("left out", line)
    yield from _wrapped("goes on", f"on {', '.join(map(str, found['ranks']))} ranks, of those tried")


def _config(report: Mapping[str, Any]) -> Iterator[str]:
    best = report["recommended"]
    pairs = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in best["config"].items()]
    yield from _wrapped("set", ", ".join(pairs))
    if "train_micro_batch_size_per_gpu" not in best["config"] and best["samples_per_rank"]:
        yield from _wrapped(
            "",
            f"with micro batch x accumulation = {best['samples_per_rank']} "
            "(give --config to keep them close to the current ones)",
        )


def _about(report: Mapping[str, Any]) -> str:
    counts = [f"step {report['step']}"]
    if report["samples"] is not None:
        counts.append(f"{report['samples']:,} samples")
    if report["train_batch_size"] is not None:
        counts.append(f"global batch {report['train_batch_size']}")
    counts.append(f"{report['class'] or 'model'}, {format_bytes(report['bytes'])}")
    if report["in_place"]:
        counts.append(f"of {report['imported_from']}, in place")
    elif report["imported_from"]:
        counts.append(f"imported from {report['imported_from']}")
    elif report["written_on"]:
        counts.append("written on " + " ".join(f"{axis}{n}" for axis, n in report["written_on"].items()))
    if report["created"]:
        counts.append(str(report["created"])[:16].replace("T", " "))
    return ", ".join(counts)


def _files(whole: Mapping[str, Any]) -> str:
    if whole["problems"]:
        text = f"{len(whole['problems'])} of {whole['files']} are missing or have the wrong size"
    else:
        text = f"all {whole['files']} are present, with the right sizes (uni3d verify checks their contents)"
    if whole.get("latest_problem"):
        text += f"; latest: {whole['latest_problem']}"
    elif whole["latest"] is not None:
        text += f"; latest is {whole['latest']}"
    if whole["leftovers"]:
        text += f"; left by an interrupted or running save: {', '.join(whole['leftovers'])} (see uni3d clean)"
    return text


def _memory(report: Mapping[str, Any]) -> Iterator[str]:
    need = report["recommended"]["memory"]
    names = {key: key for key in ("parameters", "gradients", "optimizer", "buffers")}
    names["other"] = "activations and the rest"
    parts = ", ".join(f"{name} {format_bytes(need[key])}" for key, name in names.items() if need[key])
    text = f"{format_bytes(need['total'])} on the rank that needs most: {parts}"
    if need["host"]:
        text += f"; {format_bytes(need['host'])} of host memory"
    yield from _wrapped("memory", text)
    if not report["config_given"]:
        yield from _wrapped("", "assuming fp32 and gradient accumulation; give --config for the real ones")
    if not report["activations_counted"]:
        gathered = ", nor layers gathered by ZeRO 3" if report["recommended"]["zero"] == 3 else ""
        yield from _wrapped("", f"ACTIVATIONS ARE NOT INCLUDED{gathered}; give --model to include them")


def _reads(reads: Mapping[str, int]) -> Iterator[str]:
    text = f"{format_bytes(reads['most'])} in {plural(reads['most_chunks'], 'chunk')} by the busiest rank, "
    text += f"{format_bytes(reads['total'])} by all ranks; {plural(reads['chunks'], 'chunk')} in all"
    yield from _wrapped("reading", text)


def _unchanged_config(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("config_as_it_is")
    if found is None:
        return
    if found["refused"]:
        text = f"the config, unchanged, would be refused on this many ranks: {found['refused']}"
    else:
        d = found["starts_as"]
        text = (
            f"the config, unchanged, gives pp {d['pp']}, dp {d['dp']}, tp {d['tp']}, global batch "
            f"{d['train_batch']}, micro batch {d['micro_batch']}"
        )
    yield from _wrapped("note", text)


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of the topologies, with the memory that each ZeRO stage needs."""
    rows, limit = report["topologies"], report["memory_limit"]
    stages = sorted({stage for row in rows for stage in row["memory_by_zero_stage"]})
    order = (
        f"{report['fitting']} fit in {format_bytes(limit)} per rank (* doesn't fit)"
        if limit
        else "fewest tp first, then fewest pp"
    )
    without = "" if report["activations_counted"] else ", without activations"
    yield f"{plural(len(rows), 'topology', 'topologies')}, {order}. Memory per rank by ZeRO stage{without}:"
    yield "    pp    dp    tp   micro x acc" + "".join(f"{f'ZeRO {stage}':>14}" for stage in stages)
    for row in rows[:SHOWN]:
        share = row["samples_per_rank"]  # 0 if the global batch isn't known
        batch = (f"{share} in all" if share else "-") if row["micro_batch"] is None else ""
        batch = batch or f"{row['micro_batch']} x {row['accumulation']}"
        needs = (row["memory_by_zero_stage"][stage]["total"] for stage in stages)
        cells = "".join(f"{format_bytes(n) + ('*' if limit and n > limit else ' '):>14}" for n in needs)
        yield f"{row['pp']:>6}{row['dp']:>6}{row['tp']:>6}{batch:>14}{cells}".rstrip()
    if len(rows) > SHOWN:
        yield f"    and {len(rows) - SHOWN} more (see --json)"


def _some(degrees: Sequence[int]) -> str:
    shown = ", ".join(map(str, degrees[:SHOWN]))
    return shown + (", ..." if len(degrees) > SHOWN else "")


def _wrapped(label: str, text: str, least: int = 1) -> Iterator[str]:
    """Yield `text` wrapped beside a label, with at least `least` spaces between the two."""
    indent = " " * LABEL
    head = f"{label:<{LABEL}}" if len(label) + least <= LABEL else label + " " * least
    first, *rest = wrap(
        " ".join(text.split()),
        COLUMNS,
        initial_indent=head,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    ) or [head]
    yield first.rstrip()
    yield from rest
