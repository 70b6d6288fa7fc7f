"""Check, as `uni3d doctor` does, that a checkpoint would resume on a given number of ranks.

    topologies     topologies that are possible, and the reasons against the others
    memory         memory that a rank needs to resume
    checks         refusals and warnings, from the manifest and a config

`examine` puts their answers into one report. None of them loads torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ckpt
from ckpt.read import WEIGHT_STATES
from parallel.degrees import check_world_size
from uni3d.config import load_config
from uni3d.doctor import checks
from uni3d.doctor.memory import Known
from uni3d.doctor.topologies import Answer, Asked, Candidate, Fitter
from uni3d.estimate.holders import reads
from uni3d.estimate.job import read_json
from uni3d.estimate.saved import SavedModel
from uni3d.importers import in_place
from uni3d.manifest import RunManifest
from uni3d.units import format_bytes

WORLDS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of ranks that another framework's checkpoint is tried on."""
FEW = 3
"""Most reasons that are put into one sentence."""


def examine(
    run: str,
    tag: str | None,
    asked: Asked,
    config_path: Path | None,
    model: Path | None,
    kind: str = "auto",
) -> dict[str, Any]:
    """Return the report as JSON has it. `would_resume` is the verdict.

    `kind` is that of another framework's checkpoint, as for `uni3d import --from`.

    Raises:
        CheckpointError: the checkpoint can't be opened.
        ValueError: a file can't be read, or the config refuses the ZeRO stage asked for.
    """
    checkpoint = in_place.open(run, tag, kind=kind, states=False)
    manifest = RunManifest.of(checkpoint)
    asked = _on_ranks(asked, manifest)
    source = SavedModel(checkpoint.arrays, manifest)
    known = None if model is None else Known(model, source)
    values = _values(config_path, known)
    config = None if values is None else load_config(values)
    whole = _whole(run, checkpoint)
    zero = manifest.zero_so_far
    if config is not None and "stage" in config.zero_optimization.model_fields_set:
        zero = config.zero_optimization.stage
    fitter = Fitter(
        source=source,
        batch=source.batch if config is None or source.batch is not None else config.train_batch_size,
        zero=zero,
        config=config,
        values=values or {},
        known=known,
    )
    refusals, changes = checks.judged(manifest, config, checkpoint)
    if whole["problems"]:
        refusals.insert(0, _damage(whole))
    report = {
        "checkpoint": checkpoint.url.rstrip("/"),
        "world_size": asked.world,
        **_about(manifest, source, checkpoint),
        **_topologies(fitter, asked, refusals, checkpoint, readable=not whole["problems"]),
        "warnings": changes,
        "in_place": (found := _in_place(checkpoint, manifest, fitter)),
        "notes": [
            *checks.notes(config, manifest, in_place=found is not None),
            *_own_shapes(source),
            *_whole_reads(checkpoint),
        ],
        "whole": whole,
        "config_given": config is not None,
        "activations_counted": known is not None,
    }
    if config is not None:
        degrees, why = checks.as_it_is(config, asked.world)
        report["config_as_it_is"] = {"starts_as": degrees, "refused": why}
    return report


def _values(path: Path | None, known: Known | None) -> dict[str, Any] | None:
    """Return the config's content; without a config, the one in the model's file."""
    if path is None:
        return None if known is None else dict(known.document["uni3d"])
    values = read_json(path, f"--config {path}")
    if isinstance(values, dict) and isinstance(values.get("uni3d"), dict):
        return dict(values["uni3d"])  # an example's file has the config in a section
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} holds a {type(values).__name__}; expected an object")
    return values


def _about(manifest: RunManifest, source: SavedModel, checkpoint: ckpt.Checkpoint) -> dict[str, Any]:
    ranks = manifest.written_on
    return {
        "tag": checkpoint.tag,
        "step": manifest.step,
        "samples": manifest.engine.global_samples,
        "train_batch_size": source.batch,
        "created": manifest.created,
        "class": source.declared.get("class"),
        "written_on": None if ranks is None else vars(ranks),
        "imported_from": manifest.imported_from,
        "bytes": sum(info.nbytes for info in checkpoint.arrays.values()),
    }


def _topologies(
    fitter: Fitter, asked: Asked, refusals: list[str], checkpoint: ckpt.Checkpoint, *, readable: bool
) -> dict[str, Any]:
    """Return the topologies and the verdict."""
    answer = fitter.answer(asked)
    fitting = answer.fitting
    best = next(iter(fitting), None)
    reasons, nearby = list(refusals), list[int]()
    if best is None:
        nearby = fitter.nearby(asked)
        reasons.append(_nothing(answer, asked))
        if others := fitter.answer(Asked(world=asked.world, memory=asked.memory)).fitting:
            reasons.append(f"without these degrees it would resume as {others[0]}")
        if answer.topologies:
            best = min(answer.topologies, key=lambda topology: topology.need.total)
    return {
        "would_resume": not reasons,
        "reasons": reasons,
        "recommended": None if best is None else _recommended(best, fitter, checkpoint, readable),
        "memory_limit": asked.memory,
        "fitting": len(fitting),
        "topologies": [_row(topology) for topology in answer.topologies],
        "refused": [reason._asdict() for reason in answer.reasons],
        "nearby_world_sizes": nearby,
    }


def _nothing(answer: Answer, asked: Asked) -> str:
    """Return why there is no topology."""
    if answer.topologies and asked.memory is not None:
        least = min(answer.topologies, key=lambda topology: topology.need.total)
        need = format_bytes(least.need.total)
        return f"nothing fits in {format_bytes(asked.memory)} per rank: the minimum is {need}, as {least}"
    given = ", ".join(f"{axis} {n}" for axis in ("pp", "dp", "tp") if (n := getattr(asked, axis)) is not None)
    why = f": {'; '.join(map(str, answer.reasons))}" if len(answer.reasons) <= FEW else ""
    return f"there is no topology of {asked.world} ranks{f' with {given}' if given else ''}{why}"


def _row(topology: Candidate) -> dict[str, Any]:
    batch = topology.batch
    return {
        **{axis: getattr(topology, axis) for axis in ("pp", "dp", "tp")},
        "zero": topology.zero,
        "samples_per_rank": batch.share,
        "micro_batch": batch.micro,
        "accumulation": batch.accumulation,
        "memory_by_zero_stage": {str(zero): need.row() for zero, need in sorted(topology.needs.items())},
    }


def _recommended(
    topology: Candidate, fitter: Fitter, checkpoint: ckpt.Checkpoint, readable: bool
) -> dict[str, Any]:
    """Return a topology with its config, its memory, and the reads of its ranks."""
    ranks, batch = topology.ranks, topology.batch
    config = {
        **batch.config(fitter.batch),
        "parallel": {"pp": ranks.pp, "dp": ranks.dp, "tp": ranks.tp},
        "zero_optimization": {"stage": ranks.zero},
    }
    read = reads(checkpoint, fitter.source, ranks, fitter.settings, fitter.shard_group) if readable else None
    return {
        **vars(ranks),
        "config": config,
        "samples_per_rank": batch.share,
        "memory": topology.need.row(),
        "reads": read._asdict() if read else None,
    }


def _on_ranks(asked: Asked, manifest: RunManifest) -> Asked:
    """Return the question with a number of ranks; one process is taken to have written an import."""
    if not asked.world:
        ranks = manifest.writer.ranks
        asked = replace(asked, world=1 if ranks is None else ranks.total)
    given = {axis: n for axis in ("pp", "dp", "tp") if (n := getattr(asked, axis)) is not None}
    check_world_size(asked.world, given)
    return asked


def _in_place(checkpoint: ckpt.Checkpoint, manifest: RunManifest, fitter: Fitter) -> dict[str, Any] | None:
    """Return what a load of another framework's checkpoint restores, and what isn't there; None for ours."""
    if not isinstance(checkpoint, in_place.ForeignCheckpoint):
        return None
    atoms, optimizer = checkpoint.atoms, manifest.optimizer
    states = sorted({state for held in atoms.values() for state in held} - {*WEIGHT_STATES})
    there = {"weights and buffers": f"{len(ckpt.weights(checkpoint))} tensors"}
    if optimizer is not None:
        kind = optimizer.type or "an optimizer whose class isn't recorded"
        groups = f"{len(optimizer.groups)} group{'s' * (len(optimizer.groups) != 1)}"
        there["optimizer"] = f"{kind}: {', '.join(states) or 'no states'}; {groups} with hyperparameters"
    if manifest.scheduler is not None:
        there["LR schedule"] = "its state"
    if manifest.engine.loss_scale is not None:
        there["loss scale"] = f"{manifest.engine.loss_scale['scale']:g}"
    if manifest.step:
        there["step"] = str(manifest.step)
    if manifest.client_state:
        there["client state"] = ", ".join(manifest.client_state)
    wanted = {"optimizer": "its states and hyperparameters", "LR schedule": "", "step": "it counts from 0"}
    lacks = {name: why for name, why in wanted.items() if name not in there}
    ranks = [n for n in WORLDS if fitter.answer(Asked(world=n)).topologies]
    return {"restored": there, "lacks": lacks, "not_read": checkpoint.left_out, "ranks": ranks}


def _whole_reads(checkpoint: ckpt.Checkpoint) -> Iterator[str]:
    """Yield a note if another framework's checkpoint can't be read in parts."""
    if isinstance(checkpoint, in_place.ForeignCheckpoint) and (n := checkpoint.whole_reads):
        yield (
            f"{n} of {len(checkpoint.arrays)} arrays are read whole by each rank that has a part of them: "
            "import the checkpoint if it is large, or loaded often"
        )


def _own_shapes(source: SavedModel) -> Iterator[str]:
    """Yield a note on states whose split is unknown, if there are any."""
    if names := source.states_of_their_own_shape:
        yield (
            f"{len(names)} optimizer states differ in shape from their parameter ({names[0]}, ...): only the "
            "optimizer knows how they are split, so they count as whole on every rank"
        )


def _whole(run: str, checkpoint: ckpt.Checkpoint) -> dict[str, Any]:
    """Return the state of the checkpoint's files, and the other tags and leftovers in the run's folder."""
    found: dict[str, Any] = {"problems": [], "latest": None, "other_tags": [], "leftovers": []}
    if isinstance(checkpoint, in_place.ForeignCheckpoint):  # whose reader has looked at them
        return {"files": len(checkpoint.source.files), "bytes": None, **found}
    objects, size = ckpt.extent(checkpoint)
    found |= {"files": objects, "bytes": size, "problems": [str(each) for each in ckpt.absent(checkpoint)]}
    if not checkpoint.folder:  # `run` is the folder of the checkpoint itself
        return found
    store = ckpt.open_store(run)
    try:
        found["latest"] = ckpt.read_latest(store)
    except ckpt.CheckpointError as error:
        found["latest_problem"] = str(error)
    found["other_tags"] = [tag for tag in ckpt.committed_tags(store) if tag != checkpoint.tag]
    found["leftovers"] = store.leftovers()
    return found


def _damage(whole: dict[str, Any]) -> str:
    problems = whole["problems"]
    others = f"; other tags: {', '.join(reversed(whole['other_tags']))}" if whole["other_tags"] else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"the checkpoint is incomplete: {problems[0]}{more}{others}"
