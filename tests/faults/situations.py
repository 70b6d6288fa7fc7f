"""Situations of a save, and what a reader may find after one that was cut off."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ckpt_faults import killed_at
from ckpt_helpers import Arrays, cut, layout_of, same, save_arrays, shards_of
from turns import in_turns

from ckpt import (
    CheckpointError,
    Plan,
    Retention,
    SaveReport,
    Shard,
    committed_tags,
    make_plan,
    open_checkpoint,
    order,
    read_latest,
    save,
    verify,
)

PLANNING = {"chunk_bytes": 1 << 13, "gather_below": 1 << 10}
RANKS = (1, 2, 4)
BEFORE = {
    "fresh": (),
    "next": ("t1",),
    "whole": ("t1",),
    "overwriting": ("t0", "t1"),
    "overwriting the only one": ("t1",),
    "retention": ("t0", "t1"),
    "after a killed one": ("t0", "t1"),
    "beside another writer": ("t1",),
}
"""Tags that are there before the save, by the situation. `whole` links no files of the latest."""
Problems = list[tuple[str, str]]


@cache
def arrays_of(tag: str, many: bool) -> Arrays:
    """Make the numbers of a tag: arrays that all ranks write, gathered ones, and two that never change."""
    rng = np.random.default_rng(["t0", "t1", "new", "other", "later"].index(tag))
    arrays = {
        ("w", "fp32"): rng.standard_normal((64, 96), np.float32),
        ("w", "exp_avg"): rng.standard_normal(5, np.float32),
        ("frozen", "fp32"): np.ones(3, np.float32),
        ("frozen", "value"): np.arange(64 * 90, dtype=np.float32).reshape(64, 90),
    }
    if many:
        arrays |= {(f"layer.{i}", "fp32"): rng.standard_normal((8, 40 + i), np.float32) for i in range(6)}
    return arrays


@dataclass(frozen=True)
class Case:
    """A save in a situation."""

    situation: str
    ranks: int
    files: str
    many: bool

    @property
    def before(self) -> tuple[str, ...]:
        return BEFORE[self.situation]

    @property
    def tag(self) -> str:
        """Tag that is saved."""
        return "t1" if self.situation.startswith("overwriting") else "t2"

    @property
    def may_go(self) -> tuple[str, ...]:
        """Tags that the save deletes after its commit."""
        return ("t0", "t1") if self.situation == "retention" else ()

    def run(self, place: Path) -> Path:
        """Return the run's folder at a place; a fresh one is two folders deep."""
        return place / "deep" / "run" if self.situation == "fresh" else place / "run"

    def __str__(self) -> str:
        return f"{self.situation}, {self.ranks} ranks, a file per {self.files}{', many' if self.many else ''}"


CASES = [
    Case(situation, ranks, files, many)
    for many, files, ranks, situation in product((False, True), ("array", "writer"), RANKS, BEFORE)
]


@cache
def parts_of(ranks: int, files: str, many: bool, tag: str) -> tuple[Plan, list[list[Shard]]]:
    """Return the plan of a save and each rank's shards."""
    arrays = arrays_of(tag, many)
    boxes = {key: cut(a.shape, (ranks, *[1] * (a.ndim - 1))) for key, a in arrays.items()}
    boxes["frozen", "fp32"] = cut((3,), (1,)) * ranks
    layout = layout_of(arrays, boxes)
    plan = make_plan(layout, **PLANNING, files=files)  # type: ignore[arg-type]
    return plan, [shards_of(arrays, specs) for specs in layout.values()]


def saver(case: Case, run: Path, *, new: str = "new", tag: str = "") -> Callable[[Any], SaveReport]:
    """Return a rank's part of the save, given its `comm`."""
    plan, shards = parts_of(case.ranks, case.files, case.many, new)
    keep = Retention(keep_last=1 if case.situation == "retention" else None)
    options: dict[str, Any] = {"plan": plan, "document": {}, "retention": keep, "threads": 1}
    options["incremental"] = case.situation != "whole"
    return lambda comm: save(run, tag or case.tag, shards[comm.rank], comm=comm, **options)


def saving(case: Case, run: Path, **more: str) -> Callable[[], list[Any]]:
    """Return the save by ranks that take turns."""
    return lambda: in_turns(case.ranks, saver(case, run, **more))


class Places:
    """Folders in memory in which each situation is made anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: set[Path] = set()

    def new(self, case: Case) -> Path:
        """Return the run's folder, as it is before the save."""
        pattern = self.folder / f"before {case.situation} {case.many}"
        if pattern not in self.made:
            self._make(case, pattern)
            self.made.add(pattern)
        place = self.folder / "now"
        shutil.rmtree(place, ignore_errors=True)
        copy_linked(pattern, place)
        order._known.clear()  # as a new process, so that each try makes the same calls
        return case.run(place)

    def _make(self, case: Case, pattern: Path) -> None:
        pattern.mkdir(parents=True)
        run = case.run(pattern)
        for tag in case.before:
            save_arrays(run, tag, arrays_of(tag, case.many), planning=PLANNING, document={}, durable=True)
        if case.situation == "after a killed one":
            one = Case("next", 1, "array", case.many)
            assert killed_at(25, saving(one, run, new="other", tag="t3"))
            assert [*run.glob(".saving.t3.*")]
            assert (run / ".writer").exists()


def copy_linked(old: Path, new: Path) -> None:
    """Copy a folder with its hard links and times."""
    copies: dict[int, str] = {}

    def copy(a: str, b: str) -> None:
        number = os.stat(a).st_ino
        if number in copies:
            os.link(copies[number], b)
        else:
            copies[number] = b
            shutil.copy2(a, b)

    shutil.copytree(old, new, copy_function=copy)


def held(run: Path, tag: str, names: tuple[str, ...], many: bool) -> tuple[str | None, Problems]:
    """Return which of the candidates `names` a tag holds, and what is wrong if it is none."""
    try:
        checkpoint = open_checkpoint(run, tag)
        found = {tuple(key): checkpoint.read(*key) for key in checkpoint.arrays}
    except CheckpointError as error:
        return None, [("torn", f"{tag} can't be read: {error}")]
    for name in names:
        expected = arrays_of(name, many)
        if found.keys() == expected.keys() and all(same(found[key], a) for key, a in expected.items()):
            if problems := verify(checkpoint, threads=1):
                return name, [("torn", f"{tag} has {problems[0]}")]
            return name, []
    return None, [("wrong", f"{tag} holds none of {names}")]


def left(
    run: Path,
    case: Case,
    *,
    returned: bool = False,
    exists: bool | None = None,
    beside: tuple[str, ...] = (),
) -> Problems:
    """Compare what is left of a run with all states that it may have.

    Each older tag is whole; the new one is whole or doesn't exist; a tag that is replaced is the old or the
    new one; one that retention deletes goes after the commit alone. `returned` says that the save ended well,
    `exists` whether the new one must exist, and `beside` names tags that another writer may have saved.
    """
    try:
        there = committed_tags(run) if run.is_dir() else []
    except CheckpointError as error:
        return [("other", f"the tags can't be listed: {error}")]
    problems: Problems = []
    found: dict[str, str | None] = {}
    for tag in there:
        names = {case.tag: ("new",)}.get(tag, ()) + ((tag,) if tag in case.before else ())
        names += ("other",) if tag in beside else ()
        if not names:
            problems.append(("other", f"{tag} is there"))
            continue
        found[tag], wrong = held(run, tag, names, case.many)
        problems += wrong
    committed = found.get(case.tag) == "new"
    if (returned or exists) and not committed:
        problems.append(("lost", f"{case.tag}, of which the save had said that it is committed"))
    if exists is False and committed:
        problems.append(("other", f"{case.tag} is committed"))
    for tag in case.before:
        if tag not in there and not (tag in case.may_go and committed):
            problems.append(("lost", tag))
    try:
        latest = read_latest(run) if run.is_dir() else None
        if latest not in (there or [None]):
            problems.append(("lost", f"latest names {latest}, and there are {there}"))
        allowed = {case.before[-1] if case.before else None, case.tag, *beside}
        if latest not in ({case.tag} if returned else allowed) and there:
            problems.append(("other", f"latest names {latest}"))
    except CheckpointError as error:
        problems.append(("lost", f"latest: {error}"))
    return problems


def next_save(run: Path, case: Case) -> Problems:
    """Save the tag again, by one rank: it must work, and take away what the other has left."""
    order._known.clear()
    try:
        save_arrays(run, case.tag, arrays_of("later", case.many), document={}, planning=PLANNING)
    except CheckpointError as error:
        return [("other", f"the next save fails: {error}")]
    name, problems = held(run, case.tag, ("later",), case.many)
    if name and read_latest(run) != case.tag:
        problems.append(("other", "the next save's latest"))
    hidden = [path.name for path in run.iterdir() if path.name.startswith(".")]
    return problems + [("other", f"{name} is left") for name in hidden]
