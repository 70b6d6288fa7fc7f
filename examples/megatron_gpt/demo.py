"""Train, resize twice, compare, export and generate, from start to end.

    python examples/megatron_gpt/demo.py --out demo-run

Every phase is a command, printed before it runs. A run trains on 4 processes, then its cluster shrinks to 2
and grows to 3. The same run on 1 process is never interrupted. The demo fails if their losses differ at any
step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from launch import DemoError, Row, Watch, launch
from rich.console import Console
from rich.table import Table


def near(path: Path) -> Path:
    """Return a path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


HERE = near(Path(__file__).parent)
CONFIG = HERE / "configs" / "tiny.json"
BIN = near(Path(sys.executable).parent)
"""Folder of torchrun and uni3d, which may not be on PATH."""

LIMIT = 1e-4
"""Largest relative difference allowed between the losses of the two runs at any step."""
FALL = 0.75
"""The mean of the last ten losses must be below this fraction of the first."""
PROMPT = "At noon the "
MARKER = ".uni3d-demo"
MADE = ("tiny", "tiny-uninterrupted", "logs", "model.safetensors", "loss.png", MARKER)
"""Everything that the demo writes into its folder, and that `--force` deletes."""

console = Console(highlight=False)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Training on one topology, up to and including step `until`."""

    title: str
    run: Path
    pp: int
    dp: int
    tp: int
    zero: int
    start: int
    until: int

    @property
    def processes(self) -> int:
        return self.pp * self.dp * self.tp

    def __str__(self) -> str:
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        degrees = f"(pp, dp, tp) = ({self.pp}, {self.dp}, {self.tp})"
        return f"{self.title}: {count}, {degrees}, ZeRO stage {self.zero}"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    def command(self, save_every: int) -> list[str]:
        start = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(self.processes)]
        flags = {"config": CONFIG, "pp": self.pp, "dp": self.dp, "tp": self.tp, "zero": self.zero}
        flags |= {"steps": self.until, "run": self.run, "save-every": save_every}
        flags |= {"data": "builtin", "seed": 0, "metrics": self.metrics}
        pairs = ([f"--{name}", str(value)] for name, value in flags.items())
        # Without the "--", torchrun takes --run for a short form of its own --run-path
        # (https://github.com/pytorch/pytorch/issues/120601).
        return [*start, "--", str(HERE / "train.py"), *itertools.chain.from_iterable(pairs)]


def plan(out: Path, steps: int) -> list[Phase]:
    half, three_quarters = steps // 2, steps * 3 // 4
    run, whole = out / "tiny", out / "tiny-uninterrupted"
    return [
        Phase(title="train", run=run, pp=2, dp=2, tp=1, zero=1, start=0, until=half),
        Phase(title="shrink", run=run, pp=1, dp=1, tp=2, zero=3, start=half, until=three_quarters),
        Phase(title="grow", run=run, pp=1, dp=3, tp=1, zero=2, start=three_quarters, until=steps),
        Phase(title="uninterrupted", run=whole, pp=1, dp=1, tp=1, zero=0, start=0, until=steps),
    ]


def read_metrics(path: Path, steps: int) -> list[Row]:
    """Read the rows of steps 1 to `steps`, and check that each is there once, in order."""
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for expected, row in enumerate(rows, start=1):
        if row["step"] != expected:
            raise DemoError(f"{path}: expected step {expected} on line {expected}, found step {row['step']}")
    if len(rows) != steps:
        raise DemoError(f"{path}: expected steps 1 to {steps}, found {len(rows)} steps")
    return rows


def check(resized: list[Row], differences: list[float]) -> None:
    """Print how the losses compare; raise DemoError if they differ or didn't fall."""
    largest = max(differences)
    step = differences.index(largest) + 1
    console.print(f"largest relative difference of the loss: {largest:.1e}, at step {step}")
    if not largest < LIMIT:
        raise DemoError(f"the losses differ by {largest:.1e} at step {step}; expected less than {LIMIT:.0e}")
    first, last = resized[0]["loss"], sum(row["loss"] for row in resized[-10:]) / 10
    if not last < FALL * first:
        raise DemoError(
            f"the loss fell from {first:.3f} to {last:.3f}; expected less than {FALL} of the first"
        )


def relative_differences(found: list[Row], expected: list[Row]) -> list[float]:
    """Return the differences by step, infinite where a loss isn't finite: comparisons with NaN are false."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(found, expected, strict=True)]
    return [abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) else math.inf for a, b in pairs]


def train(phases: list[Phase], steps: int, logs: Path) -> list[float]:
    """Run the phases in turn, and return the seconds of each."""
    seconds = []
    for number, phase in enumerate(phases, start=1):
        console.print(f"\n{number}. {phase}, to step {phase.until}", style="bold")
        # CPUs only, since a machine may have one GPU for four processes. One thread each: the model is too
        # small for more to help, and threads that wait for each other on a busy machine are slow.
        settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        watch = Watch(title=phase.title, metrics=phase.metrics, start=phase.start, until=phase.until)
        log = logs / f"{number}-{phase.title}.log"
        took = launch(console, phase.command(max(1, steps // 4)), log, settings=settings, watch=watch)
        console.print(f"done in {took:.1f} s")
        seconds.append(took)
    return seconds


def summary(phases: list[Phase], rows: list[list[Row]], seconds: list[float]) -> Table:
    columns = ("phase", "ranks", "pp, dp, tp", "ZeRO", "steps", "seconds", "first loss", "last loss")
    table = Table(*columns, box=None, pad_edge=False)  # narrow enough for 80 columns
    for phase, own, took in zip(phases, rows, seconds, strict=True):
        losses = (f"{row['loss']:.3f}" for row in (own[phase.start], own[phase.until - 1]))
        degrees, steps = f"{phase.pp}, {phase.dp}, {phase.tp}", f"{phase.start + 1}-{phase.until}"
        cells = (phase.title, phase.processes, degrees, phase.zero, steps, f"{took:.1f}", *losses)
        table.add_row(*map(str, cells))
    return table


def prepare(out: Path, force: bool) -> None:
    """Make an empty folder. Deletes only what an earlier demo wrote, and only with `force`."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / MARKER).is_file():
            raise DemoError(f"--out {out}: the folder isn't empty and isn't the demo's; give another")
        if not force:
            raise DemoError(
                f"--out {out}: holds an earlier demo; give another folder, or --force to replace it"
            )
        for name in MADE:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    (out / "logs").mkdir(parents=True)
    (out / MARKER).touch()
    for name in ("tiny", "tiny-uninterrupted"):
        (out / name).mkdir()


def demo(out: Path, steps: int, force: bool) -> None:
    if steps < 40:
        raise DemoError(f"--steps {steps}: expected at least 40, so that the loss can fall")
    prepare(out, force)
    phases, logs, weights = plan(out, steps), out / "logs", out / "model.safetensors"
    seconds = train(phases, steps, logs)

    console.print("\n5. compare", style="bold")
    resized, whole = (read_metrics(phase.metrics, steps) for phase in phases[-2:])
    differences = relative_differences(resized, whole)
    command = [str(BIN / "uni3d"), "plot", str(phases[0].run), str(out / "loss.png")]
    command += ["--compare", str(phases[-1].run)]
    launch(console, command, logs / "5-plot.log")  # before the check, so that a failure has a picture too
    check(resized, differences)

    console.print("\n6. export the weights, and generate with plain PyTorch", style="bold")
    launch(console, [str(BIN / "uni3d"), "export", str(phases[0].run), str(weights)], logs / "6-export.log")
    command = [str(BIN / "python"), str(HERE / "generate.py"), "--config", str(CONFIG)]
    command += ["--weights", str(weights), "--prompt", PROMPT, "--tokens", "400"]
    command += ["--temperature", "0.3", "--seed", "0"]
    launch(console, command, logs / "6-generate.log")
    lines = (logs / "6-generate.log").read_text(errors="replace").splitlines()
    whole_lines = lines[:-1] or lines  # the last sentence is cut short
    console.print("\n".join(whole_lines), style="green", markup=False)

    console.print(summary(phases, [resized, resized, resized, whole], seconds))
    console.print(f"largest relative difference of the loss: {max(differences):.1e} (allowed: {LIMIT:.0e})")
    console.print(f"picture: {out / 'loss.png'}\nweights: {weights}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, resize, compare, export and generate.")
    parser.add_argument("--out", type=Path, default=Path("demo-run"), help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an earlier demo in that folder")
    args = parser.parse_args()
    try:
        demo(args.out, args.steps, args.force)
    except DemoError as error:
        console.print(f"demo failed: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
