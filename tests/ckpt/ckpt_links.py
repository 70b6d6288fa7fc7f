"""Small runs of saves of which one may be linked to the one before."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ckpt_helpers import Arrays, Boxes, cut, random_array, save_arrays

from ckpt import Box, SaveReport

W, V, B = ("w", "fp32"), ("v", "fp32"), ("bias", "fp32")
SMALL = {"chunk_bytes": 1 << 12, "gather_below": 1 << 10}
"""`W` and `V` are cut into 12 chunks in one file; `B` is gathered."""

SHAPES = {W: (120, 96), V: (120, 96), B: (7,)}
PLACES: dict[str, Boxes] = {
    "three-writers": {W: cut((120, 96), (3, 1)), V: cut((120, 96), (1, 3)), B: cut((7,), (3,))},
    "copies": {W: [Box.whole((120, 96))] * 3, V: [Box.whole((120, 96))] * 3, B: cut((7,), (3,))},
    "one-writer": {key: [Box.whole(shape)] for key, shape in SHAPES.items()},
}
THREE = PLACES["three-writers"]


def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    return {key: random_array(rng, "float32", shape) for key, shape in SHAPES.items()}


def with_one_changed(before: Arrays, key: tuple[str, str], *place: int) -> Arrays:
    after = {k: a.copy() for k, a in before.items()}
    after[key][place] += 1
    return after


def saved(
    run: Path,
    tag: str,
    content: Arrays,
    boxes: Boxes = THREE,
    planning: Mapping[str, Any] = {},
    **options: Any,
) -> SaveReport:
    return save_arrays(run, tag, content, boxes, planning=SMALL | dict(planning), **options)


def data_files(folder: Path) -> dict[str, os.stat_result]:
    return {str(p.relative_to(folder)): p.stat() for p in folder.rglob("c*") if p.is_file()}


def linked(run: Path, old: str = "t1", new: str = "t2") -> set[str]:
    """Return the names of arrays of which any file of `new` is one of `old`."""
    before = {stat.st_ino for stat in data_files(run / old).values()}
    found = data_files(run / new)
    return {name.split("/")[1] for name, stat in found.items() if stat.st_ino in before}
