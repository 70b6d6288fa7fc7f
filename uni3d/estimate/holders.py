"""Which rank holds which part of a tensor: as those had it that wrote a checkpoint, and as others would.

What a run that resumes would hold follows from rules (`uni3d.estimate.saved`). What the writers held is a
fact, whatever their config was: the manifest's `writer` says which layers lay where, and over how many ranks
ZeRO sharded (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.degrees import Ranks
from uni3d.estimate.saved import BUFFER, PARAMETER, SavedModel, StageArray

if TYPE_CHECKING:
    import ckpt


@dataclass(frozen=True, kw_only=True)
class Holders:
    """The ranks of a topology, and what they hold of a checkpoint's parameters and buffers."""

    ranks: Ranks
    places: Sequence[Mapping[str, StageArray]]
    """By place of the pipeline, and atom."""
    shards: int
    """How many data-parallel ranks share out a tensor."""

    def boxes(self, atom: str) -> dict[int, ckpt.Box]:
        """By rank, the part of an atom that it holds; empty where nothing was left for it.

        Ranks of pipeline stages without the atom are left out. A tied weight is on several.
        """
        found: dict[int, ckpt.Box] = {}
        for place, parts in enumerate(self.places):
            if atom in parts:
                boxes = parts[atom].boxes(self.ranks, self.shards)
                found |= {place * self.ranks.of_a_stage + i: box for i, box in enumerate(boxes)}
        return found

    def name_at(self, atom: str, place: int) -> str | None:
        """The atom's name at a place of the pipeline; another one of a tied weight, or None."""
        part = self.places[place].get(atom)
        return None if part is None else part.name


def writers(source: SavedModel) -> Holders:
    """The ranks that wrote a checkpoint; of an imported one, the process that did.

    Raises:
        ValueError: its manifest doesn't say what they held.
    """
    ranks, layers = source.writer.ranks, source.writer.layers
    if ranks is None:
        raise ValueError("the manifest doesn't say on which topology it was written")
    places: list[list[str]] | list[None] = layers or [None]
    if len(places) != ranks.pp:
        raise ValueError(
            f"the manifest doesn't say which layers lay on which of the {ranks.pp} pipeline ranks, "
            "so nobody knows what they held"
        )
    if ranks.tp > 1 and (why := source.untold_tp()):
        raise ValueError(f"tp({ranks.tp}) {why}, so it isn't known what the ranks held")
    held = [source.parts(None if here is None else frozenset(here)) for here in places]
    shards = source.writer.shard_group or ranks.shards()
    return Holders(ranks=ranks, places=[_own(parts) for parts in held], shards=shards)


def resumed(source: SavedModel, ranks: Ranks) -> Holders:
    """The ranks that would go on from a checkpoint, with one pipeline stage on each.

    Raises:
        ValueError: the run can't be split over them, as `uni3d doctor` says too.
    """
    if refused := list(source.refused(ranks.pp, ranks.dp, ranks.tp, batch=source.batch)):
        raise ValueError("; ".join(map(str, refused)))
    places = [_own(parts) for parts in source.places(ranks.pp)]
    return Holders(ranks=ranks, places=places, shards=ranks.shards())


def _own(parts: Sequence[StageArray]) -> dict[str, StageArray]:
    """Those of parameters and buffers, without the optimizer's states."""
    return {part.info.key.atom: part for part in parts if part.info.key.state in (PARAMETER, BUFFER)}
