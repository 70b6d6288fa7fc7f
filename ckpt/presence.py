"""Whether all files of a checkpoint are there with their sizes: a look at each, and nothing is read.

It finds what was deleted, forgotten in a copy, or cut short; not a byte that changed, which `verify` does.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckpt.box import grid
from ckpt.format import MANIFEST, chunk_key
from ckpt.read import Checkpoint
from ckpt.threads import cores, for_each
from ckpt.verify import Problem, other_size, problem_at, unreadable


def absent(checkpoint: Checkpoint, *, threads: int | None = None) -> list[Problem]:
    """What of a checkpoint's files is missing or has another size; nothing where all are there.

    Chunks that the manifest should know of, and doesn't, are among them.
    """
    expected = dict(_sizes(checkpoint))

    def look(path: str) -> Problem | None:
        try:
            size = checkpoint.store.size(checkpoint.path(path))
        except OSError as error:
            return problem_at(checkpoint, path, unreadable(error))
        wanted = expected[path]
        return None if size == wanted else problem_at(checkpoint, path, other_size(size, wanted))

    found = for_each(look, expected, threads or checkpoint.store.threads or cores())
    return [*_unknown(checkpoint), *(problem for problem in found if problem is not None)]


def _sizes(checkpoint: Checkpoint) -> Iterator[tuple[str, int]]:
    """Every file that the manifest names, with its size."""
    manifest = checkpoint.manifest
    for kind in ("documents", "files"):
        for path, record in manifest.get(kind, {}).items():
            yield path, record["size"]
    for array, chunks in manifest["chunks"].items():
        for key, record in chunks.items():
            yield f"{array}/{key}", record["size"]


def _unknown(checkpoint: Checkpoint) -> Iterator[Problem]:
    """Chunks of the arrays' grids of which the manifest says nothing."""
    for info in checkpoint.arrays.values():
        for index, _ in grid(info.shape, info.chunk_shape):
            if chunk_key(index) not in info.chunks:
                path = f"{info.path}/{chunk_key(index)}"
                yield problem_at(checkpoint, path, "has no record of it", at=MANIFEST)
