"""Export the weights as one fp32 safetensors file: the work alone, its memory, and the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.checkpoint import peers, save, subject
from benchmarks.checkpoint.bench import Bench, one_folder
from benchmarks.checkpoint.ranks import Pool
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

WORK = [sys.executable, "-m", "benchmarks.checkpoint.export_once"]
COMMAND = [sys.executable, "-c", "from uni3d.cli import main; main()", "export"]


def figures(bench: Bench) -> list[Row]:
    """Measure in new processes, with a warm page cache; only our file is fsynced."""
    with Pool(2) as pool, pool.group(2) as ranks:
        ranks.call(subject.make_engine, save.PLACE, bench.options, step=True)
        run = one_folder(bench.workspace, ranks, "source", subject.save, durable=False)
    found: dict[str, list[float]] = {}
    theirs = bench.workspace.fresh("deepspeed")
    if bench.deepspeed:
        bench.deepspeed.step("save", theirs, save.PLACE.world)
    for turn in range(bench.repeats + 1):
        measured = _measure(bench, run, theirs)
        if turn:  # the first one read the files into the cache
            for name, value in measured.items():
                found.setdefault(name, []).append(value)
    return _rows(bench, found)


def _measure(bench: Bench, run: Path, theirs: Path) -> dict[str, float]:
    said, _ = _export(bench, run, WORK)
    measured: dict[str, float] = json.loads(said)
    _, measured["command"] = _export(bench, run, COMMAND)
    if bench.deepspeed:
        work = bench.deepspeed.step("export", theirs)
        measured |= {f"theirs: {name}": x for name, x in work.items()}
        measured["theirs: command"] = bench.deepspeed.zero_to_fp32(theirs)
        for output in theirs.glob("fp32-*"):
            settle_disk(output)
    return measured


def _export(bench: Bench, run: Path, program: list[str]) -> tuple[str, float]:
    """Run `program run file`; return its output and its seconds."""
    folder = bench.workspace.fresh("export")
    folder.mkdir()
    settle_disk()
    start = time.perf_counter()
    command = [*program, str(run), str(folder / "fp32.safetensors")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    settle_disk(folder)
    return done.stdout, seconds


def _rows(bench: Bench, found: dict[str, list[float]]) -> list[Row]:
    figure = f"fp32 export to safetensors, {found['size'][0] / 2**30:.2f} GiB, fsynced"
    yardstick, bar = peers.named(bench.deepspeed, "zero_to_fp32, no fsync"), Bar("times_as_fast", 8.0)
    return [
        Row(
            figure=f"{figure}, without start-up",
            ours=Sample(tuple(found["seconds"])),
            yardstick=yardstick,
            theirs=peers.sample(found.get("theirs: seconds")),
            bar=bar,
        ),
        Row(
            figure=f"{figure}, the whole command",
            ours=Sample(tuple(found["command"])),
            yardstick=yardstick,
            theirs=peers.sample(found.get("theirs: command")),
            bar=bar,
        ),
        Row(
            figure="memory of an export over the interpreter's own",
            ours=Sample(tuple(found["mib"]), "MiB"),
            yardstick=yardstick,
            theirs=peers.sample(found.get("theirs: mib"), "MiB"),
            bar=Bar("at_most", 256),
        ),
    ]
