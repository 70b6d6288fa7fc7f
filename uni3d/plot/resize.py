"""The two sides of a resize: the ranks that wrote a checkpoint, and the ranks that resume from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import ckpt
from ckpt import Checkpoint
from parallel.degrees import Ranks, check_world_size
from uni3d.estimate.holders import Holders, resumed, writers
from uni3d.estimate.saved import SavedModel
from uni3d.importers import in_place
from uni3d.manifest import RunManifest
from uni3d.plot.layout import Side, name_ranks


@dataclass(frozen=True, kw_only=True)
class Place:
    """A topology with the parts that its ranks hold."""

    when: str
    """"before" or "after"."""
    source: SavedModel
    """Checkpoint whose atoms are drawn."""
    holders: Holders
    tag: str | None = None
    """Tag of the checkpoint written on this topology, if any."""
    imported: str | None = None
    """Kind of source of an imported checkpoint."""


def before_and_after(run: str, tag: str | None, degrees: Mapping[str, int | None]) -> tuple[Place, Place]:
    """Return the topology that wrote a checkpoint, and the one given by `degrees` or by the next resize.

    Raises:
        CheckpointError: there is no such checkpoint.
        ValueError: the model can't be split like that, a manifest lacks the information, or there was no
            resize.
    """
    if any(value is not None for value in degrees.values()):
        before = _written("before", checkpoint := in_place.open(run, tag))
        so_far = replace(before.holders.ranks, zero=RunManifest.of(checkpoint).zero_so_far)
        ranks = _ranks(so_far, degrees)
        return before, Place(when="after", source=before.source, holders=resumed(before.source, ranks))
    first, second = _resize(run, tag)
    return _written("before", first), _written("after", second)


def _written(when: str, checkpoint: Checkpoint) -> Place:
    manifest = RunManifest.of(checkpoint)
    source = SavedModel(checkpoint.arrays, manifest)
    try:
        holders = writers(source)
    except ValueError as error:
        raise ValueError(f"{checkpoint.url}: {error}") from None
    imported = manifest.imported_from
    return Place(when=when, source=source, holders=holders, tag=checkpoint.tag, imported=imported)


def _ranks(so_far: Ranks, degrees: Mapping[str, int | None]) -> Ranks:
    """Return the topology after: degrees that aren't given stay, and dp follows from the world size."""
    asked = {axis: n for axis, n in degrees.items() if axis != "world-size" and n is not None}
    ranks = replace(so_far, **asked)
    world = degrees["world-size"]
    if world is None:
        return ranks
    fixed = ("pp", "tp") if degrees["dp"] is None else ("pp", "dp", "tp")
    check_world_size(world, {axis: getattr(ranks, axis) for axis in fixed})
    return replace(ranks, dp=world // (ranks.pp * ranks.tp))


def _resize(run: str, tag: str | None) -> tuple[Checkpoint, Checkpoint]:
    """Return `tag` and the next checkpoint on another topology; without a tag, the last such pair."""
    advice = "give the topology after with --pp, --dp, --tp, --zero or --world-size"
    newest = in_place.open(run, tag)
    if not newest.folder:
        raise ValueError(f"{newest.url} is the folder of one checkpoint, not of a run; {advice}")
    tags = ckpt.committed_tags(run)
    if tag is None:
        after = newest
        for earlier in reversed(tags[: tags.index(newest.tag)]):
            before = ckpt.open_checkpoint(run, earlier, renamed=True)
            if _differ(before, after):
                return before, after
            after = before
        raise ValueError(f"{run} has no consecutive checkpoints on different topologies; {advice}")
    for later in tags[tags.index(tag) + 1 :]:
        after = ckpt.open_checkpoint(run, later, renamed=True)
        if _differ(newest, after):
            return newest, after
    raise ValueError(f"{run} has no checkpoint after {tag} on another topology; {advice}")


def _differ(first: Checkpoint, second: Checkpoint) -> bool:
    return RunManifest.of(first).written_on != RunManifest.of(second).written_on


def choose_atom(before: Place, after: Place, wanted: str | None) -> str:
    """Return the atom to draw: `wanted`, or the largest matrix that is cut on one of the sides.

    Raises:
        ValueError: there is no such atom, or its shapes differ.
    """
    shapes = before.source.shapes
    if wanted is not None:
        name = before.source.aliases.get(wanted, wanted)
        if name not in shapes:
            raise ValueError(f"there is no atom {wanted!r}; `uni3d inspect RUN --atoms` lists all")
        if after.source.shapes.get(name) != shapes[name]:
            raise ValueError(
                f"{name} has shape {list(shapes[name])} before and {after.source.shapes.get(name)} after; "
                "choose another with --atom"
            )
        return name
    both = [name for name, shape in shapes.items() if after.source.shapes.get(name) == shape]
    if not both:
        raise ValueError("the two checkpoints have no atom in common; choose another pair with --tag")
    by_size = sorted(both, key=lambda name: (len(shapes[name]) == 2, prod(shapes[name])), reverse=True)
    return next((name for name in by_size if _is_cut(name, before) or _is_cut(name, after)), by_size[0])


def _is_cut(atom: str, place: Place) -> bool:
    return any(box.shape != place.source.shapes[atom] for box in place.holders.boxes(atom).values())


def side_of(atom: str, place: Place) -> Side:
    """Return what the picture shows of one side."""
    ranks, boxes = place.holders.ranks, place.holders.boxes(atom)
    on = f"{ranks}, {ranks.total} rank{'s' * (ranks.total != 1)}"
    if place.imported is not None:
        on = f"imported from {place.imported}"
    return Side(
        title=f"{place.when.capitalize()}{f' ({place.tag})' if place.tag else ''}: {on}",
        ranks=ranks,
        parts=boxes,
        notes=_notes(atom, place, sorted(rank for rank, box in boxes.items() if 0 in box.shape)),
    )


def _notes(atom: str, place: Place, empty: list[int]) -> list[str]:
    """Return lines about the pipeline ranks, about ranks without a part, and about gaps in the manifest."""
    ranks, notes, without = place.holders.ranks, list[str](), list[int]()
    for stage in range(ranks.pp):
        members = range(stage * ranks.of_a_stage, (stage + 1) * ranks.of_a_stage)
        name = place.holders.name_at(atom, stage)
        if name is None:
            without += members
        elif ranks.pp > 1:
            under = "" if name == atom else f" a tied copy, {name}"
            notes.append(f"pipeline rank {stage} ({name_ranks(members)}) holds{under or ' it'}")
    if without:
        notes.append(f"{name_ranks(without)} {'holds' if len(without) == 1 else 'hold'} other layers")
    if empty:
        notes.append(f"{name_ranks(empty)} {'holds' if len(empty) == 1 else 'hold'} an empty part")
    if place.imported is not None:
        notes.append("rank 0 is the process that imported it")
    elif place.tag and ranks.zero and ranks.dp > 1 and place.source.writer.shard_group is None:
        notes.append(f"the manifest has no shard_group; drawn as sharded over all of dp({ranks.dp})")
    return notes
