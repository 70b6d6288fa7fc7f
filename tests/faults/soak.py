"""Save at each step for a while, and check that memory, descriptors, threads and the disk stay as they were.

Two runs in one process: arrays that 1 to 4 ranks save and 1 to 4 others load, kept by a retention, some tags
twice; and a model that `uni3d.Checkpointer` saves in the background. `make soak` takes ten minutes.
"""

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("support", "ckpt")]

import torch  # noqa: E402
from ckpt_helpers import even_cut, load_in, same  # noqa: E402
from situations import RANKS, arrays_of, parts_of  # noqa: E402
from torch import nn  # noqa: E402
from turns import in_turns  # noqa: E402

import ckpt  # noqa: E402
import uni3d  # noqa: E402

KEPT = 3
SAMPLES = 40
"""Measurements in all; the first quarter is a warm-up."""
GROWTH = 8 << 20
"""Bytes of resident memory by which the last quarter's median may exceed that of the second."""


class Use(NamedTuple):
    """Use of the system's resources."""

    resident: int
    """Bytes of memory."""
    descriptors: int
    threads: int
    disk: int
    """Bytes of the files, one with several names counted once."""
    files: int


def use(folder: Path) -> Use:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {s.st_ino: s.st_size for s in (p.stat() for p in folder.rglob("*") if p.is_file())}
    names = sum(1 for p in folder.rglob("*"))
    counts = [len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")]
    return Use(pages * os.sysconf("SC_PAGE_SIZE"), *counts, sum(found.values()), names)


def rows(shape: tuple[int, ...], parts: int) -> list[ckpt.Box]:
    """Return the boxes of an array that is cut by its rows."""
    return [ckpt.Box((at, *[0] * (len(shape) - 1)), (n, *shape[1:])) for at, n in even_cut(shape[0], parts)]


class Arrays:
    """A run of arrays: ranks that take turns save it, others load it."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def step(self, number: int, rng: Random) -> None:
        ranks, files, name = rng.choice(RANKS), rng.choice(("array", "writer")), rng.choice(("new", "other"))
        plan, shards = parts_of(ranks, files, True, name)
        tag = f"step{number - (number % 7 == 0)}"  # some replace the one before
        options = {"plan": plan, "document": {"step": number}, "retention": ckpt.Retention(keep_last=KEPT)}

        def save(comm: object) -> ckpt.SaveReport:
            return ckpt.save(self.run, tag, shards[comm.rank], comm=comm, **options)  # type: ignore

        for result in in_turns(ranks, save):
            if isinstance(result, BaseException):
                raise result
        arrays, others = arrays_of(name, True), rng.randint(1, 4)
        boxes = {key: rows(a.shape, others) for key, a in arrays.items()}
        load_in(self.run, arrays, boxes)
        checkpoint = ckpt.open_checkpoint(self.run)
        assert checkpoint.tag == tag
        assert all(same(checkpoint.read(*key), expected) for key, expected in arrays.items())
        assert len(ckpt.committed_tags(self.run)) <= KEPT


class Model:
    """A model that is saved in the background at each step, and loaded now and then."""

    def __init__(self, run: Path) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.checkpoints = uni3d.Checkpointer(
            run, model=self.model, optimizer=self.optimizer, async_save=True, keep_last=KEPT
        )

    def step(self, number: int, rng: Random) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 64)).square().mean().backward()
        self.optimizer.step()
        self.checkpoints.save(number)
        if rng.random() < 0.1:
            before = [p.detach().clone() for p in self.model.parameters()]
            with contextlib.redirect_stderr(StringIO()):  # a line for each load
                self.checkpoints.load()
            assert all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))


def soak(folder: Path, minutes: float, seed: int) -> tuple[int, list[Use]]:
    """Save for some minutes; return the steps and the measurements."""
    rng, arrays, model = Random(seed), Arrays(folder / "arrays"), Model(folder / "model")
    begun, number, uses = time.monotonic(), 0, list[Use]()
    while len(uses) < SAMPLES:
        number += 1
        arrays.step(number, rng)
        model.step(number, rng)
        if time.monotonic() - begun > (len(uses) + 1) * minutes * 60 / SAMPLES:
            model.checkpoints.wait()
            uses.append(use(folder))
    model.checkpoints.wait()
    return number, uses


def grown(uses: list[Use]) -> list[str]:
    """Return what has grown between the second quarter of the time and the last."""
    quarter = len(uses) // 4
    before, after = uses[quarter : 2 * quarter], uses[-quarter:]
    told = []
    for name in Use._fields:
        first, last = ([getattr(u, name) for u in part] for part in (before, after))
        if name == "resident":
            found, limit = median(last) - median(first), float(GROWTH)
        else:
            found, limit = max(last) - max(first), max(first) / 4 if name in ("disk", "files") else 0
        if found > limit:
            told.append(f"{name} grew by {found:,}: from {first} to {last}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save; by default the system's temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        steps, uses = soak(Path(folder), arguments.minutes, arguments.seed)
    shown = {f: [getattr(uses[i], f) for i in (0, SAMPLES // 4, SAMPLES // 2, -1)] for f in Use._fields}
    print(json.dumps({"steps": steps, "minutes": arguments.minutes, "seed": arguments.seed, **shown}))
    if told := grown(uses):
        sys.exit("\n".join(told))


if __name__ == "__main__":
    main()
