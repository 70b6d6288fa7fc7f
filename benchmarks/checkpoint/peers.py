"""DeepSpeed, measured in the same run: steps of `deepspeed_arm.py`, run by an interpreter that has it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.checkpoint.table import Sample
from benchmarks.checkpoint.workspace import settle_disk

ARM = Path(__file__).with_name("deepspeed_arm.py")
TAG = "bench"


@dataclass(frozen=True)
class DeepSpeed:
    """DeepSpeed with the benchmark's model, in a Python of its own."""

    python: str
    version: str
    options: dict[str, Any]
    """Options of the model."""

    def step(self, name: str, folder: Path, ranks: int = 1) -> dict[str, float]:
        """Run one step of the arm in `folder`; return its seconds and other figures by name."""
        settle_disk()
        command = [self.python, str(ARM), name, str(folder), json.dumps(self.options), str(ranks)]
        figures: dict[str, float] = json.loads(_output(command).splitlines()[-1])
        return figures

    def zero_to_fp32(self, folder: Path) -> float:
        """Run the script that DeepSpeed left beside its checkpoint, as a user would; return its seconds."""
        run, output = folder / "run", tempfile.mkdtemp(prefix="fp32-", dir=folder)
        settle_disk()
        start = time.perf_counter()
        _output([self.python, str(run / "zero_to_fp32.py"), str(run), output, "--tag", TAG,
                 "--safe_serialization"])  # fmt: skip
        return time.perf_counter() - start


def find_deepspeed(python: str | None, options: dict[str, Any]) -> DeepSpeed | None:
    """Return DeepSpeed of the interpreter `python`, or of this one if it has it; else None.

    Raises:
        RuntimeError: `python` was given but can't import DeepSpeed.
    """
    if python is None and find_spec("deepspeed") is None:
        return None
    chosen = python or sys.executable
    said = _output([chosen, "-c", "import deepspeed; print(deepspeed.__version__)"])
    return DeepSpeed(chosen, said.splitlines()[-1], options)


def named(deepspeed: DeepSpeed | None, what: str) -> str:
    """Return the name of a yardstick, and whether it is measured."""
    if deepspeed is None:
        return f"DeepSpeed, {what}: not installed, not measured"
    return f"DeepSpeed {deepspeed.version}, {what}"


def sample(values: list[float] | None, unit: str = "s") -> Sample | None:
    """Return the measurements of a peer; None if it isn't installed."""
    return Sample(tuple(values), unit) if values else None


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout
