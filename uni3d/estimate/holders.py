"""Part of each tensor that each rank holds, for the ranks that wrote a checkpoint and for ranks that resume.

The ranks that resume hold parts that follow from rules (`uni3d.estimate.saved`), and so do their reads. For
the ranks that wrote it, the manifest's `writer` records which layers each pipeline rank had, and over how
many ranks ZeRO sharded (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ckpt
from ckpt.read import WEIGHT_STATES, pieces
from parallel.degrees import Ranks
from parallel.settings import Settings
from uni3d.estimate.saved import SavedModel, StageArray


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Ranks of a topology, with the parameters and buffers of a checkpoint that they hold."""

    ranks: Ranks
    by_pipeline_rank: Sequence[Mapping[str, StageArray]]
    """Arrays by atom, for each pipeline rank."""
    shards: int
    """Number of data-parallel ranks that share out a tensor."""

    def boxes(self, atom: str) -> dict[int, ckpt.Box]:
        """Return the part of an atom that each rank holds. It is empty if a rank is left without a part.

        Only ranks of the pipeline stages that have the atom are included; a tied weight has several.
        """
        found: dict[int, ckpt.Box] = {}
        for stage, parts in enumerate(self.by_pipeline_rank):
            if atom in parts:
                boxes = parts[atom].boxes(self.ranks, self.shards)
                found |= {stage * self.ranks.of_a_stage + i: box for i, box in enumerate(boxes)}
        return found

    def name_at(self, atom: str, stage: int) -> str | None:
        """Return the atom's name on a pipeline rank, which may be an alias of a tied weight, or None."""
        part = self.by_pipeline_rank[stage].get(atom)
        return None if part is None else part.name


def writers(source: SavedModel) -> Holders:
    """Return the ranks that wrote a checkpoint. An imported one was written by one process.

    Raises:
        ValueError: the manifest doesn't record what they held.
    """
    ranks, layers = source.writer.ranks, source.writer.layers
    if ranks is None:
        raise ValueError("the manifest doesn't record the topology that wrote the checkpoint")
    stages: list[list[str]] | list[None] = layers or [None]
    if len(stages) != ranks.pp:
        raise ValueError(
            f"the manifest doesn't record which layers each of the {ranks.pp} pipeline ranks had, so the "
            "parts that the ranks held are unknown"
        )
    if ranks.tp > 1 and (why := source.untold_tp()):
        raise ValueError(f"tp({ranks.tp}) {why}, so the parts that the ranks held are unknown")
    held = [source.parts(None if names is None else frozenset(names)) for names in stages]
    shards = source.writer.shard_group or ranks.shards()
    return Holders(ranks=ranks, by_pipeline_rank=[_weights(parts) for parts in held], shards=shards)


def resumed(source: SavedModel, ranks: Ranks) -> Holders:
    """Return the ranks that would resume from a checkpoint, with one pipeline stage on each.

    Raises:
        ValueError: the run can't be split over them; the message is that of `uni3d doctor`.
    """
    if refused := list(source.refused(ranks.pp, ranks.dp, ranks.tp, batch=source.batch)):
        raise ValueError("; ".join(map(str, refused)))
    held = [_weights(parts) for parts in source.by_pipeline_rank(ranks.pp)]
    return Holders(ranks=ranks, by_pipeline_rank=held, shards=ranks.shards())


def _weights(parts: Sequence[StageArray]) -> dict[str, StageArray]:
    """Return the arrays of parameters and buffers by atom, without optimizer states."""
    return {part.info.key.atom: part for part in parts if part.info.key.state in WEIGHT_STATES}


class Reads(NamedTuple):
    """Bytes and chunks that the ranks of a topology read from a checkpoint."""

    most: int
    """Bytes read by the rank that reads most."""
    least: int
    total: int
    """Bytes read by all ranks. Chunks that several ranks read count several times."""
    most_chunks: int
    """Chunks read by the rank that reads the most."""
    chunks: int
    """Chunks in the checkpoint. Each is read by at least one rank."""


def reads(
    checkpoint: ckpt.Checkpoint,
    source: SavedModel,
    ranks: Ranks,
    settings: Settings,
    shard_group: int | None = None,
) -> Reads:
    """Compute from the manifest how much a load by these ranks reads."""
    shards, n = ranks.shards(shard_group), ranks.of_a_stage
    known: dict[Any, list[tuple[int, int]]] = {}

    def costs_of(part: StageArray) -> list[tuple[int, int]]:
        info = part.info
        # The layers of a model have arrays with the same chunks: each kind is counted once.
        key = (info.grid, info.dtype, part.kind.tp_dim, part.kind.whole)
        if key not in known:
            by_box: dict[Any, tuple[int, int]] = {}
            boxes = part.boxes(ranks, shards)
            for box in boxes:
                if box not in by_box:
                    chunks = sum(1 for _ in pieces(info, box))
                    by_box[box] = chunks * info.grid.payload, chunks
            known[key] = [by_box[box] for box in boxes]
        return known[key]

    by_rank: list[tuple[int, int]] = []
    for parts in source.by_pipeline_rank(ranks.pp, settings):
        columns = [costs_of(part) for part in parts]
        by_rank += [(sum(c[i][0] for c in columns), sum(c[i][1] for c in columns)) for i in range(n)]
    sizes, counts = zip(*by_rank, strict=True)
    chunks = sum(len(info.sums) for info in checkpoint.arrays.values())
    return Reads(max(sizes), min(sizes), sum(sizes), max(counts), chunks)
