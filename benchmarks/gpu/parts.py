"""The parts: each runs programs, and makes rows of what they wrote."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Row
from benchmarks.gpu.schedule import ROOT, Clock, Outcome, Part, PartFailedError, run
from benchmarks.gpu.search import TIME, Estimate, Try, estimate, largest, offload_model, search

MFU_BAR, SPEED_BAR, STALL_BAR = 0.55, 1.0, 1.1


def make_parts(args: argparse.Namespace, machine: dict[str, Any], folder: Path) -> list[Part]:
    """Return the parts that are asked for, in order of worth. `folder` is for their files."""
    first, *others = [
        Part(
            name=f"training, micro batch {size}",
            work=partial(training, args, folder, size),
            limit=180,
            least=60,
        )
        for size in args.micro_batches
    ]
    tests = Part(name="tests", work=partial(run_tests, args), limit=120, least=20)
    save = Part(name="stall", work=partial(stall, args, folder), limit=120, least=40)
    fit = Part(name="offload", work=partial(offload, args, machine, folder), limit=240, least=40)
    parts = [tests, first, save, *others, fit]
    return [part for part in parts if part.name.split(",")[0] in args.parts]


# --- tests ---------------------------------------------------------------------------------------------


def run_tests(args: argparse.Namespace, clock: Clock) -> list[Row]:
    """Run the tests marked `gpu`. On a CPU all skip themselves."""
    files = sorted(
        path for path in (ROOT / "tests").rglob("test_*.py") if "\n@pytest.mark.gpu" in path.read_text()
    )
    names = [str(path.relative_to(ROOT)) for path in files]
    done = run(["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *names], clock)
    kinds = {
        kind: int(n) for n, kind in re.findall(r"\b(\d+) (passed|failed|skipped|errors?)\b", done.output)
    }
    text = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    well = done.code == 0 and ("passed" in kinds or args.device == "cpu")
    row = Row(
        what=f"tests marked `gpu`, of {len(names)} files",
        measured=text or done.error,
        bar="all pass",
        met=well and "skipped" not in kinds,
        figures=kinds,
    )
    if not well:
        raise PartFailedError(done.error if done.code != 0 else "none of them ran", [row] if text else [])
    return [row]


# --- training ------------------------------------------------------------------------------------------


def training(args: argparse.Namespace, folder: Path, size: int, clock: Clock) -> list[Row]:
    """Measure the engine and the bare loop at one micro batch; at half of it if it doesn't fit, and so on."""
    rows: list[Row] = []
    while True:
        found = {}
        for which in ("engine", "bare"):
            done = _train(args, folder / f"{which}{size}.json", which, size, clock)
            if done.figures is None or not ({which, "out_of_memory"} & done.figures.keys()):
                rows += training_rows(args.config, size, found)
                raise PartFailedError(f"{which}: {done.error}", rows)
            found[which] = done.figures
        rows += training_rows(args.config, size, found)
        smaller = size // 2
        if "out_of_memory" not in found["engine"] or smaller < 1 or smaller in args.micro_batches:
            return rows
        size = smaller


def _train(args: argparse.Namespace, figures: Path, which: str, size: int, clock: Clock) -> Outcome:
    options = {
        "device": args.device,
        "config": args.config,
        "precision": args.precision,
        "micro-batch": size,
        "rounds": args.rounds,
        "only": which,
        "json": figures,
    }
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    return run(["benchmarks/train.py", *given, *["--compile"] * args.compile], clock, figures)


def training_rows(config: str, size: int, found: dict[str, dict[str, Any]]) -> list[Row]:
    """Return a row for each of the two that was measured."""
    rows = []
    for which, figures in found.items():
        name = {"engine": "engine", "bare": "bare loop"}[which]
        what = f"{config}, micro batch {size}: {name}"
        if "out_of_memory" in figures:
            rows.append(Row(what=what, measured="out of memory", figures=figures))
            continue
        arm = figures[which]
        row = Row(what=what, measured=_speed(arm), figures=figures)
        if which == "engine" and arm["mfu"] is not None:
            row = _barred(row, f"MFU >= {MFU_BAR:.0%}", arm["mfu"] >= MFU_BAR)
        if which == "bare" and "engine" in found.get("engine", {}):
            ratio = _median(arm) / _median(found["engine"]["engine"])
            row = _barred(
                row, f"engine >= {SPEED_BAR:.1f} x", ratio >= SPEED_BAR, f"engine {ratio:.3f} x as fast"
            )
        rows.append(row)
    return rows


def _barred(row: Row, bar: str, met: bool, beside: str = "") -> Row:
    return Row(what=row.what, measured=row.measured, beside=beside, bar=bar, met=met, figures=row.figures)


def _median(arm: dict[str, Any]) -> float:
    return statistics.median(arm["seconds"])


def _speed(arm: dict[str, Any]) -> str:
    mfu = "" if arm["mfu"] is None else f", MFU {arm['mfu']:.1%}"
    least, most = 1e3 * min(arm["seconds"]), 1e3 * max(arm["seconds"])
    return (
        f"{arm['tokens_per_second']:,.0f} tokens/s, {1e3 * _median(arm):.1f} ms a step "
        f"({least:.1f} to {most:.1f}){mfu}, peak {arm['peak'] / 2**30:.1f} GiB"
    )


# --- saves ---------------------------------------------------------------------------------------------


def stall(args: argparse.Namespace, folder: Path, clock: Clock) -> list[Row]:
    """Measure how long an asynchronous save holds training up, from the second save on."""
    figures = folder / "stall.json"
    given = ["--config", args.config, "--device", args.device, "--precision", args.precision]
    with tempfile.TemporaryDirectory(prefix="stall-", dir=args.folder) as saves:  # removed even if it's ended
        command = ["-m", "benchmarks.gpu.stall", str(figures), *given, "--folder", saves]
        done = run(command, clock, figures)
    found = done.figures
    rows = [stall_row(args.config, found)] if found is not None and found["stalls"] else []
    if not rows:
        raise PartFailedError(done.error)
    if done.code not in (0, None):  # with time over, fewer saves were measured
        raise PartFailedError(done.error, rows)
    return rows


def stall_row(config: str, found: dict[str, Any]) -> Row:
    stalls, copies = found["stalls"], found["copies"]
    ratio = statistics.median(ours / raw for ours, raw in zip(stalls, copies, strict=True))
    size = found["bytes"] / 2**30
    return Row(
        what=f"stall of an asynchronous save, {config}, {size:.1f} GiB",
        measured=f"{statistics.median(stalls):.3f} s ({len(stalls)} saves; the first {found['first']:.3f} s)",
        beside=f"a copy to pinned memory: {statistics.median(copies):.3f} s; ratio {ratio:.2f}",
        bar=f"at most {STALL_BAR} x",
        met=ratio <= STALL_BAR,
        figures=found,
    )


# --- offload -------------------------------------------------------------------------------------------


def offload(args: argparse.Namespace, machine: dict[str, Any], folder: Path, clock: Clock) -> list[Row]:
    """Search for the largest model that trains with offload, beside the largest that is estimated to fit."""
    document = json.loads((ROOT / "examples" / "megatron_gpt" / "configs" / args.config).read_text())

    def needs(layers: int) -> Estimate:
        options = offload_model(document["model"], args.hidden, layers)
        return estimate(options, document["seq_len"], precision=args.precision, device=args.device)

    def attempt(layers: int) -> Try:
        figures = folder / f"offload{layers}.json"
        given = {"config": args.config, "hidden": args.hidden, "layers": layers}
        given |= {"device": args.device, "precision": args.precision}
        words = [str(x) for name, value in given.items() for x in (f"--{name}", value)]
        done = run(["-m", "benchmarks.gpu.offload", str(figures), *words], clock, figures)
        return tried(layers, done)

    memory = float(machine["memory"])
    estimated = largest(needs, args.max_layers, device=machine["gpu_memory"] or memory, host=memory)
    try:
        tries = search(attempt, estimated, args.max_layers, lambda: clock.left)
    except RuntimeError as error:
        raise PartFailedError(str(error)) from None
    row = offload_row(args.hidden, tries, estimated, needs)
    if not any(each.fits for each in tries):
        raise PartFailedError("no model that was tried fits", [row])
    return [row]


def tried(layers: int, done: Outcome) -> Try:
    """Return what became of a try.

    Raises:
        RuntimeError: it ended by an error that isn't for want of memory or time.
    """
    found = done.figures
    if found is None and done.code == -9:  # the kernel's doing
        found = {"fits": False, "limit": "host memory"}
    if found is None and done.code is None:
        found = {"fits": False, "limit": TIME}
    if found is None:
        raise RuntimeError(f"{layers} layers: {done.error}")
    limit = found.get("limit", "")
    return Try(layers=layers, fits=found["fits"], limit=limit, seconds=done.seconds, figures=found)


def offload_row(hidden: int, tries: list[Try], estimated: int, needs: Callable[[int], Estimate]) -> Row:
    fitting = [each for each in tries if each.fits]
    failing = [each for each in tries if not each.fits]
    text = "none of those tried"
    if fitting:
        best = max(fitting, key=lambda each: each.layers)
        peak = best.figures["peak"]
        text = f"{needs(best.layers).parameters / 1e9:.2f}B ({best.layers} layers)"
        text += f", {best.figures['seconds'][-1]:.1f} s a step"
        text += "" if peak is None else f", GPU {peak / 2**30:.1f} GiB"
        text += f", host {best.figures['host'] / 2**30:.1f} GiB"
    if failing:
        smallest = min(failing, key=lambda each: each.layers)
        text += f"; {smallest.layers} layers don't fit: {smallest.limit}"
    elif estimated > max(each.layers for each in tries):
        text += "; for want of time none larger was tried"
    wanted = needs(max(1, estimated))
    size = f"{wanted.parameters / 1e9:.2f}B ({estimated} layers)"
    memory = f"GPU {wanted.device / 2**30:.1f} GiB, host {wanted.host / 2**30:.1f} GiB"
    return Row(
        what=f"largest model with offload, hidden size {hidden}",
        measured=text,
        beside=f"estimate: {size}, {memory}",
        figures={
            "estimated_layers": estimated,
            "estimate": vars(wanted),
            "tries": [vars(each) for each in tries],
        },
    )
