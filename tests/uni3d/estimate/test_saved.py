"""Compare the parts, reads and memory of ranks, derived from a checkpoint, with those of real ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from resharding_cases import Place, held_case, save_case

import ckpt
import parallel
from uni3d.doctor.memory import needs
from uni3d.estimate.holders import Holders, reads, resumed, writers
from uni3d.estimate.saved import SavedModel
from uni3d.manifest import RunManifest

FEW = [Place("gpt", 1, 3, 1, 2), Place("gpt", 2, 1, 2, 3), Place("list", 2, 2, 1, 1)]
"""Cases of the quick run: each kind of cut once."""
PLACES = [
    Place("gpt", 1, 4, 1, 3, group=2),
    Place("gpt", 2, 1, 1, 1, "zero_bubble_v", 2, "uniform"),
    Place("own", 1, 3, 1, 3),
    Place("list", 3, 1, 1, 3),
    Place("untied", 2, 1, 2, 0),
    Place("biased", 2, 1, 2, 3),
    Place("mixtral", 1, 2, 2, 1),
]
MORE = [
    Place("gpt", 2, 2, 1, 1, balance="parameters"),
    Place("gpt", 2, 2, 1, 3, "interleaved", 2),
    Place("gpt", 4, 1, 1, 0),
    Place("stack", 3, 1, 1, 2),
    Place("biased", 1, 3, 1, 2),
    Place("gpt", 1, 1, 1, 0),
    Place("gpt", 1, 4, 1, 0),
    Place("gpt", 1, 2, 2, 1),
    Place("gpt", 1, 2, 1, 0),
    Place("gpt", 2, 1, 2, 1, "zero_bubble_v", 2, "parameters"),
    Place("untied", 1, 3, 1, 2),
    Place("untied", 1, 2, 2, 1),
    Place("untied", 2, 2, 1, 3),
    Place("untied", 4, 1, 1, 1),
    Place("biased", 1, 1, 1, 0),
    Place("biased", 1, 2, 2, 1),
    Place("biased", 2, 2, 1, 3),
]
OWN = ("fp32", "value")


def marked(places: list[Place], mark: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(place, marks=mark) for place in places]


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of each model, written by one rank."""
    folder = tmp_path_factory.mktemp("runs")

    def run_of(model: str) -> Path:
        if not (folder / model).exists():
            ranks.run(1, save_case, model, str(folder / model))
        return folder / model

    return run_of


def source_of(run: Path) -> tuple[ckpt.Checkpoint, SavedModel]:
    checkpoint = ckpt.open_checkpoint(run)
    return checkpoint, SavedModel(checkpoint.arrays, RunManifest.of(checkpoint))


@pytest.mark.parametrize(
    "place", [*FEW, *marked(PLACES, pytest.mark.slow), *marked(MORE, pytest.mark.matrix)], ids=str
)
def test_derived_parts_reads_and_memory_are_those_of_real_ranks(
    ranks: Ranks, runs: Callable[[str], Path], tmp_path: Path, place: Place
) -> None:
    run = runs(place.model)
    checkpoint, source = source_of(run)
    assert not list(
        source.refused(place.pp, place.dp, place.tp, place.settings, batch=12, shard_group=place.group)
    )
    found = ranks.run(place.world, held_case, place, str(run), str(tmp_path))
    check_boxes(source, place, [rank["held"] for rank in found])
    check_writers(source, place, tmp_path, [rank["held"] for rank in found])

    read = [rank["read"] for rank in found]
    planned = reads(checkpoint, source, place.ranks, place.settings, place.group)
    assert (planned.most, planned.least, planned.total) == (max(read), min(read), sum(read))
    check_memory(source, place, found)


def check_boxes(source: SavedModel, place: Place, held: list[Any]) -> None:
    """Check that the rules give the box of every array on every rank."""
    told: list[list[Any]] = [[] for _ in range(place.world)]
    of_stage = place.dp * place.tp
    for stage, parts in enumerate(source.by_pipeline_rank(place.pp, place.settings)):
        for part in parts:
            for i, box in enumerate(part.boxes(place.ranks, place.ranks.shards(place.group))):
                told[stage * of_stage + i].append((tuple(part.info.key), tuple(box)))
    assert held == [sorted(boxes) for boxes in told]


def check_writers(source: SavedModel, place: Place, saved: Path, held: list[Any]) -> None:
    """Check that a checkpoint of these ranks records their parts, and resumes like `source`."""
    _, written = source_of(saved)
    assert (written.declared, written.shapes) == (source.declared, source.shapes)
    assert by_rank(writers(written)) == [
        {atom: box for (atom, state), box in boxes if state in OWN} for boxes in held
    ]
    usual = by_rank(resumed(source, place.ranks))
    assert (usual == by_rank(writers(written))) == (place.virtual == 1 and place.group is None)


def by_rank(holders: Holders) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in range(holders.ranks.total)]
    for atom in {atom for parts in holders.by_pipeline_rank for atom in parts}:
        for rank, box in holders.boxes(atom).items():
            found[rank][atom] = tuple(box)
    return found


def check_memory(source: SavedModel, place: Place, found: list[Any]) -> None:
    of_stage = place.dp * place.tp
    shards = place.ranks.shards(place.group)
    for stage, need in enumerate(needs(source, place.ranks, place.settings, shards)):
        most = {
            key: max(rank[key] for rank in found[stage * of_stage : (stage + 1) * of_stage])
            for key in ("fp32", "value", "states", "trained", "whole")
            if key in found[0]
        }
        assert (need.optimizer, need.buffers) == (most["states"], most["value"])
        assert need.gradients == most["trained"]
        if place.zero == 3 or place.ranks.shards(place.group) == 1:
            assert need.parameters == most["fp32"]
        elif "whole" in most:
            assert need.parameters == most["fp32"] + 4 * most["whole"]


def test_the_cases_are_of_all_kinds(runs: Callable[[str], Path]) -> None:
    """Check that the test above covers empty parts and experts."""
    biased = by_rank(resumed(source_of(runs("biased"))[1], parallel.Ranks(pp=1, dp=3, tp=1, zero=2)))
    assert any(0 in shape for held in biased for _, shape in held.values())
    mixtral = source_of(runs("mixtral"))[1]
    assert any(len(shape) == 3 and mixtral.tp_dim(name) == 2 for name, shape in mixtral.shapes.items())
