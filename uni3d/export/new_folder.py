"""A folder that is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt.stores import files


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a hidden folder beside `path` to write into. It becomes `path` after the block, when all of it is
    on the disk; if the block fails, it is deleted.

    Raises:
        FileExistsError: `path` is there, or somebody writes it.
        OSError: it can't be written.
    """
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    try:
        work.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{work} exists: another process writes {path}, or was killed; delete it if none does"
        ) from None
    try:
        yield work
        files.sync_tree(work)
        _check_free(path)  # again: a rename would replace an empty folder
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    files.sync_folder(path.parent)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists; delete it, or write to another folder")
