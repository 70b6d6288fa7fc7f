"""The two sides of a resize: a checkpoint's writers, and who went on with it, or could."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from uni3d.holders import Holders, Split, topology
from uni3d.paper import Ranks
from uni3d.plot_layout import Side, name_ranks

if TYPE_CHECKING:
    from ckpt import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Place:
    """A topology, and what is where on it."""

    when: str
    """"before" or "after"."""
    holders: Holders
    split: Split
    tag: str | None
    """Of the checkpoint that was written there, if one was."""


def before_and_after(run: str, tag: str | None, degrees: Mapping[str, int | None]) -> tuple[Place, Place]:
    """The topology that wrote a checkpoint, and the one asked for, or else that of the run's next resize.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: the model can't be on one of them, a manifest doesn't say how, or there was no resize.
    """
    import ckpt

    asked = any(value is not None for value in degrees.values())
    if asked:
        holders = Holders(checkpoint := ckpt.open_checkpoint(run, tag))
        split = holders.writers()
        later = Place(when="after", holders=holders, split=holders.on(_ranks(split.ranks, degrees)), tag=None)
        return Place(when="before", holders=holders, split=split, tag=checkpoint.tag), later
    first, second = _resize(run, tag)
    places = []
    for when, checkpoint in (("before", first), ("after", second)):
        holders = Holders(checkpoint)
        places.append(Place(when=when, holders=holders, split=holders.writers(), tag=checkpoint.tag))
    return places[0], places[1]


def _ranks(writers: Ranks, degrees: Mapping[str, int | None]) -> Ranks:
    """What isn't asked for is as it was; of the world size, dp takes what is left."""
    wanted = {
        axis: getattr(writers, axis) if n is None else n
        for axis, n in degrees.items()
        if axis != "world-size"
    }
    world = degrees["world-size"]
    if world is None:
        return Ranks(**wanted)
    rest = wanted["pp"] * wanted["tp"]
    if degrees["dp"] is None and rest > 0 and world % rest == 0:
        wanted["dp"] = world // rest
    ranks = Ranks(**wanted)
    if ranks.total != world:
        equation = f"pp({ranks.pp}) * dp({ranks.dp}) * tp({ranks.tp})"
        raise ValueError(f"{equation} = {ranks.total}, but --world-size is {world}; give other degrees")
    return ranks


def _resize(run: str, tag: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Two checkpoints of a run: `tag`, and the next one on another topology. Without a tag, the last such."""
    import ckpt

    advice = "give the topology after with --pp, --dp, --tp, --zero or --world-size"
    newest = ckpt.open_checkpoint(run, tag)
    if not newest.folder:
        raise ValueError(f"{newest.url} is one checkpoint's own folder, so no other is known; {advice}")
    tags = ckpt.committed_tags(run)
    if tag is None:
        after = newest
        for earlier in reversed(tags[: tags.index(newest.tag)]):
            before = ckpt.open_checkpoint(run, earlier)
            if _differ(before, after):
                return before, after
            after = before
        raise ValueError(f"{run} has no two checkpoints in a row on different topologies; {advice}")
    for later in tags[tags.index(tag) + 1 :]:
        after = ckpt.open_checkpoint(run, later)
        if _differ(newest, after):
            return newest, after
    raise ValueError(f"{run} has no checkpoint after {tag} that was written on another topology; {advice}")


def _differ(first: Checkpoint, second: Checkpoint) -> bool:
    return topology(first.manifest) != topology(second.manifest)


def choose_atom(before: Place, after: Place, wanted: str | None) -> str:
    """The atom to draw; by default the largest matrix that is cut on one of the sides, else the largest.

    Raises:
        ValueError: there is none, or its shape isn't the same on both sides.
    """
    shapes = before.holders.shapes
    if wanted is not None:
        name = before.holders.first_name(wanted)
        if name not in shapes:
            raise ValueError(f"there is no atom {wanted!r}; `uni3d inspect RUN --atoms` lists them")
        if after.holders.shapes.get(name) != shapes[name]:
            raise ValueError(
                f"{name} is {list(shapes[name])} before, and {after.holders.shapes.get(name)} after"
            )
        return name
    both = [name for name, shape in shapes.items() if after.holders.shapes.get(name) == shape]
    if not both:
        raise ValueError("the two checkpoints have no atom in common")
    by_size = sorted(both, key=lambda name: (len(shapes[name]) == 2, prod(shapes[name])), reverse=True)
    return next((name for name in by_size if _is_cut(name, before) or _is_cut(name, after)), by_size[0])


def _is_cut(atom: str, place: Place) -> bool:
    shape = place.holders.shapes[atom]
    return any(length != shape for _, length in place.holders.parts(atom, place.split).values())


def side_of(atom: str, place: Place) -> Side:
    """What is drawn and said of a side."""
    ranks, parts = place.split.ranks, place.holders.parts(atom, place.split)
    said = f", as {place.tag} was written" if place.tag else ""
    count = f"{ranks.total} rank{'s' * (ranks.total != 1)}"
    return Side(
        title=f"{place.when.capitalize()}: {ranks} ({count}){said}",
        ranks=ranks,
        parts=parts,
        notes=_notes(atom, place, sorted(rank for rank, (_, length) in parts.items() if 0 in length)),
    )


def _notes(atom: str, place: Place, empty: list[int]) -> list[str]:
    """Who has the atom under which name, and who nothing of it."""
    ranks, notes, without = place.split.ranks, list[str](), list[int]()
    for stage in range(ranks.pp):
        members = range(stage * ranks.of_a_stage, (stage + 1) * ranks.of_a_stage)
        name = place.holders.name_at(atom, place.split, stage)
        if name is None:
            without += members
        elif ranks.pp > 1:
            under = "" if name == atom else f" a copy, tied to it, as {name}"
            notes.append(f"pipeline rank {stage} ({name_ranks(members)}) has{under or ' it'}")
    if without:
        notes.append(f"{name_ranks(without)} {'has' if len(without) == 1 else 'have'} other layers instead")
    if empty:
        notes.append(f"nothing was left of it for {name_ranks(empty)}")
    return notes
