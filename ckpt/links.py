"""Files that a save needn't write, because the run's latest checkpoint has the same ones: hard links.

Bytes are compared, not checksums: equal checksums are no proof, and the disk may have lost what was once
written. So nothing of the older checkpoint is read but the files in question, of most only the first page.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckpt.array_files import PAGE
from ckpt.checksums import Buffer
from ckpt.stores import Store

Run = tuple[int, Iterable[Buffer]]
"""Adjacent bytes of a file: where they begin, and the bytes in parts."""


class Links:
    """Compares files to be written with those of a committed checkpoint, and links them."""

    def __init__(self, store: Store, base: str, staging: str) -> None:
        """`base` is the checkpoint's folder, `staging` that of the save."""
        self._store = store
        self._base = base
        self._staging = staging

    def may_be_same(self, path: str, size: int, run: Run) -> bool:
        """Return whether the checkpoint's file has this size and the first page of `run`."""
        offset, parts = run
        first = memoryview(next(iter(parts)))[:PAGE]
        found = bytearray(len(first))
        try:
            if self._store.size(f"{self._base}/{path}") != size:
                return False
            got = self._store.read_into(f"{self._base}/{path}", memoryview(found), offset)
        except OSError:
            return False
        return got == len(first) and found == first

    def same(self, path: str, size: int, runs: Iterable[Run]) -> bool:
        """Return whether the checkpoint's file has this size and these bytes."""
        try:
            if self._store.size(f"{self._base}/{path}") != size:
                return False
            return all(self._store.same(f"{self._base}/{path}", offset, parts) for offset, parts in runs)
        except OSError:
            return False

    def link(self, path: str) -> None:
        """Link the checkpoint's file to this save's name for it, or copy it if the store can't link more."""
        old, new = f"{self._base}/{path}", f"{self._staging}/{path}"
        if not self._store.link(old, new):
            self._store.copy(old, new)
