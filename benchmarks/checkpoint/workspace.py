"""Folders that the arms write to: a fresh one for each save, and none deleted while anything is timed.

An ext4 file system without a journal skips inodes that were freed within the last half minute or so, and
creates files up to 30 times slower until then. So everything stays until the disk would run full. Then all is
deleted at once, and the next figure begins when the inodes can be used again.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

SETTLE_S = 45


class Workspace:
    """A folder for one run of the benchmark."""

    def __init__(self, parent: Path, *, room: float, settle: bool) -> None:
        """Require `room` free bytes before each figure.

        `settle=False` skips the waiting, for runs whose times do not matter.
        """
        parent.mkdir(parents=True, exist_ok=True)
        self.root = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=parent))
        self._room = room
        self._settle = settle
        self._count = 0
        self._deleted_at = time.monotonic()  # an earlier run may have deleted files just now

    def fresh(self, name: str) -> Path:
        """Return a path that does not exist yet."""
        self._count += 1
        return self.root / f"{self._count:04}-{name}"

    def make_room(self) -> None:
        """Delete old folders if the disk is filling up, and wait until that slows nothing down any more.

        Call it before a figure, when no folder is needed any more.

        Raises:
            RuntimeError: if there is still not enough room.
        """
        if self._free() < self._room:
            for path in self.root.iterdir():
                shutil.rmtree(path)
            self._deleted_at = time.monotonic()
        if self._free() < self._room:
            needed, free = self._room / 1e9, self._free() / 1e9
            raise RuntimeError(f"{self.root} has {free:.0f} GB free, but needs {needed:.0f}; name a --folder")
        os.sync()
        if self._settle:
            time.sleep(max(0.0, self._deleted_at + SETTLE_S - time.monotonic()))

    def _free(self) -> int:
        return shutil.disk_usage(self.root).free

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def settle_disk(written: Path | None = None) -> None:
    """Sync the disk, and drop the files below `written` from the page cache. Untimed, before or after an arm.

    If they stayed, the page cache would be full of earlier arms' files after a few rounds, and later arms
    would pay for making room.
    """
    os.sync()
    if written is None:
        return
    for path in files_below(written):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def files_below(folder: Path) -> list[Path]:
    """Return every file below a folder, sorted."""
    return sorted(Path(top) / name for top, _, names in os.walk(folder) for name in names)
