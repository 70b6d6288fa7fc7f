"""Which rank holds which part of a tensor: as those had it that wrote a checkpoint, and as others would.

What a run that resumes would hold follows from rules (`uni3d.estimate.saved`). What the writers held is a
fact, whatever their config was: the manifest's `writer` says which layers lay where, and over how many ranks
ZeRO sharded (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


def written_on(manifest: Mapping[str, Any]) -> Ranks | None:
    """On what a checkpoint was written; None if its manifest doesn't say it, or it was imported."""
    writer = manifest.get("writer") or {}
    return None if "imported" in writer else _ranks(writer)


def imported_from(manifest: Mapping[str, Any]) -> str | None:
    """The kind of checkpoint that this one was made of by `uni3d import`; None if it wasn't."""
    imported = (manifest.get("writer") or {}).get("imported")
    return None if imported is None else str(imported["from"])


def zero_so_far(manifest: Mapping[str, Any]) -> int:
    """The ZeRO stage of the run that wrote a checkpoint; of an imported one, of the run before it."""
    writer = manifest.get("writer") or {}
    stage = (writer.get("imported") or writer).get("zero_stage")
    return stage if isinstance(stage, int) and stage in range(4) else 0


def writers(source: SavedModel) -> Holders:
    """The ranks that wrote a checkpoint; of an imported one, the process that did.

    Raises:
        ValueError: its manifest doesn't say what they held.
    """
    ranks, layers = _ranks(source.writer), source.writer.get("layers")
    if ranks is None:
        raise ValueError("the manifest doesn't say on which topology it was written")
    if len(layers or [None]) != ranks.pp:
        raise ValueError(
            f"the manifest doesn't say which layers lay on which of the {ranks.pp} pipeline ranks, "
            "so nobody knows what they held"
        )
    if ranks.tp > 1 and (why := source.untold_tp()):
        raise ValueError(f"tp({ranks.tp}) {why}, so it isn't known what the ranks held")
    places = [source.parts(None if here is None else frozenset(here)) for here in layers or [None]]
    shards = source.writer.get("shard_group") or ranks.shards()
    return Holders(ranks=ranks, places=[_own(parts) for parts in places], shards=shards)


def resumed(source: SavedModel, ranks: Ranks) -> Holders:
    """The ranks that would go on from a checkpoint, with one pipeline stage on each.

    Raises:
        ValueError: the run can't be split over them, as `uni3d doctor` says too.
    """
    if refused := list(source.refused(ranks.pp, ranks.dp, ranks.tp, batch=source.batch)):
        raise ValueError("; ".join(map(str, refused)))
    places = [_own(parts) for parts in source.places(ranks.pp)]
    return Holders(ranks=ranks, places=places, shards=ranks.shards())


def _ranks(writer: Mapping[str, Any]) -> Ranks | None:
    try:
        return Ranks(
            **{axis: writer["topology"][axis] for axis in ("pp", "dp", "tp")}, zero=writer["zero_stage"]
        )
    except (KeyError, TypeError, ValueError):
        return None


def _own(parts: Sequence[StageArray]) -> dict[str, StageArray]:
    """Those of parameters and buffers, without the optimizer's states."""
    return {part.info.key.atom: part for part in parts if part.info.key.state in (PARAMETER, BUFFER)}
