"""What a load by the ranks of any topology would read of a checkpoint, by the chunks that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from parallel.degrees import Ranks
from parallel.settings import Settings
from uni3d.estimate.saved import SavedModel, StageArray

if TYPE_CHECKING:
    import ckpt


class Reads(NamedTuple):
    """What the ranks of a topology read from a checkpoint, in bytes and files."""

    most: int
    """By the rank that reads most."""
    least: int
    total: int
    """By all ranks together; what several read is counted as often."""
    most_files: int
    """Of which one rank reads."""
    files: int
    """Chunks that the checkpoint has of these arrays; each is read by some rank."""


def reads(
    checkpoint: ckpt.Checkpoint,
    source: SavedModel,
    ranks: Ranks,
    settings: Settings,
    shard_group: int | None = None,
) -> Reads:
    """What a load by these ranks would read, by the checkpoint's own chunks; nothing is read of them here.

    Arrays that are alike are counted once.

    Raises:
        CheckpointError: the manifest has no record of a chunk.
    """
    from ckpt.checksums import Blocks
    from ckpt.read import pieces

    shards, n = ranks.shards(shard_group), ranks.of_a_stage
    known: dict[Any, list[tuple[int, int]]] = {}

    def of(part: StageArray) -> list[tuple[int, int]]:
        info = part.info
        blocks = {Blocks.of_record(record).size for record in info.chunks.values()}
        alike = (info.shape, info.chunk_shape, info.dtype, part.tp_dim, part.whole)
        key = (*alike, *blocks) if len(blocks) <= 1 else info.key
        if key not in known:
            by_box: dict[Any, tuple[int, int]] = {}
            for box in part.boxes(ranks, shards):
                if box not in by_box:
                    costs = [checkpoint.cost(piece) for piece in pieces(info, box)]
                    by_box[box] = sum(costs), len(costs)
            known[key] = [by_box[box] for box in part.boxes(ranks, shards)]
        return known[key]

    by_rank: list[tuple[int, int]] = []
    for place in source.places(ranks.pp, settings):
        columns = [of(part) for part in place]
        by_rank += [(sum(c[i][0] for c in columns), sum(c[i][1] for c in columns)) for i in range(n)]
    sizes, files = zip(*by_rank, strict=True)
    chunks = sum(len(info.chunks) for info in checkpoint.arrays.values())
    return Reads(max(sizes), min(sizes), sum(sizes), max(files), chunks)
