"""Export the weights as one fp32 safetensors file: the work alone, its memory, and the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.checkpoint import dcp, peers, save, subject
from benchmarks.checkpoint.bench import Bench, one_folder
from benchmarks.checkpoint.ranks import Pool
from benchmarks.checkpoint.table import Bar, Row, Sample
from benchmarks.checkpoint.workspace import settle_disk

WORK = [sys.executable, "-m", "benchmarks.checkpoint.export_once"]
COMMAND = [sys.executable, "-c", "from uni3d.cli import main; main()", "export"]
DCP = [sys.executable, "-m", "benchmarks.checkpoint.dcp_once"]


def figures(bench: Bench) -> list[Row]:
    """Measure in new processes, with a warm page cache; nothing is fsynced but our file, where it is said."""
    with Pool(2) as pool, pool.group(2) as ranks:
        ranks.call(subject.make_engine, save.PLACE, bench.options, step=True)
        run = one_folder(bench.workspace, ranks, "source", subject.save, durable=False)
    with Pool(2) as pool, pool.group(2) as ranks:
        ranks.call(dcp.prepare, bench.options)
        torchs = one_folder(bench.workspace, ranks, "dcp-source", dcp.save_weights)
    found: dict[str, list[float]] = {}
    theirs = bench.workspace.fresh("deepspeed")
    if bench.deepspeed:
        bench.deepspeed.step("save", theirs, save.PLACE.world)
    for turn in range(bench.repeats + 1):
        measured = _measure(bench, run, torchs, theirs)
        if turn:  # the first one read the files into the cache
            for name, value in measured.items():
                found.setdefault(name, []).append(value)
    return _rows(bench, found)


def _measure(bench: Bench, run: Path, torchs: Path, theirs: Path) -> dict[str, float]:
    said, _ = _export(bench, run, WORK)
    measured: dict[str, float] = json.loads(said)
    said, _ = _export(bench, run, WORK, "unsynced")
    measured["unsynced"] = json.loads(said)["seconds"]
    _, measured["command"] = _export(bench, run, COMMAND)
    said, measured["dcp: command"] = _export(bench, torchs, DCP)
    measured["dcp: seconds"] = json.loads(said)["seconds"]
    if bench.deepspeed:
        work = bench.deepspeed.step("export", theirs)
        measured |= {f"theirs: {name}": x for name, x in work.items()}
        measured["theirs: command"] = bench.deepspeed.zero_to_fp32(theirs)
        for output in theirs.glob("fp32-*"):
            settle_disk(output)
    return measured


def _export(bench: Bench, source: Path, program: list[str], *options: str) -> tuple[str, float]:
    """Run `program source file options`; return its output and its seconds."""
    folder = bench.workspace.fresh("export")
    folder.mkdir()
    settle_disk()
    start = time.perf_counter()
    command = [*program, str(source), str(folder / "fp32.safetensors"), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    settle_disk(folder)
    return done.stdout, seconds


def _rows(bench: Bench, found: dict[str, list[float]]) -> list[Row]:
    figure = f"fp32 export to safetensors, {found['size'][0] / 2**30:.2f} GiB"
    zero_to_fp32 = peers.named(bench.deepspeed, "zero_to_fp32")
    to_torch = "torch, dcp_to_torch_save of the weights alone"
    bar = Bar("times_as_fast", 8.0)
    parts = {
        "fsynced, without start-up": ("seconds", "seconds"),
        "not synced, without start-up": ("unsynced", "seconds"),
        "fsynced, the whole command": ("command", "command"),
    }
    rows = [
        Row(
            figure=f"{figure}, {part}",
            ours=Sample(tuple(found[ours])),
            yardstick=yardstick,
            theirs=peers.sample(found.get(f"{whose}: {their}")),
            bar=bar,
        )
        for part, (ours, their) in parts.items()
        for whose, yardstick in {"theirs": zero_to_fp32, "dcp": to_torch}.items()
    ]
    memory = Row(
        figure="memory of an export over the interpreter's own",
        ours=Sample(tuple(found["mib"]), "MiB"),
        yardstick=zero_to_fp32,
        theirs=peers.sample(found.get("theirs: mib"), "MiB"),
        bar=Bar("at_most", 256),
    )
    return [*rows, memory]
