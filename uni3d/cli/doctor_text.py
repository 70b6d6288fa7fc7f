"""What `uni3d doctor` prints: the verdict first, and no line longer than a terminal's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap
from typing import Any

from uni3d.cli.terminal import in_bytes, say

FEW = 3
"""Reasons that the verdict has in it."""
COLUMNS = 110
LABEL = 12
SHOWN = 12
"""Topologies that the table has, and degrees that a line of reasons has; JSON has all."""


def print_report(report: Mapping[str, Any]) -> None:
    for line in lines(report):
        say(line)


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    best, yes = report["recommended"], report["would_resume"]
    where = f"{report['checkpoint']} on {_count(report['world_size'], 'rank')}"
    if yes:
        yield from _wrapped(
            "YES", f"{where} as pp {best['pp']}, dp {best['dp']}, tp {best['tp']}, ZeRO {best['zero']}"
        )
    else:
        yield from _wrapped("NO", where)
        for reason in report["reasons"]:
            yield from _wrapped("", reason)
    if nearby := report["nearby_world_sizes"]:
        yield from _wrapped("", f"numbers of ranks nearby that would do: {', '.join(map(str, nearby))}")
    yield ""
    if yes:
        yield from _config(report)
    yield from _wrapped("checkpoint", _about(report))
    yield from _wrapped("files", _files(report["whole"]))
    if yes:
        yield from _memory(report)
        yield from _reads(best["reads"])
    for label, key in (("warning", "warnings"), ("note", "notes")):
        for text in report[key]:
            yield from _wrapped(label, text)
    yield from _as_it_is(report)
    if report["topologies"]:
        yield ""
        yield from _table(report)
    told = not report["topologies"] and len(report["refused"]) <= FEW  # in the verdict
    if report["refused"] and not told:
        yield ""
        yield f"Not on {_count(report['world_size'], 'rank')}:"
        for reason in report["refused"]:
            yield from _wrapped(f"  {reason['axis']} {_some(reason['degrees'])}", reason["why"], least=2)


def _config(report: Mapping[str, Any]) -> Iterator[str]:
    best = report["recommended"]
    pairs = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in best["config"].items()]
    yield from _wrapped("set", ", ".join(pairs))
    if "train_micro_batch_size_per_gpu" not in best["config"] and best["samples_per_rank"]:
        yield from _wrapped(
            "",
            f"and batches whose micro x accumulation is {best['samples_per_rank']} "
            "(--config gives those nearest to what they were)",
        )


def _about(report: Mapping[str, Any]) -> str:
    counts = [f"step {report['step']}"]
    if report["samples"] is not None:
        counts.append(f"{report['samples']:,} samples")
    if report["train_batch_size"] is not None:
        counts.append(f"global batch {report['train_batch_size']}")
    counts.append(f"{report['class'] or 'model'} of {in_bytes(report['bytes'])}")
    if report["imported_from"]:
        counts.append(f"imported from {report['imported_from']}")
    elif report["written_on"]:
        counts.append("from " + " ".join(f"{axis}{n}" for axis, n in report["written_on"].items()))
    if report["created"]:
        counts.append(str(report["created"])[:16].replace("T", " "))
    return ", ".join(counts)


def _files(whole: Mapping[str, Any]) -> str:
    if whole["problems"]:
        text = f"{len(whole['problems'])} of {whole['files']} are missing or of another size"
    else:
        text = f"all {whole['files']} are there with their sizes (uni3d verify reads them)"
    if whole.get("latest_problem"):
        text += f"; latest: {whole['latest_problem']}"
    elif whole["latest"] is not None:
        text += f"; latest is {whole['latest']}"
    if whole["leftovers"]:
        text += (
            f"; left by a save that crashed or still goes on: {', '.join(whole['leftovers'])} (uni3d clean)"
        )
    return text


def _memory(report: Mapping[str, Any]) -> Iterator[str]:
    need = report["recommended"]["memory"]
    names = {
        "parameters": "parameters",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "buffers": "buffers",
    }
    names["other"] = "activations and the rest"
    parts = ", ".join(f"{name} {in_bytes(need[key])}" for key, name in names.items() if need[key])
    text = f"{in_bytes(need['total'])} on the rank that needs most: {parts}"
    if need["host"]:
        text += f"; {in_bytes(need['host'])} of host memory"
    yield from _wrapped("memory", text)
    if not report["config_given"]:
        yield from _wrapped("", "as if computed in fp32, in several micro batches: --config says how it is")
    if not report["activations_counted"]:
        yield from _wrapped(
            "", f"ACTIVATIONS AREN'T COUNTED{_on_top(report['recommended']['zero'])}; --model counts them"
        )


def _on_top(zero: int) -> str:
    return ", nor the layers that ZeRO 3 gathers while they run" if zero == 3 else ""


def _reads(reads: Mapping[str, int]) -> Iterator[str]:
    text = f"{in_bytes(reads['most'])} of {_count(reads['most_files'], 'file')} by the rank that reads most, "
    text += f"{in_bytes(reads['total'])} by all; {_count(reads['files'], 'chunk file')} in the checkpoint"
    yield from _wrapped("reading", text)


def _as_it_is(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("config_as_it_is")
    if found is None:
        return
    if found["refused"]:
        yield from _wrapped(
            "note", f"the config as it is would be refused on so many ranks: {found['refused']}"
        )
        return
    d = found["starts_as"]
    yield from _wrapped(
        "note",
        f"the config as it is starts as pp {d['pp']}, dp {d['dp']}, tp {d['tp']} with a global batch of "
        f"{d['train_batch']}, micro batches of {d['micro_batch']}",
    )


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    """The topologies with the memory of each ZeRO stage."""
    rows, limit = report["topologies"], report["memory_limit"]
    stages = sorted({stage for row in rows for stage in row["memory_by_zero_stage"]})
    fits = (
        f"{report['fitting']} of them fit {in_bytes(limit)} a rank (* doesn't)"
        if limit
        else "preferred (fewest tp, then pp) first"
    )
    yield f"Topologies: {len(rows)}, {fits}. Memory of a rank by ZeRO stage{_without(report)}:"
    yield "    pp    dp    tp   micro x acc" + "".join(f"{f'ZeRO {stage}':>14}" for stage in stages)
    for row in rows[:SHOWN]:
        share = row["samples_per_rank"]  # 0 where no global batch is known
        batch = (f"{share} in all" if share else "-") if row["micro_batch"] is None else ""
        batch = batch or f"{row['micro_batch']} x {row['accumulation']}"
        needs = (row["memory_by_zero_stage"][stage]["total"] for stage in stages)
        cells = "".join(f"{in_bytes(n) + ('*' if limit and n > limit else ' '):>14}" for n in needs)
        yield f"{row['pp']:>6}{row['dp']:>6}{row['tp']:>6}{batch:>14}{cells}".rstrip()
    if len(rows) > SHOWN:
        yield f"    and {len(rows) - SHOWN} more (--json has all)"


def _without(report: Mapping[str, Any]) -> str:
    return "" if report["activations_counted"] else ", without activations"


def _some(degrees: Sequence[int]) -> str:
    shown = ", ".join(map(str, degrees[:SHOWN]))
    return shown + (", ..." if len(degrees) > SHOWN else "")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _wrapped(label: str, text: str, least: int = 1) -> Iterator[str]:
    """A label and a text beside it, in lines that fit."""
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
