"""`uni3d bench`: train a GPT of a config's shape for some steps, and measure it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from uni3d.cli.terminal import AsJson, say, say_json, say_table
from uni3d.units import format_bytes

if TYPE_CHECKING:
    from uni3d.bench.request import Request

THEIRS = "the config's"


def bench(
    config: Annotated[
        Path, Argument(help="JSON with model, seq_len and uni3d, as in examples/megatron_gpt/configs.")
    ],
    nproc: Annotated[int, Option(help="Ranks to start on this machine.")] = 1,
    steps: Annotated[int, Option(help="Steps that are timed.")] = 10,
    warmup: Annotated[int, Option(help="Steps before them.")] = 3,
    pp: Annotated[int | None, Option(min=1, help="Pipeline stages.", show_default=THEIRS)] = None,
    dp: Annotated[int | None, Option(min=1, help="Data-parallel ranks.", show_default=THEIRS)] = None,
    tp: Annotated[int | None, Option(min=1, help="Tensor-parallel ranks.", show_default=THEIRS)] = None,
    zero: Annotated[int | None, Option(min=0, max=3, help="ZeRO stage.", show_default=THEIRS)] = None,
    micro_batch: Annotated[
        int | None, Option(min=1, help="Samples per micro batch and rank.", show_default=THEIRS)
    ] = None,
    accumulation: Annotated[
        int | None, Option(min=1, help="Micro batches per step and rank.", show_default=THEIRS)
    ] = None,
    peak_tflops: Annotated[
        float | None,
        Option(help="Peak of one device, for the MFU.", show_default="the config's, or of a known GPU"),
    ] = None,
    trace: Annotated[
        Path | None,
        Option(
            help="Write a Chrome trace of two steps of rank 0 here; others beside it.", show_default=False
        ),
    ] = None,
    schedule: Annotated[
        Path | None,
        Option(help="Draw what each rank runs when in a step, as a PNG file.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a training on this machine: tokens/s, MFU, memory and time by phase.

    Starts --nproc ranks that train a GPT of the config's shape on random tokens: the model is uni3d's own,
    the rest of the config is used as it is. Nothing is saved. Options take precedence over the config; with
    both batch sizes given, the global batch follows from them.
    """
    from uni3d.bench.request import read_request

    _check_free(trace, schedule)
    given = {
        "pp": pp,
        "dp": dp,
        "tp": tp,
        "zero": zero,
        "micro_batch": micro_batch,
        "accumulation": accumulation,
    }
    request = read_request(
        config,
        nproc,
        given=given,
        steps=steps,
        warmup=warmup,
        peak_tflops=peak_tflops,
        trace=trace,
        schedule=schedule is not None,
    )
    row = _measured(request, schedule)
    say_json(row) if as_json else _say(row)


def _measured(request: Request, schedule: Path | None) -> dict[str, Any]:
    """Start the ranks and return their figures; draw the schedule."""
    from uni3d.bench.local_ranks import run_ranks
    from uni3d.bench.measure import measure
    from uni3d.bench.report import row_of

    ranks = run_ranks(measure, request.job.ranks.total, request)
    if schedule is not None:
        from uni3d.plot.schedule import draw_schedules

        draw_schedules({"": [rank["passes"] for rank in ranks]}, schedule)
    return row_of(request, ranks)


def _check_free(trace: Path | None, schedule: Path | None) -> None:
    """Check that the files can be written, before minutes of work.

    Raises:
        ValueError: matplotlib is missing, or the picture's name isn't one of a PNG file.
        OSError: a file exists, or its folder doesn't.
    """
    if schedule is not None:
        from uni3d.plot.figure import check_matplotlib, check_output

        check_matplotlib()
        check_output(schedule, force=False)
    if trace is not None:
        if trace.exists():
            raise FileExistsError(f"{trace} exists; give another name")
        if not trace.parent.is_dir():
            raise FileNotFoundError(f"{trace}: no such folder: {trace.parent}")


# --- report --------------------------------------------------------------------------------------------


def _say(row: Mapping[str, Any]) -> None:
    for label, text in _lines(row):
        say(f"{label:<10} {text}")
    say("")
    say_table(_memory(row["memory"]))
    say("")
    say_table(_times(row))


def _lines(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ranks, seconds = row["ranks"], row["step_seconds"]
    axes = ", ".join(f"{axis} {ranks[axis]}" for axis in ("pp", "dp", "tp"))
    yield "model", f"{row['model']}; {row['parameters']:,} parameters"
    yield "ranks", f"{ranks['total']}: {axes}, ZeRO {ranks['zero']}; {row['device']}, torch {row['torch']}"
    yield (
        "step",
        f"{row['tokens_per_step']:,} tokens: {row['accumulation']} micro batches of {row['micro_batch']} x "
        f"{row['sequence_length']:,} on each of {ranks['dp']} data-parallel ranks; {row['precision']}, "
        f"recompute {row['recompute']}",
    )
    spread = " to ".join(f"{1e3 * seconds[key]:,.1f}" for key in ("least", "most"))
    yield (
        "time",
        f"{1e3 * seconds['median']:,.1f} ms a step, median of {row['steps']} ({spread}), after "
        f"{row['warmup']} to warm up",
    )
    yield "speed", f"{row['tokens_per_second']:,.0f} tokens/s"
    mfu = (
        "unknown, as the device's peak is; give --peak-tflops" if row["mfu"] is None else f"{row['mfu']:.1%}"
    )
    yield "MFU", f"{mfu} ({row['flops_per_step']:.3g} model FLOPs a step)"
    for path in row["traces"]:
        yield "trace", path


def _memory(ranks: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Return a line for each rank; `process` and `reserved` are its memory with all else that it has."""
    names = {"peak": "peak", "planned": "planned", "process": "whole process", "reserved": "reserved"}
    return [
        {"rank": rank["rank"], "stage": rank["stage"]}
        | {name: format_bytes(rank[key]) for key, name in names.items() if key in rank}
        for rank in ranks
    ]


def _times(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a line for each phase and kind of collective, with a column for each pipeline stage."""
    firsts: dict[int, int] = {}
    for i, rank in enumerate(row["phases"]):
        firsts.setdefault(rank["stage"], i)
    lines = []
    for table, label in (("phases", "{}"), ("collectives", "in these: {}")):
        chosen = {stage: row[table][i] for stage, i in firsts.items()}
        for name in dict.fromkeys(k for rank in chosen.values() for k in rank if k not in ("rank", "stage")):
            cells = {
                "ms a step" if len(firsts) == 1 else f"ms, stage {stage}": 1e3 * rank.get(name, 0.0)
                for stage, rank in chosen.items()
            }
            lines.append({"phase": label.format(name.replace("_", " "))} | cells)
    return lines
