"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt.stores import files


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `path`. After the block it is synced to disk and renamed to `path`.

    If the block fails, the folder is deleted.

    Raises:
        FileExistsError: `path` exists, or another process writes it.
        OSError: the folder can't be written.
    """
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.tmp")
    try:
        work.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{work} exists: another process writes {path}, or was killed; delete it if none is running"
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
